"""Figures of tasks: what lm-eval's results say, with standard errors of each and of differences on the same rows.

Standard errors are computed here from the per-row scores, which also gives the standard error of the difference
between two models on the same rows; the harness's bootstrap would start processes and print.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

# the accuracy of a task that a mean over tasks takes, the first that lm-eval gives
ACCURACIES = ("acc_norm", "acc")
_LOWER_IS_BETTER = ("perplexity", "bits_per_byte")


@dataclass(frozen=True, slots=True)
class Score:
    """One figure of one task for one model.

    Attributes:
        task, metric: Names; a metric under a filter is ``exact_match.strict-match``.
        value: The figure.
        stderr: Standard error, None where there is no closed form.
        n: Rows.
        higher_is_better: Direction.
        rows: Per-row values when the figure is their mean, for paired comparison. For a perplexity, which is not,
            its linearisation ``value · nll``: differences of those have the right spread. Empty otherwise.
        asked: SHA-256 of the rows and of the prompts they became, in their order: two models were asked the same where
            this is equal. Empty where it is not known.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    higher_is_better: bool | None
    rows: tuple[float, ...] = ()
    asked: str = ""


def normalise(name: str, tasks: Mapping[str, Any], results: Mapping[str, Any]) -> list[Score]:
    """Turn lm-eval's result dictionary into scores.

    Args:
        name: What the recipe calls the task.
        tasks: lm-eval task objects by name.
        results: What ``evaluate`` returned, with samples.

    Returns:
        Scores; pooled over subtasks first when there are several.
    """
    scores: list[Score] = []
    for task_name, task in tasks.items():
        # a single task goes by the recipe's name
        label = name if len(tasks) == 1 else task_name
        directions = task.higher_is_better()
        samples = results.get("samples", {}).get(task_name, [])
        for key, value in results["results"][task_name].items():
            metric, separator, filter_name = key.partition(",")
            if not separator or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            own = [s for s in samples if s.get("filter", "none") == filter_name and metric in s]
            rows = [s[metric] for s in own]
            # the same row is another question behind other examples, or in a chat
            asked = _digest([s.get(key) for s in own for key in ("doc_hash", "prompt_hash")])
            full = metric if filter_name == "none" else f"{metric}.{filter_name}"
            score = _score(label, full, float(value), rows, len(samples), _direction(metric, directions))
            scores.append(replace(score, asked=asked))
    return _pooled(name, scores) + scores if len(tasks) > 1 else scores


def _digest(parts: Sequence[str | None]) -> str:
    """One hash of several; empty where one is missing."""
    return hashlib.sha256("\n".join(filter(None, parts)).encode()).hexdigest() if parts and all(parts) else ""


def _score(task: str, metric: str, value: float, rows: list[Any], fallback: int, higher: bool | None) -> Score:
    numbers = [float(row) for row in rows if isinstance(row, int | float)]
    n = len(rows) or fallback
    if len(numbers) == len(rows) and numbers and math.isclose(math.fsum(numbers) / len(numbers), value, rel_tol=1e-9):
        return Score(task, metric, value, mean_stderr(numbers), n, higher, tuple(numbers))
    if metric == "perplexity" and len(numbers) == len(rows) > 1:
        # rows are log-likelihoods; delta method for exp(−mean)
        spread = mean_stderr(numbers)
        linear = tuple(-value * number for number in numbers)
        return Score(task, metric, value, None if spread is None else value * spread, n, higher, linear)
    return Score(task, metric, value, None, n, higher)


def _direction(metric: str, directions: Mapping[str, Any]) -> bool | None:
    if metric in directions:
        return bool(directions[metric])
    return False if metric.endswith(_LOWER_IS_BETTER) else None


def mean_stderr(values: Sequence[float]) -> float | None:
    """Standard error of a mean of independent values; None for fewer than two."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1) / len(values))


def _pooled(name: str, scores: Sequence[Score]) -> list[Score]:
    """Mean over all rows of all subtasks, for every metric that is a mean."""
    pooled = []
    for metric in dict.fromkeys(score.metric for score in scores):
        parts = [score for score in scores if score.metric == metric]
        if all(part.rows and math.isclose(math.fsum(part.rows) / len(part.rows), part.value) for part in parts):
            rows = [row for part in parts for row in part.rows]
            mean = math.fsum(rows) / len(rows)
            direction, asked = parts[0].higher_is_better, _digest([part.asked for part in parts])
            pooled.append(Score(name, metric, mean, mean_stderr(rows), len(rows), direction, tuple(rows), asked))
    return pooled


def paired_stderr(dense: Sequence[float], compressed: Sequence[float]) -> float | None:
    """Standard error of the mean difference of two models on the same rows; None when the rows do not pair up."""
    if len(dense) != len(compressed) or len(dense) < 2:
        return None
    return mean_stderr([c - d for d, c in zip(dense, compressed)])
