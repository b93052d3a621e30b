"""Whether a difference between two models is more than the noise of the sample it was measured on.

Both models are measured on the same rows (windows of a text, requests of a task), so the standard error is that of the
differences row by row: what makes a row hard for both drops out. Rows count as independent. It says nothing about the
noise of compressing anew with another seed or other calibration text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.durable import read_json
from llmcompress.evaluation.ledger import part_name
from llmcompress.evaluation.scores import ACCURACIES, paired_stderr

BOUND = 1.96
"""Standard errors that a difference must exceed: 5 % of pairs that do not differ would."""
_MEANT = tuple(f".{name}" for name in ACCURACIES)


def within_noise(difference: float | None, stderr: float | None) -> bool | None:
    """Whether a difference is no larger than ``BOUND`` standard errors; None where no error is known.

    Args:
        difference: Difference of two figures.
        stderr: Its standard error. Zero, for models that agree on every row, makes no difference noise.
    """
    if difference is None or stderr is None:
        return None
    return 0 < abs(difference) <= BOUND * stderr


@dataclass(frozen=True, slots=True)
class Recorded:
    """A figure of a run, row by row.

    Attributes:
        sample: What the rows are of; figures can be compared row by row where this is equal.
        rows: One value a row, whose mean differs between models as the figure does; none for ``tasks.mean_acc``.
    """

    sample: str
    rows: tuple[float, ...]


def recorded(stage_dir: Path) -> dict[str, Recorded]:
    """Row-by-row figures of the compressed model (of the dense one where that is all there is) that a run has kept.

    Args:
        stage_dir: Folder of its evaluate stage.

    Returns:
        By ``task.metric``; only what can be read and has rows.
    """
    found: dict[str, Recorded] = {}
    texts = read_json(stage_dir / "texts.json") or {}
    for side in ("compressed", "dense"):
        fresh: dict[str, Recorded] = {}
        for path in sorted((stage_dir / "parts").glob(f"{side}.*.json")):
            part = read_json(path)
            for entry in part if isinstance(part, list) else ():
                if isinstance(entry, dict) and entry.get("rows"):
                    sample = f"{entry['task']} {entry['n']} {entry.get('asked', '')}"
                    fresh[f"{entry['task']}.{entry['metric']}"] = Recorded(sample, tuple(entry["rows"]))
        # no mean of rows, but whether it is one of the same tasks can be told
        if len(asked := [one.sample for name, one in fresh.items() if name.endswith(_MEANT)]) > 1:
            fresh["tasks.mean_acc"] = Recorded("\n".join(asked), ())
        for name, source in texts.items():
            part = read_json(stage_dir / "parts" / part_name(f"{side}.perplexity.{name}"))
            if isinstance(part, dict) and part.get("window_nll"):
                counts = [part[key] for key in ("tokens", "windows", "text_bytes")]
                sample = json.dumps([_content(source), *counts], sort_keys=True)
                fresh[f"{name}.perplexity"] = Recorded(sample, window_rows(part))
        found = fresh | found
    return found


def _content(source: Mapping[str, Any]) -> dict[str, Any]:
    """What a text consists of, wherever it lay: two checkouts hold the same file under two paths."""
    found = {key: value for key, value in source.items() if key not in ("path", "files")}
    return found | {"files": [file["sha256"] for file in source.get("files", ())]}


def window_rows(part: Mapping[str, Any]) -> tuple[float, ...]:
    """Perplexity by window, linearised around the mean, so that two models can be compared window by window."""
    return tuple(part["perplexity"] * nll for nll in part.get("window_nll", ()))


def difference_stderr(first: Recorded | None, second: Recorded | None) -> float | None:
    """Standard error of the difference of two runs' figures; None where they were not asked the same."""
    if first is None or second is None or asked_otherwise(first, second):
        return None
    return paired_stderr(first.rows, second.rows)


def asked_otherwise(first: Recorded | None, second: Recorded | None) -> bool:
    """Whether two runs' figures, both kept row by row, are of other texts or rows, or of the same in other prompts."""
    return first is not None and second is not None and first.sample != second.sample


def stages_of(run_dir: Path, names: Sequence[str]) -> dict[str, Recorded]:
    """Row-by-row figures of all stages of a run, by ``task.metric``; the last stage that has one counts, as in the
    figures that runs are compared by.

    Args:
        run_dir: The run's folder.
        names: Its stages.
    """
    found: dict[str, Recorded] = {}
    for name in names:
        found |= recorded(run_dir / "stages" / name)
    return found
