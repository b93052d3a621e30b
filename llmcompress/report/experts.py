"""The report's sections on mixtures: tokens whose experts changed, experts that are skipped, what either costs."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from llmcompress.report.data import BlockRow, dig, number
from llmcompress.report.number_text import count_text, metric_text, seconds_text, signed
from llmcompress.report.plots import Change, Series, dumbbells, line_chart, percent

Json = dict[str, Any]


def shift_changes(blocks: list[BlockRow]) -> list[Change]:
    """Share of tokens with at least one changed expert, before and after router calibration."""
    found = []
    for block in blocks:
        before = number(dig(block.router, "before", "cr_any"))
        after = number(dig(block.router, "after", "cr_any"))
        if before is None:
            continue
        found.append(Change(block.index, before, after, bool(block.router.get("kept", True))))
    return found


def shift_section(blocks: list[BlockRow], changes: list[Change]) -> Json:
    """Chart and table of expert shift."""
    rows = []
    for block in blocks:
        router = block.router
        if not isinstance(router.get("before"), Mapping):
            continue
        cells = []
        for key in ("cr_any", "cr_half", "cr_all", "overlap"):
            before, after = number(dig(router, "before", key)), number(dig(router, "after", key))
            cells.append(
                "–" if before is None else percent(before) + (f" → {percent(after)}" if after is not None else "")
            )
        losses = [number(router.get(key)) for key in ("loss_before", "loss_after")]
        loss = " → ".join(f"{value:.3g}" for value in losses if value is not None)
        kept = "" if router.get("after") is None else "yes" if router.get("kept", True) else "no"
        rows.append({"layer": block.index, "cells": [*cells, loss or "–", str(router.get("k", "–")), kept or "–"]})
    calibrated = [c for c in changes if c.after is not None]
    summary = ""
    if calibrated and not any(c.kept for c in calibrated):
        summary = "Calibration lowered it in no layer on its held-out tokens, so every original router was kept."
    elif calibrated:
        lower = sum(1 for c in calibrated if c.after is not None and c.after < c.before)
        mean_before = sum(c.before for c in calibrated) / len(calibrated)
        mean_after = sum(c.after or 0.0 for c in calibrated) / len(calibrated)
        summary = (
            f"On average {percent(mean_before)} of tokens chose a different expert before calibration and "
            f"{percent(mean_after)} after it; lower in {lower} of {len(calibrated)} layers."
        )
    title = "Share of tokens with at least one changed expert, per layer"
    return {"chart": dumbbells(changes, title), "rows": rows, "summary": summary}


def pesf_section(entry: Mapping[str, Any]) -> Json:
    """Savings of expert skipping, each figure on its own bar, and how they spread over layers."""
    bars = []
    saved = number(entry.get("time_saved"))
    with_policy, without = number(entry.get("seconds_with")), number(entry.get("seconds_without"))
    if saved is None and with_policy is not None and without:
        saved = 1 - with_policy / without
    for value, label in (
        (number(entry.get("experts_skipped")), "Experts skipped"),
        (number(entry.get("slots_dropped")), "Routing slots dropped"),
        (saved, "Prefill time saved"),
    ):
        if value is not None:
            bars.append({"label": label, "value": percent(value), "width": max(0.0, min(100.0, 100 * value))})
    times = (
        ("seconds_with", "time with skipping"),
        ("seconds_without", "time without"),
        ("seconds_deciding", "of it spent deciding"),
    )
    rest = [(label, seconds_text(value)) for key, label in times if (value := number(entry.get(key))) is not None]
    lost = number(entry.get("tokens_without_expert"))
    if lost is not None:
        rest.append(("tokens left without an expert", count_text(lost)))
    for text in entry.get("texts") or []:
        values = [number(dig(text, key)) for key in ("perplexity_with", "perplexity_without")]
        if None not in values:
            rest.append((f"{text.get('text', '')} perplexity", f"{values[0]:.3f} with, {values[1]:.3f} without"))
    return {"bars": bars, "rest": rest, "chart": _skipping_chart(entry.get("per_layer"))}


def _skipping_chart(layers: Any) -> Any:
    """Shares of experts skipped and slots dropped per layer; None for fewer than two layers."""
    rows = [row for row in layers or [] if isinstance(row, Mapping)]
    if len(rows) < 2:
        return None

    def share(row: Mapping[str, Any], part: str, whole: str) -> float | None:
        value, total = number(row.get(part)), number(row.get(whole))
        return value / total if value is not None and total else None

    series = [
        Series("experts skipped", [share(row, "experts_skipped", "experts_used") for row in rows], "accent"),
        Series("slots dropped", [share(row, "slots_dropped", "slots") for row in rows], "strong dashed"),
    ]
    numbers = [int(found[1]) if (found := re.search(r"\.(\d+)\.", str(row.get("module")))) else -1 for row in rows]
    known = numbers if -1 not in numbers else list(range(len(rows)))
    return line_chart(known, series, "Share of experts skipped and of routing slots dropped, per layer")


def held_out_shift(rows: list[Json]) -> Json | None:
    """Expert shift measured on held-out text by an evaluate stage, after everything is compressed."""
    layers = [int(number(row.get("block", row.get("layer"))) or 0) for row in rows]
    wanted = (("cr_any", "any changed", "accent"), ("cr_all", "all changed", "strong dashed"))
    series = [Series(label, [number(row.get(key)) for row in rows], style) for key, label, style in wanted]
    series = [s for s in series if any(v is not None for v in s.values)]
    if not series:
        return None
    keys = [("cr_any", "any"), ("cr_half", "half or more"), ("cr_all", "all"), ("overlap", "overlap")]
    cells = [
        {"layer": i, "cells": [percent(v) if (v := number(row.get(k))) is not None else "–" for k, _ in keys]}
        for i, row in zip(layers, rows)
    ]
    title = "Share of held-out tokens whose experts differ from the dense model's, per layer"
    return {"chart": line_chart(layers, series, title), "labels": [label for _, label in keys], "rows": cells}


def forced_table(row: Mapping[str, Any]) -> Json:
    """Perplexity of both models' weights under both models' routing, and what each change costs alone."""
    keys = (("dense", "dense_shifted"), ("compressed_unshifted", "compressed"))
    cells = [[metric_text("perplexity", number(row.get(key))) for key in line] for line in keys]
    costs = []
    for key, label in (
        ("weights_alone", "changed weights alone"),
        ("shift_alone", "changed choices alone"),
        ("both", "both"),
    ):
        value = number(row.get(key))
        if value is not None:
            text = f"{100 * value:.2f}"
            costs.append(f"{label} {signed(text) if value else '0'}\u00a0%")
    tokens = number(row.get("tokens"))
    return {"cells": cells, "costs": ", ".join(costs), "tokens": count_text(tokens) if tokens else ""}
