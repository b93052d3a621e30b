"""The report's section on recurrent states: how long heads remember, what low bits cost them, memory by batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from llmcompress.report.number_text import bytes_text
from llmcompress.units import natural_order

Json = dict[str, Any]


def states_section(entry: Mapping[str, Any]) -> Json:
    """Rows for the template from what the ``dsq`` stage wrote.

    Args:
        entry: ``policy``, ``heads`` (mixer → half-lives, errors) and ``memory`` (one entry per batch size).
    """
    policy: Mapping[str, Any] = entry.get("policy") or {}
    rows = []
    # JSON is written in the order of names, in which layer 10 comes before layer 2
    for mixer, measured in sorted((entry.get("heads") or {}).items(), key=lambda item: natural_order(item[0])):
        lives = [math.inf if life is None else float(life) for life in measured["half_lives"]]
        errors = [float(error) for error in measured["errors"]]
        bits = (policy.get("head_bits") or {}).get(mixer) or [policy.get("bits", 16)] * len(lives)
        rows.append(
            {
                "mixer": mixer,
                "heads": len(lives),
                "bits": f"{sum(bits) / len(bits):.2f}",
                "middle": life_text(sorted(lives)[len(lives) // 2]),
                "longest": life_text(max(lives)),
                "error": f"{sum(errors) / len(errors):.3f}",
                "worst": f"{max(errors):.3f}",
            }
        )
    memory = [
        {
            "batch": row["batch"],
            "weights": bytes_text(row["weights"]),
            "states": bytes_text(row["states"] + row["convolution"]),
            "total": bytes_text(row["weights"] + row["states"] + row["convolution"]),
            "float": bytes_text(row["weights"] + row["float_states"] + row["convolution"]),
        }
        for row in entry.get("memory") or []
    ]
    widths = [bits for heads in (policy.get("head_bits") or {}).values() for bits in heads] or [policy.get("bits", "")]
    ends = dict.fromkeys((min(widths), max(widths)))
    return {"codec": str(policy.get("codec", "")), "bits": " to ".join(map(str, ends)), "rows": rows, "memory": memory}


def life_text(tokens: float) -> str:
    """A half-life in tokens."""
    return "never" if math.isinf(tokens) else f"{tokens:.3g}"
