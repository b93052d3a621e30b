"""Events: what a run tells the world while it works. Sinks live in pipeline/sinks.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

EventKind = Literal[
    "run_start", "run_end", "stage_start", "stage_end", "stage_skip", "block_start", "block_end",
    "metric", "note", "warning",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What sort of thing.
        stage: Name of the stage in the recipe, empty for run-level events.
        data: JSON-serialisable details. ``block_start`` and ``block_end`` carry ``index`` and ``total``;
            ``metric`` carries ``name``, ``value`` and optional ``step``; ``note`` and ``warning`` carry ``text``.
        time: Unix seconds.
    """

    kind: EventKind
    stage: str = ""
    data: dict[str, Any] = field(default_factory=dict)
    time: float = field(default_factory=time.time)


Emit = Callable[[Event], None]


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``5 h 02 min``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
