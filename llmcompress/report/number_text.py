"""Numbers as people read them: sizes, durations, counts, metrics."""

from __future__ import annotations

from llmcompress import units

# metrics whose names begin with one of these, or hold it, lie between 0 and 1
SHARES = ("acc", "top1", "agreement", "overlap", "cr_", "exact_match", "skipped", "dropped", "share")


def bytes_text(value: float) -> str:
    """Size in decimal units, as disks and papers count; a line does not break before the unit."""
    return units.bytes_text(value).replace(" ", "\u00a0")


def seconds_text(value: float) -> str:
    """Duration for people."""
    if value >= 3600:
        return f"{int(value // 3600)} h {int(value % 3600 // 60):02d} min"
    if value >= 60:
        return f"{int(value // 60)} min {int(value % 60):02d} s"
    return f"{value:.1f} s" if value >= 1 else f"{1000 * value:.0f} ms"


def count_text(value: float) -> str:
    """Count with thin spaces between thousands."""
    return f"{value:,.0f}".replace(",", "\u202f")


def metric_text(metric: str, value: float | None) -> str:
    """Value of a metric in its usual form."""
    if value is None:
        return "–"
    if is_share(metric):
        return f"{100 * value:.1f}\u00a0%"
    if "perplexity" in metric or metric == "ppl":
        return f"{value:.3f}" if value < 1000 else f"{value:.4g}"
    return f"{value:.4g}"


def is_share(metric: str) -> bool:
    """Whether a metric lies between 0 and 1 and is read as a percentage."""
    return any(metric.startswith(word) or word in metric for word in SHARES)


def signed(text: str) -> str:
    """Put a plus or a true minus before a formatted number."""
    return f"−{text[1:]}" if text.startswith("-") else f"+{text}"
