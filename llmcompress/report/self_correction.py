"""The report's section on self-correction: behaviour by stage, learning curves, responses of each kind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llmcompress.durable import read_json
from llmcompress.report.plots import Series, line_chart

Json = dict[str, Any]

COLUMNS = (
    ("accuracy", "accuracy"),
    ("first_accuracy", "first attempt"),
    ("verification_accuracy", "verdicts true"),
    ("error_recall", "errors recalled"),
    ("correct_precision", "precision of “correct”"),
    ("incorrect_to_correct", "wrong → right"),
    ("correct_to_incorrect", "right → wrong"),
    ("trials", "trials"),
    ("tokens", "tokens"),
    ("ended", "ended"),
    ("repeated_retries", "retries that repeat"),
)
# lines of a reinforcement curve and of a supervised one, with their strokes
REINFORCED = (
    ("accuracy", "accuracy", "accent"),
    ("first_accuracy", "first attempt", "accent dashed"),
    ("error_recall", "errors recalled", "strong"),
    ("ended", "ended", "muted"),
)
SUPERVISED = (
    ("cross_entropy", "trained rows", "muted"),
    ("verdict", "their verdicts", "muted dashed"),
    ("validation", "held-out rows", "accent"),
    ("validation_verdict", "their verdicts, held out", "accent dashed"),
)
KINDS = {
    "right": "right at once",
    "corrected": "wrong first, corrected",
    "broken": "right first, broken",
    "failed": "wrong to the end",
}
# points of a curve that a screen can show
POINTS = 60


def collect_self_correction(run_dir: Path, stages: Sequence[str]) -> list[Json]:
    """What the S2R stages left in their folders; stages without any of it are passed over.

    Args:
        run_dir: Folder of the run.
        stages: Names in order.
    """
    found = []
    for name in stages:
        folder = run_dir / "stages" / name
        states = {
            path.stem.removeprefix("behaviour_"): read_json(path) for path in sorted(folder.glob("behaviour_*.json"))
        }
        states = {state: figures for state, figures in states.items() if isinstance(figures, dict)}
        curve = read_json(folder / "curve.json")
        if states or curve:
            texts = next((read_json(p) for p in (folder / "episodes_after.json", *folder.glob("episodes_*.json"))
                          if p.exists()), None)  # fmt: skip
            found.append(
                {
                    "stage": name, "states": states, "curve": curve if isinstance(curve, list) else [],
                    "texts": (texts or {}).get("texts", []), "majority": read_json(folder / "majority.json"),
                }
            )  # fmt: skip
    return found


def self_correction_section(entries: Sequence[Json]) -> Json | None:
    """Everything the template needs; None without data."""
    if not entries:
        return None
    order = {"before": 0, "dense": 0, "gate": 1, "compressed": 2, "after": 2}
    rows = []
    for entry in entries:
        for state, figures in sorted(entry["states"].items(), key=lambda item: order.get(item[0], 3)):
            if state != "gate":
                rows.append({"stage": entry["stage"], "state": state, "cells": _cells(figures)})
        if entry["majority"]:
            vote = entry["majority"]
            cells = ["–"] * len(COLUMNS)
            cells[0], cells[8] = f"{100 * vote['accuracy']:.1f}\u00a0%", f"{vote['tokens']:.1f}"
            rows.append({"stage": entry["stage"], "state": f"vote of {vote['samples']:.0f} samples", "cells": cells})
    last = next((entry for entry in reversed(entries) if entry["texts"]), None)
    return {
        "columns": [label for _, label in COLUMNS],
        "rows": rows,
        "curves": [chart for chart in (_chart(entry) for entry in entries) if chart],
        "texts": [{**row, "kind": KINDS.get(row["kind"], row["kind"])} for row in (last["texts"] if last else [])],
    }


def _cells(figures: Json) -> list[str]:
    found = []
    for name, _ in COLUMNS:
        value = figures.get(name)
        if value is None:
            found.append("–")
        else:
            found.append(f"{value:.2f}" if name in ("trials", "tokens") else f"{100 * value:.1f}\u00a0%")
    return found


def _chart(entry: Json) -> Json | None:
    curve = [record for record in entry["curve"] if "accuracy" in record]
    if len(curve) < 2:
        return _losses(entry)
    stride = -(-len(curve) // POINTS)
    shown = curve[::stride]
    series = [Series(label, [record.get(key) for record in shown], style) for key, label, style in REINFORCED]
    title = f"Sampled responses of stage {entry['stage']} by training step"
    chart = line_chart([int(r["step"]) for r in shown], series, title, axis="step")
    return {"stage": entry["stage"], "what": "Responses sampled", "chart": chart}


def _losses(entry: Json) -> Json | None:
    """Loss on trained and on held-out rows where the latter was measured: a mean over the steps since the measurement
    before, because that of a single batch is mostly which rows it has.
    """
    points: list[Json] = []
    since: list[Json] = []
    for record in (r for r in entry["curve"] if r.get("phase", "training") == "training"):
        since.append(record)
        if "validation" in record:
            means = {key: sum(r[key] for r in since) / len(since) for key in ("cross_entropy", "verdict")}
            points.append({**record, **means})
            since = []
    if len(points) < 2:
        return None
    shown = points[:: -(-len(points) // POINTS)]
    series = [Series(label, [record[key] for record in shown], style) for key, label, style in SUPERVISED]
    title = f"Cross-entropy of stage {entry['stage']} by training step, in nats a token"
    chart = line_chart([int(r["step"]) for r in shown], series, title, axis="step", show=lambda value: f"{value:.3g}")
    return {"stage": entry["stage"], "what": "Cross-entropy of rows in nats a token", "chart": chart}
