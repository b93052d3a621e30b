"""What was measured, as figures: scores of a side, rows of a pair, tables and summaries for the report.

:mod:`llmcompress.evaluation.measure` measures and fills the ledger; this reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.evaluation import recall as remembering
from llmcompress.evaluation.ledger import Ledger
from llmcompress.evaluation.perplexity import POSITION_BIN
from llmcompress.evaluation.scores import ACCURACIES, Score, paired_stderr
from llmcompress.evaluation.significance import window_rows

if TYPE_CHECKING:
    from llmcompress.evaluation.measure import Prepared, Side
    from llmcompress.stages.evaluate import EvaluateConfig

NATIVE, SAMPLES = "native", "samples"


def written_by(by: Sequence[str]) -> str:
    """Which engine wrote answers, in words: ``native``, or reasons why transformers did."""
    reasons = [reason for reason in by if reason != NATIVE]
    if not reasons:
        return "the native engine"
    return ("both engines: " if len(reasons) < len(by) else "transformers: ") + "; ".join(reasons)


def decoding_rows(prepared: Prepared, ledger: Ledger) -> list[dict[str, Any]]:
    """What wrote the answers of each task and the samples of each model, for the report."""
    rows = []
    for side in ("dense", "compressed"):
        for part in [*(spec.name for spec in prepared.tasks), SAMPLES]:
            by = ledger.get(f"{side}.written.{part}")
            if by is not None:
                rows.append({"side": side, "part": part, "written_by": written_by(by)})
    return rows


def side_scores(side: Side, config: EvaluateConfig, prepared: Prepared, ledger: Ledger) -> list[Score]:
    """Scores of one side from the ledger, in the recipe's order; parts that are missing are left out."""
    scores: list[Score] = []
    for name in config.perplexity:
        part = ledger.get(f"{side}.perplexity.{name}")
        if part is not None:
            n, value = part["tokens"], part["perplexity"]
            scores.append(Score(name, "perplexity", value, part["stderr"], n, False, window_rows(part)))
            scores.append(Score(name, "bits_per_byte", part["bits_per_byte"], None, n, False))
    for spec in prepared.tasks:
        for entry in ledger.get(f"{side}.task.{spec.name}") or ():
            scores.append(Score(**{**entry, "rows": tuple(entry["rows"])}))
    return scores + remembering.scores(ledger.get(f"{side}.recall") or [])


def position_table(config: EvaluateConfig, ledger: Ledger) -> dict[str, Any]:
    """Mean negative log-likelihood by position in the window, per text and side."""
    found: dict[str, Any] = {}
    for name in config.perplexity:
        sides = {side: ledger.get(f"{side}.perplexity.{name}") for side in ("dense", "compressed")}
        rows = {side: part["position_nll"] for side, part in sides.items() if part is not None}
        if rows:
            found[name] = {"bin": POSITION_BIN, **rows}
    return found


def skipping_summary(config: EvaluateConfig, ledger: Ledger) -> dict[str, Any] | None:
    """What expert skipping did and cost over all perplexity texts; None when no such policy was active.

    Experts skipped, slots dropped and time are separate figures: none of them follows from another.
    """
    totals: dict[str, int] = {}
    texts: list[dict[str, Any]] = []
    layers: dict[str, dict[str, int]] = {}
    seconds = {"with": 0.0, "without": 0.0, "deciding": 0.0}
    compared = bool(config.perplexity)
    for name in config.perplexity:
        part, plain = ledger.get(f"compressed.perplexity.{name}"), ledger.get(f"without_policies.perplexity.{name}")
        if part is None or "skipping" not in part:
            return None
        found = part["skipping"]
        for key, value in found["total"].items():
            totals[key] = totals.get(key, 0) + value
        for layer in found["layers"]:
            counters = layers.setdefault(layer["module"], {})
            for key, value in layer.items():
                if key != "module":
                    counters[key] = counters.get(key, 0) + value
        compared = compared and plain is not None
        seconds["with"] += part["seconds"]
        seconds["without"] += plain["seconds"] if plain is not None else 0.0
        seconds["deciding"] += found["seconds"]
        texts.append(
            {"text": name, "perplexity_with": part["perplexity"], "perplexity_without": plain and plain["perplexity"]}
        )
    if not texts:
        return None
    summary = {
        "experts_skipped": totals["experts_skipped"] / max(1, totals["experts_used"]),
        "slots_dropped": totals["slots_dropped"] / max(1, totals["slots"]),
        "tokens_without_expert": totals["tokens_without_expert"],
        "seconds_deciding": seconds["deciding"],
        "seconds_with": seconds["with"],
        "texts": texts,
        "per_layer": [{"module": module, **counters} for module, counters in layers.items()],
    }
    return summary | ({"seconds_without": seconds["without"]} if compared else {})


def fidelity_scores(result: Mapping[str, Any] | None) -> list[Score]:
    """The fidelity figures as scores of the compressed model."""
    if result is None:
        return []
    n = result["tokens"]
    return [
        Score("fidelity", "kl", result["kl"], result["kl_stderr"], n, False),
        Score("fidelity", "kl_p99", result["kl_p99"], None, n, False),
        Score("fidelity", "top1", result["top1"], result["top1_stderr"], n, True),
        Score("fidelity", "logit_error", result["logit_error"], None, n, False),
    ]


def shift_scores(shift: Mapping[str, Any] | None) -> list[Score]:
    """Router agreement with the dense twin, averaged over layers, as scores of the compressed model."""
    if shift is None or not shift["expert_shift"]:
        return []
    rows = shift["expert_shift"]
    n = rows[0]["tokens"]
    overlap_mean = sum(row["overlap"] for row in rows) / len(rows)
    changed_mean = sum(row["cr_any"] for row in rows) / len(rows)
    return [
        Score("experts", "overlap", overlap_mean, None, n, True),
        Score("experts", "cr_any", changed_mean, None, n, False),
    ]


def pair_scores(dense: Sequence[Score] | None, compressed: Sequence[Score] | None) -> list[dict[str, Any]]:
    """Bring the scores of two models together.

    Args:
        dense: Scores of the dense twin, None when it did not run.
        compressed: Scores of the compressed model, None when there is none.

    Returns:
        One row per figure with ``task``, ``metric``, ``dense``, ``compressed``, ``stderr`` (of the compressed value,
        or of the dense one where that is all there is), ``dense_stderr``, ``n``, ``higher_is_better``,
        ``difference`` and, for figures that are means over the same rows, the paired ``difference_stderr``.
    """
    left = {(score.task, score.metric): score for score in dense or ()}
    right = {(score.task, score.metric): score for score in compressed or ()}
    rows = []
    for key in dict.fromkeys([*left, *right]):
        one, two = left.get(key), right.get(key)
        shown = two if two is not None else one
        assert shown is not None
        row: dict[str, Any] = {
            "task": shown.task,
            "metric": shown.metric,
            "dense": None if one is None else one.value,
            "compressed": None if two is None else two.value,
            "stderr": shown.stderr,
            "dense_stderr": None if one is None else one.stderr,
            "n": shown.n,
            "higher_is_better": shown.higher_is_better,
        }
        if one is not None and two is not None:
            row["difference"] = two.value - one.value
            row["difference_stderr"] = paired_stderr(one.rows, two.rows)
        rows.append(row)
    return rows


def task_mean(rows: Sequence[Mapping[str, Any]], tasks: Sequence[str]) -> list[dict[str, Any]]:
    """The mean accuracy over several tasks, which papers quote: ``tasks.mean_acc``.

    A task counts once, however many rows it has, with ``acc_norm`` where lm-eval gives one and ``acc`` otherwise.

    Args:
        rows: Rows of :func:`pair_scores`.
        tasks: What the recipe calls them.

    Returns:
        One row of the same form, with ``n`` of all tasks together and standard errors as of independent tasks; none
        for a single task, or where a task has no accuracy.
    """
    known = {(row["task"], row["metric"]): row for row in rows}
    parts = [next((known[task, name] for name in ACCURACIES if (task, name) in known), None) for task in tasks]
    found = [part for part in parts if part is not None]
    if len(found) < max(2, len(parts)):
        return []

    def mean(key: str) -> float | None:
        values: list[Any] = [part.get(key) for part in found]
        return math.fsum(values) / len(values) if None not in values else None

    def spread(key: str) -> float | None:
        values: list[Any] = [part.get(key) for part in found]
        return math.hypot(*values) / len(values) if None not in values else None

    row = {"task": "tasks", "metric": "mean_acc", "dense": mean("dense"), "compressed": mean("compressed")}
    row |= {"stderr": spread("stderr"), "dense_stderr": spread("dense_stderr")}
    row |= {"n": sum(part["n"] for part in found), "higher_is_better": True}
    if "difference" in found[0]:
        row |= {"difference": mean("difference"), "difference_stderr": spread("difference_stderr")}
    return [row]


def without_policy_rows(config: EvaluateConfig, ledger: Ledger) -> list[dict[str, Any]]:
    """Rows for the perplexity of the compressed model with its run-time policies taken off."""
    rows = []
    for name in config.perplexity:
        part = ledger.get(f"without_policies.perplexity.{name}")
        if part is None:
            continue
        dense = ledger.get(f"dense.perplexity.{name}")
        compressed = [_plain(name, part)]
        rows += pair_scores([_plain(name, dense)] if dense is not None else None, compressed)
    return rows


def _plain(name: str, part: Mapping[str, Any]) -> Score:
    return Score(
        name, "perplexity_without_policies", part["perplexity"], part["stderr"], part["tokens"], False,
        window_rows(part),
    )  # fmt: skip
