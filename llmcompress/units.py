"""Quantities as people read them."""

from __future__ import annotations


def bytes_text(count: float | None) -> str:
    """``812 B``, ``3.4 kB``, ``12 MB``, ``1.37 GB``, ``16 TB`` (powers of 1000); a dash for None."""
    if count is None:
        return "–"
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        # what rounds to 1000 belongs to the next unit
        if count >= 0.9995 * size:
            return f"{count / size:.3g} {unit}" if count < 999.5 * size else f"{count / size:.0f} {unit}"
    return f"{count:.0f} B"


def natural_order(name: str) -> list[tuple[int, str]]:
    """Key that sorts dotted names as people count: layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
