"""Which implementation of an operator runs here, and why.

``LLMCOMPRESS_KERNELS`` may name one of :data:`CHOICES`; ``auto``, the default, takes the fastest
that this machine can run. Every implementation registers itself with a function that says why it
cannot run, if so.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

VARIABLE = "LLMCOMPRESS_KERNELS"
# from fastest to the definition
ORDER = ("cuda", "triton", "cpu", "reference")
CHOICES = ("auto", *ORDER)


def _always() -> str | None:
    return None


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to run an operator.

    Attributes:
        op: Operator name.
        name: One of :data:`ORDER`.
        devices: Device types it runs on; ``any`` for all.
        unavailable: Returns the reason why this machine cannot run it, or None.
    """

    op: str
    name: str
    devices: tuple[str, ...]
    unavailable: Callable[[], str | None] = _always


@dataclass(frozen=True, slots=True)
class Row:
    """One line of :func:`explain`: operator, implementation, devices, whether it is used, and why not."""

    op: str
    implementation: str
    devices: tuple[str, ...]
    used: bool
    reason: str


_REGISTERED: dict[str, list[Implementation]] = {}


def register(implementation: Implementation) -> None:
    """Add an implementation; a second one of the same operator and name replaces the first."""
    others = [i for i in _REGISTERED.get(implementation.op, []) if i.name != implementation.name]
    ranked = sorted([*others, implementation], key=lambda i: ORDER.index(i.name))
    _REGISTERED[implementation.op] = ranked


def requested() -> str:
    """The user's choice.

    Raises:
        ValueError: The environment variable holds an unknown name.
    """
    value = os.environ.get(VARIABLE, "auto") or "auto"
    if value not in CHOICES:
        raise ValueError(f"{VARIABLE}={value!r} is not one of {', '.join(CHOICES)}")
    return value


def explain(device: str = "cpu") -> list[Row]:
    """Say for every operator which implementation a call on ``device`` uses and why others do not.

    Args:
        device: ``cpu`` or ``cuda``.
    """
    wanted, rows = requested(), []
    for op in sorted(_REGISTERED):
        taken = False
        for candidate in _REGISTERED[op]:
            reason = _declined(candidate, device, wanted)
            used = not reason and not taken
            taken = taken or used
            why = reason or ("" if used else "a faster one runs")
            rows.append(Row(op, candidate.name, candidate.devices, used, why))
    return rows


def _declined(candidate: Implementation, device: str, wanted: str) -> str:
    """Why ``candidate`` is out of the question, empty when it is not."""
    if "any" not in candidate.devices and device not in candidate.devices:
        return f"runs on {', '.join(candidate.devices)} only"
    # the definition stays as the fallback of every choice
    if wanted not in ("auto", candidate.name) and candidate.name != "reference":
        return f"{VARIABLE}={wanted}"
    return candidate.unavailable() or ""
