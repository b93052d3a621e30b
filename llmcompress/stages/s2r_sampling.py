"""Sampling in durable chunks: a killed stage asks the model only for what is missing."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.quant.store import write_durably

if TYPE_CHECKING:
    from llmcompress.data.problems.base import Problem
    from llmcompress.evaluation.sampling import Sampling
    from llmcompress.evaluation.self_correction import Reader
    from llmcompress.stages.state import RunContext

# prompts in one file
CHUNK = 256


def sample_all(
    model: Any, reader: Reader, problems: Sequence[Problem], samples: int, sampling: Sampling, ctx: RunContext
) -> list[list[list[int]]]:
    """``samples`` responses to every problem, as token ids; chunks that exist are read back.

    Args:
        model: In evaluation mode.
        reader: Prompts.
        problems: Which.
        samples: For each.
        sampling: How.
        ctx: The run; files go to ``samples/`` in the stage's folder.
    """
    from llmcompress.evaluation.sampling import sample

    folder = ctx.stage_dir / "samples"
    folder.mkdir(exist_ok=True)
    found: list[list[list[int]]] = []
    count = -(-len(problems) // CHUNK)
    for number in range(count):
        path = folder / f"{number:05d}.json"
        if not path.exists():
            part = problems[number * CHUNK : (number + 1) * CHUNK]
            once = [reader.prompt(problem.question) for problem in part]
            prompts = [prompt for prompt in once for _ in range(samples)]
            ids = sample(model, prompts, sampling, reader.end, reader.pad, ctx.seed * 8191 + number)
            rows = [ids[begin : begin + samples] for begin in range(0, len(ids), samples)]
            write_durably(path, json.dumps(rows, separators=(",", ":")).encode())
            ctx.emit("note", text=f"sampled {min((number + 1) * CHUNK, len(problems))} of {len(problems)} problems")
        found += json.loads(path.read_text())
    return found
