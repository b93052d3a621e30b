"""Write ``report.html``: one self-contained page about a run, from files in the run directory only."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llmcompress.durable import write_durably
from llmcompress.evaluation.significance import within_noise
from llmcompress.report.data import BlockRow, MetricRow, ReportData, StageRow, collect, dig, number
from llmcompress.report.experts import forced_table, held_out_shift, pesf_section, shift_changes, shift_section
from llmcompress.report.family import family_section
from llmcompress.report.number_text import bytes_text, count_text, is_share, metric_text, seconds_text, signed
from llmcompress.report.plots import Series, expert_bars, heat_map, line_chart, percent
from llmcompress.report.self_correction import self_correction_section
from llmcompress.report.states import states_section

Json = dict[str, Any]

# what a linear is called in the error chart, first pattern that matches its name
KINDS = (
    (r"shared_expert", "shared experts", "muted dotted"),
    (r"experts\.gate_up_proj$", "experts gate and up", "accent"),
    (r"experts\.up_proj$", "experts up", "accent"),
    (r"experts\.down_proj$", "experts down", "accent dashed"),
    (r"attn\.(o|out|dense)_proj$", "attention output", "strong dashed"),
    (r"attn\.", "attention input", "strong"),
    (r"mlp\.down_proj$", "MLP down", "muted dashed"),
    (r"", "MLP gate and up", "muted"),
)

METRIC_NAMES = {
    "acc": "accuracy",
    "acc_norm": "accuracy, length-normalised",
    "mean_acc": "mean accuracy",
    "kl": "KL divergence from dense",
    "kl_p99": "KL divergence, 99th percentile",
    "top1": "same most likely token",
    "logit_error": "relative error of logits",
    "cr_any": "tokens with a changed expert",
    "cr_half": "tokens with half or more changed",
    "cr_all": "tokens with all experts changed",
    "overlap": "chosen experts in common",
}


def templates() -> Any:
    """Where the pages of this package come from: a jinja2 environment over its folder."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def build_report(run_dir: Path) -> Path:
    """Write ``run_dir/report.html`` from what the run directory holds; missing parts are left out.

    Args:
        run_dir: Folder of a run, finished or not.

    Returns:
        Path of the page.
    """
    data = collect(run_dir)
    page = templates().get_template("template.html").render(**page_context(data), family=family_section(run_dir))
    out = run_dir / "report.html"
    write_durably(out, page.encode("utf-8"))
    return out


def page_context(data: ReportData) -> Json:
    """Everything the template needs, formatted; sections without data are None or empty."""
    quantizing = [stage for stage in data.stages if stage.blocks]
    return {
        "name": data.name,
        "model": data.model,
        "verdict": verdict(data),
        "tiles": tiles(data),
        "results": [result_row(metric) for metric in data.metrics],
        "result_stages": len({metric.stage for metric in data.metrics}) > 1,
        "gates": [gate_row(gate) for gate in data.gates],
        "failures": [stage.gate_failure for stage in data.stages if stage.gate_failure],
        "warnings": data.warnings,
        "size": size_section(data),
        "layers": [section for section in (layer_section(stage) for stage in quantizing) if section],
        "pesf": [pesf_section(entry) for entry in data.pesf],
        "states": [states_section(entry) for entry in data.states],
        "held_out_shift": held_out_shift(data.shift),
        "forced": [forced_table(row) for row in data.forced_routing],
        "self_correction": self_correction_section(data.self_correction),
        "samples": [sample_row(sample) for sample in data.samples],
        "written": written_lines(data.decoding),
        "stages": stage_rows(data.stages),
        "source": data.source,
        "recipe": recipe_text(data.recipe),
        "facts": facts(data.lock, data.run),
        "inputs": input_rows(data.lock),
        "finished": data.finished,
    }


def result_row(metric: MetricRow) -> Json:
    """One line of the results table."""
    difference, tone = "", ""
    if metric.difference is not None:
        if is_share(metric.metric):
            difference = signed(f"{100 * metric.difference:.1f}") + "\u00a0pt"
        else:
            difference = signed(f"{metric.difference:.3g}")
            if metric.relative is not None:
                difference += f" ({signed(f'{100 * metric.relative:.1f}')}\u00a0%)"
        noise = within_noise(metric.difference, metric.difference_stderr)
        if metric.higher_is_better is not None and metric.difference and not noise:
            tone = "better" if (metric.difference > 0) == metric.higher_is_better else "worse"
    spread = metric_text(metric.metric, metric.stderr) if metric.stderr is not None else ""
    return {
        "stage": metric.stage,
        "task": metric.task,
        "metric": METRIC_NAMES.get(metric.metric, metric.metric.replace("_", " ")),
        "arrow": {True: "higher is better", False: "lower is better", None: ""}[metric.higher_is_better],
        "dense": metric_text(metric.metric, metric.dense),
        "compressed": metric_text(metric.metric, metric.compressed),
        "spread": spread,
        "difference": difference or "–",
        "difference_spread": _difference_spread(metric),
        "tone": tone,
        "n": count_text(metric.n) if metric.n else "–",
    }


def _difference_spread(metric: MetricRow) -> str:
    """Standard error of the difference, and whether the difference is noise; empty where no error is known."""
    if metric.difference is None or metric.difference_stderr is None:
        return ""
    shares = is_share(metric.metric)
    error = f"± {100 * metric.difference_stderr:.1f}\u00a0pt" if shares else f"± {metric.difference_stderr:.2g}"
    return f"{error}, within noise" if within_noise(metric.difference, metric.difference_stderr) else error


def written_lines(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which engine wrote answers and samples, one line for each that wrote some."""
    parts: dict[str, list[str]] = {}
    for row in rows:
        stage = f"{row['stage']}, " if len({other["stage"] for other in rows}) > 1 else ""
        parts.setdefault(str(row["written_by"]), []).append(f"{row['part']} ({stage}{row['side']})")
    return [f"Written by {by}: {', '.join(which)}." for by, which in parts.items()]


def gate_row(gate: Mapping[str, Any]) -> Json:
    """One quality gate: name, what it demands, whether it held."""
    held = gate.get("passed", gate.get("held", gate.get("ok")))
    limit = gate.get("limit", gate.get("rule", gate.get("text", "")))
    return {
        "name": str(gate.get("gate", "")),
        "metric": str(gate.get("metric", "")),
        "limit": limit if isinstance(limit, str) else f"{number(limit):.4g}" if number(limit) is not None else "",
        "value": f"{number(gate.get('value')):.4g}" if number(gate.get("value")) is not None else "–",
        "held": bool(held),
    }


def headline_metric(data: ReportData) -> MetricRow | None:
    """The figure that leads: the first perplexity with both values, else the first such metric."""
    both = [m for m in data.metrics if m.dense is not None and m.compressed is not None]
    return next((m for m in both if "perplexity" in m.metric), both[0] if both else None)


def verdict(data: ReportData) -> str:
    """One sentence that sums up the run."""
    parts = []
    if data.size is not None and data.size.code_average is not None:
        ratio = data.size.original / max(data.size.stored, 1)
        parts.append(
            f"{bytes_text(data.size.stored)} instead of {bytes_text(data.size.original)}, {ratio:.1f} times smaller"
        )
    lead = headline_metric(data)
    if lead is not None and lead.dense is not None and lead.compressed is not None:
        row = result_row(lead)
        parts.append(f"{lead.task} {row['metric']} goes from {row['dense']} to {row['compressed']}")
    if not parts:
        return "No evaluation or packed weights yet." if data.stages else "This folder holds no finished stage yet."
    text = "; ".join(parts) + "."
    return text[0].upper() + text[1:]


def tiles(data: ReportData) -> list[Json]:
    """The figures that open the page."""
    found: list[Json] = []
    size = data.size
    if size is not None:
        note = f"{bytes_text(size.original)} before" if size.code_average is not None else ""
        found.append({"label": "Size of all tensors", "value": bytes_text(size.stored), "note": note})
        if size.code_average is not None and size.all_in_average is not None:
            found.append(
                {
                    "label": "Bits per weight",
                    "value": f"{size.code_average:.2f}",
                    "note": f"{size.all_in_average:.2f} with scales and zeros",
                }
            )
    lead = headline_metric(data)
    if lead is not None:
        row = result_row(lead)
        found.append(
            {
                "label": f"{lead.task} {row['metric']}",
                "value": row["compressed"],
                "note": f"{row['dense']} dense, {row['difference']}",
            }
        )
    for wanted, label in (("top1", "Same next token as dense"), ("kl", "KL from dense, nats")):
        metric = next((m for m in data.metrics if m.metric.startswith(wanted) and m.compressed is not None), None)
        if metric is not None and len(found) < 4:
            text = (
                percent(metric.compressed or 0) if wanted == "top1" else metric_text(metric.metric, metric.compressed)
            )
            found.append(
                {"label": label, "value": text, "note": f"over {count_text(metric.n)} tokens" if metric.n else ""}
            )
    return found


def size_section(data: ReportData) -> Json | None:
    """Where the bytes are, and the files of each artifact."""
    if data.size is None:
        return None
    size = data.size
    biggest = max(size.bytes.values())
    rows = [
        {
            "part": part,
            "bytes": bytes_text(count),
            "share": percent(count / size.stored),
            "width": 100 * count / biggest,
        }
        for part, count in sorted(size.bytes.items(), key=lambda item: -item[1])
    ]
    return {
        "rows": rows,
        "codes": f"{size.code_average:.3f}" if size.code_average is not None else "–",
        "all_in": f"{size.all_in_average:.3f}" if size.all_in_average is not None else "–",
        "artifacts": [(name, bytes_text(count)) for name, count in data.artifacts],
    }


def kind_of(name: str) -> tuple[str, str]:
    """Label and line style of a weight in the error chart."""
    return next((label, style) for pattern, label, style in KINDS if re.search(pattern, name))


def layer_section(stage: StageRow) -> Json | None:
    """Charts of one quantizing stage."""
    errors = error_chart(stage.blocks)
    routing = [(b.index, b.tokens) for b in stage.blocks if sum(b.tokens) > 0]
    changes = shift_changes(stage.blocks)
    if not (errors or routing or changes):
        return None
    section: Json = {"stage": stage.name, "type": stage.type, "errors": errors, "use": None, "shift": None}
    if routing:
        rows = [[t / sum(tokens) for t in tokens] for _, tokens in routing]
        idle = sum(1 for _, tokens in routing for t in tokens if t == 0)
        fewest = min(min(tokens) for _, tokens in routing)
        title = f"Share of tokens each expert received in {len(rows)} layers during calibration"
        counts = "Tokens per expert, sorted, one line per layer"
        section["use"] = {
            "map": heat_map([i for i, _ in routing], rows, title),
            "bars": expert_bars(routing, counts),
            "idle": f"{idle} expert{'s' if idle != 1 else ''} saw no token at all (outlined)." if idle else "",
            "fewest": count_text(fewest),
            "table": [
                {"layer": i, "cells": [f"{t:.0f}" for t in tokens]} for i, tokens in routing if len(tokens) <= 64
            ],
        }
    if changes:
        section["shift"] = shift_section(stage.blocks, changes)
    return section


def error_chart(blocks: list[BlockRow]) -> Json | None:
    """Relative output error per layer by kind of weight."""
    table: dict[str, dict[int, list[float]]] = {}
    styles = {}
    for block in blocks:
        for name, value in block.errors.items():
            label, styles[label] = kind_of(name)
            table.setdefault(label, {}).setdefault(block.index, []).append(value)
    if not table:
        return None
    layers = [block.index for block in blocks]
    series = []
    for label, by_layer in table.items():
        means = [sum(by_layer[i]) / len(by_layer[i]) if i in by_layer else None for i in layers]
        series.append(Series(label, means, styles[label]))
    rows = [
        {"layer": layer, "cells": ["–" if s.values[i] is None else percent(s.values[i] or 0.0) for s in series]}
        for i, layer in enumerate(layers)
    ]
    chart = line_chart(layers, series, "Relative output error per layer: " + ", ".join(s.label for s in series))
    return {"chart": chart, "labels": [s.label for s in series], "rows": rows}


def sample_row(sample: Mapping[str, Any]) -> Json:
    """A prompt with both continuations."""
    return {key: str(sample.get(key) or "").strip() for key in ("prompt", "dense", "compressed")}


def stage_rows(stages: Iterable[StageRow]) -> list[Json]:
    """Time and memory per stage with bar widths."""
    rows = list(stages)
    known = [s for s in rows if s.peak_bytes is not None]
    longest = max((s.seconds or 0.0 for s in rows), default=0.0)
    highest = max((s.peak_bytes or 0.0 for s in rows), default=0.0)
    return [
        {
            "name": s.name,
            "type": s.type,
            "status": s.status,
            "seconds": seconds_text(s.seconds) if s.seconds is not None else "–",
            "time_width": 100 * (s.seconds or 0.0) / longest if longest else 0.0,
            "peak": bytes_text(s.peak_bytes) if s.peak_bytes is not None else "–",
            "peak_width": 100 * (s.peak_bytes or 0.0) / highest if highest else 0.0,
            "has_peak": bool(known),
            "per_block": block_time(s),
        }
        for s in rows
    ]


def block_time(stage: StageRow) -> str:
    """Mean time per layer of a quantizing stage."""
    known = [b.seconds for b in stage.blocks if b.seconds is not None]
    return f"{seconds_text(sum(known) / len(known))} per layer" if known else ""


def recipe_text(recipe: Json) -> str:
    """The resolved recipe as YAML."""
    import yaml

    return yaml.safe_dump(_set_only(recipe), sort_keys=False, allow_unicode=True, width=100) if recipe else ""


def _set_only(value: Any) -> Any:
    """Leave out what is not set, for reading."""
    if isinstance(value, Mapping):
        kept = {key: _set_only(item) for key, item in value.items()}
        return {key: item for key, item in kept.items() if item is not None and item not in ({}, [], "")}
    return [_set_only(item) for item in value] if isinstance(value, list) else value


def facts(lock: Json, run: Json) -> list[tuple[str, str]]:
    """Versions, hashes and machine from the lock and the run's record, flattened to label and text."""
    found: dict[str, str] = {}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, item in value.items():
                walk(f"{prefix} {key}".strip().replace("_", " "), item)
        elif isinstance(value, list):
            found[prefix] = ", ".join(str(item) for item in value)
        elif value is not None:
            found[prefix] = str(value)

    for key in ("device", "dtype", "threads", "versions"):
        walk("" if key == "versions" else key, run.get(key))
    for key, value in lock.items():
        if key in ("versions", "git", "hardware", "recipe_sha256"):
            walk("" if key == "versions" else key, value)
    if "hardware ram bytes" in found:
        found["hardware ram"] = bytes_text(float(found.pop("hardware ram bytes")))
    return list(found.items())


def input_rows(lock: Json) -> list[Json]:
    """Files the run read, with the beginning of their hashes."""
    rows = []
    for where, entry in (lock.get("inputs") or {}).items():
        for name, file in (entry.get("files") or {}).items() if isinstance(entry, Mapping) else ():
            size = number(dig(file, "bytes"))
            rows.append(
                {
                    "where": where,
                    "name": name,
                    "bytes": bytes_text(size) if size is not None else "–",
                    "hash": str(dig(file, "sha256") or "–")[:16],
                }
            )
    return rows
