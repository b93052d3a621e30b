"""Arithmetic of the S2R stages for ``plan``: an upper limit, as if every response had its full length. No torch."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from llmcompress.data.problems.base import SHARES, Split
from llmcompress.data.problems.config import CountdownTask, FileTask, Task
from llmcompress.models.sizes import forward_flops
from llmcompress.stages.base import Estimate, PlanInputs

if TYPE_CHECKING:
    from llmcompress.stages.s2r.config import MeasureConfig, TrainingConfig

# tokens of a problem, as a guess
PROMPT_TOKENS = 256
# sets of numbers of which Countdown's problems are counted within a fraction of a second
_COUNTABLE = 2000
# problems that s2r_rl measures before it begins
GATE_PROBLEMS = 400


def problem_count(task: Task, wanted: int | None, split: Split) -> int | None:
    """How many problems a stage takes; None where that is not known without reading or generating all of them.

    Args:
        task: The recipe's section.
        wanted: How many the recipe asks for, None for all.
        split: Of which split.
    """
    found: int | None
    if isinstance(task, FileTask):
        found = _rows(task, split)
    elif isinstance(task, CountdownTask):
        sets = math.comb(task.high - task.low + task.numbers, task.numbers)
        found = len(task.build().problems(split)) if sets <= _COUNTABLE else None
    else:
        found = round(task.count * SHARES[split])
    if wanted is None or found is None:
        return found if wanted is None else wanted
    return min(wanted, found)


def _rows(task: FileTask, split: Split) -> int | None:
    """Of a plain file that is here: lines, less the share of the other splits."""
    path = Path(task.test_path if task.test_path and split == "test" else task.path)
    if not path.is_file() or path.suffix in (".gz", ".xz"):
        return None
    with path.open("rb") as file:
        lines = sum(1 for line in file if line.strip())
    if split == "test":
        return lines if task.test_path else round(lines * SHARES["test"])
    others = SHARES["validation"] + (0.0 if task.test_path else SHARES["test"])
    return round(lines * (SHARES["validation"] if split == "validation" else 1 - others))


def passes(inputs: PlanInputs, rows: float, length: int) -> float:
    """Arithmetic of a forward pass, head included, over rows of this many tokens; none is longer than the model's
    sequences may be.
    """
    layout, length = inputs.layout, min(length, inputs.positions or length)
    tokens = round(rows * length)
    return forward_flops(layout, tokens, length) + 2.0 * tokens * layout.vocab * layout.hidden


def trained(config: TrainingConfig, inputs: PlanInputs, rows: float, length: int) -> float:
    """Forward and backward passes over rows: gradients of what goes through cost a forward pass, those of weights
    another, which adapters on frozen weights save; blocks that are computed again one more.
    """
    times = 1 + (1 if config.adapter is not None else 2) + config.recompute
    return times * passes(inputs, rows, length)


def measured(config: MeasureConfig | None, task: Task, inputs: PlanInputs) -> float | None:
    """Responses to held-out problems; None where their number is not known."""
    if config is None:
        return 0.0
    count = problem_count(task, config.problems, config.split)
    return None if count is None else passes(inputs, count, PROMPT_TOKENS + config.max_new_tokens)


def with_work(found: Estimate, parts: list[float | None]) -> Estimate:
    """The estimate with the sum of its parts, and a note on what the sum is."""
    if any(part is None for part in parts):
        note = "GFLOP: not counted, the number of problems is not known before they are read; problems: N gives it"
        return replace(found, notes=(*found.notes, note))
    note = f"GFLOP: as if every row and response had its full length, and problems {PROMPT_TOKENS} tokens"
    return replace(found, flops=sum(part for part in parts if part is not None), notes=(*found.notes, note))
