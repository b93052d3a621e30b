"""Charts of the report as inline SVG: no libraries, direct labels, colours from the page's CSS.

Every chart is drawn twice, for a wide and for a narrow column, and the page shows one of them;
scaling one drawing would make its text unreadable on a phone. Text is escaped here, colours are
CSS classes so that light and dark need no second drawing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDE = 860
NARROW = 358


@dataclass(frozen=True, slots=True)
class Series:
    """One line of a chart: label, values per layer (None leaves a gap) and the CSS class of its stroke."""

    label: str
    values: list[float | None]
    style: str


def responsive(draw: Callable[[int], str], title: str) -> Markup:
    """Draw for both widths and wrap them; ``title`` is what a screen reader says.

    Args:
        draw: Maps a width in pixels to SVG markup without the ``svg`` element's accessibility text.
        title: One sentence that says what the chart shows.
    """
    parts = []
    for width, style in ((WIDE, "wide"), (NARROW, "narrow")):
        body = draw(width)
        parts.append(f'<div class="plot {style}" role="img" aria-label="{escape(title)}">{body}</div>')
    # safe: everything is escaped above and in the drawing functions
    return Markup("".join(parts))


def percent(value: float) -> str:
    """Share as a percentage with two or three significant digits."""
    scaled = 100 * value
    if scaled == 0:
        return "0\u00a0%"
    digits = 0 if abs(scaled) >= 10 else 1 if abs(scaled) >= 1 else 2
    return f"{scaled:.{digits}f}\u00a0%".replace("-", "−")


def nice_ticks(top: float, count: int = 4) -> list[float]:
    """Round axis values from 0 to at least ``top``."""
    if not math.isfinite(top) or top <= 0:
        return [0.0, 1.0]
    raw = top / count
    base = 10.0 ** math.floor(math.log10(raw))
    step = next(base * m for m in (1, 2, 2.5, 5, 10) if base * m >= raw * 0.999)
    return [step * i for i in range(math.ceil(top / step * 0.999) + 1)]


def _text(x: float, y: float, content: str, style: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{style}" text-anchor="{anchor}">{escape(content)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _svg(width: int, height: float, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height:.0f}" aria-hidden="true" focusable="false" '
        f'preserveAspectRatio="xMidYMid meet">{"".join(body)}</svg>'
    )


def _layer_ticks(layers: Sequence[int], room: int) -> list[int]:
    """Positions of the layers to label: first, last and round steps between."""
    if len(layers) <= room:
        return list(range(len(layers)))
    step = next(s for s in (2, 4, 5, 8, 10, 16, 20, 32, 50, 100) if len(layers) / s <= room)
    marks = list(range(0, len(layers), step))
    last = len(layers) - 1
    if last - marks[-1] < step / 2:
        marks.pop()
    return [*marks, last]


def _spread(wanted: list[float], gap: float, low: float, high: float) -> list[float]:
    """Move label positions apart so that none overlap, keeping their order."""
    order = sorted(range(len(wanted)), key=lambda i: wanted[i])
    placed = list(wanted)
    floor = low
    for i in order:
        placed[i] = max(placed[i], floor)
        floor = placed[i] + gap
    ceiling = high
    for i in reversed(order):
        placed[i] = min(placed[i], ceiling)
        ceiling = placed[i] - gap
    return placed


def line_chart(
    layers: Sequence[int], series: Sequence[Series], title: str, axis: str = "layer",
    show: Callable[[float], str] = percent,
) -> Markup:  # fmt: skip
    """Values per layer (or step) as lines with their names at the right end.

    Args:
        layers: Layer numbers along the x axis.
        series: One or more lines over them.
        title: Sentence for screen readers.
        axis: What the x axis counts.
        show: How values are written.
    """
    known = [v for s in series for v in s.values if v is not None]
    ticks = nice_ticks(max(known, default=1.0))

    def draw(width: int) -> str:
        narrow = width == NARROW
        # on a phone the names stand above the plot, where there is room for them
        head = 22.0 * len(series) + 10 if narrow else 14.0
        left, right, height = 48.0, 14.0 if narrow else 196.0, 200.0 if narrow else 270.0
        span = width - left - right
        body = []

        def x(i: int) -> float:
            return left + (span * i / max(len(layers) - 1, 1) if len(layers) > 1 else span / 2)

        def y(value: float) -> float:
            return head + height * (1 - value / ticks[-1])

        for tick in ticks:
            body += [_line(left, y(tick), width - right, y(tick), "grid")]
            body += [_text(left - 8, y(tick) + 4, show(tick), "tick", "end")]
        for i in _layer_ticks(layers, 6 if narrow else 16):
            body.append(_text(x(i), head + height + 20, str(layers[i]), "tick", "middle"))
        body.append(_text(left + span / 2, head + height + 40, axis, "tick", "middle"))
        ends = []
        for s in series:
            points = [(x(i), y(v)) for i, v in enumerate(s.values) if v is not None]
            path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
            body.append(f'<polyline points="{path}" class="line {s.style}"/>')
            for (px, py), (i, v) in zip(points, ((i, v) for i, v in enumerate(s.values) if v is not None)):
                if len(layers) <= 40:
                    tip = f"{s.label}, {axis} {layers[i]}: {show(v)}"
                    body.append(f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.2" class="dot {s.style}" {_tip(tip)}/>')
            ends.append(points[-1][1] if points else head)
        if narrow:
            for row, s in enumerate(series):
                top = 14.0 + 22 * row
                body.append(
                    f'<line x1="{left}" y1="{top - 4}" x2="{left + 26}" y2="{top - 4}" class="line {s.style}"/>'
                )
                body.append(_text(left + 34, top, s.label, f"label {s.style}"))
        else:
            for s, place in zip(series, _spread(ends, 18, head, head + height)):
                body.append(_text(width - right + 14, place + 4, s.label, f"label {s.style}"))
        return _svg(width, head + height + 50, body)

    return responsive(draw, title)


def _tip(text: str) -> str:
    return f'data-tip="{escape(text)}"'


def heat_map(layers: Sequence[int], rows: Sequence[Sequence[float]], title: str) -> Markup:
    """Share of tokens per expert, layers downwards, experts to the right; stronger is busier.

    The colour scale has two pieces, from none to the even share and from there to the busiest
    expert, so that one very busy expert does not wash out the differences among the others.

    Args:
        layers: Layer number of each row.
        rows: Per layer the share of routed tokens of each expert; a row sums to 1.
        title: Sentence for screen readers.
    """
    experts = max((len(row) for row in rows), default=1)
    even = 1 / experts
    top = max(2 * even, max((max(row, default=0.0) for row in rows), default=0.0))

    def draw(width: int) -> str:
        left, head = 40.0, 26.0
        span = width - left - 2
        cell = span / experts
        tall = max(8.0, min(30.0, 560.0 / max(len(rows), 1), max(cell, 12.0)))
        gap = 2.0 if cell > 12 else 0.5 if cell > 4 else 0.0
        body = [_text(left, 14, "expert 0", "tick"), _text(width - 2, 14, str(experts - 1), "tick", "end")]
        # thousands of tips would make the page several times larger; a finger cannot hit such cells anyway
        tips = width == WIDE or experts * len(rows) <= 2000
        marks = set(_layer_ticks(layers, max(2, int(tall * len(rows) / 18))))
        for r, row in enumerate(rows):
            y = head + r * tall
            if r in marks:
                body.append(_text(left - 8, y + tall / 2 + 4, str(layers[r]), "tick", "end"))
            for e, share in enumerate(row):
                strength = _strength(share, even, top)
                tip = f"layer {layers[r]}, expert {e}: {percent(share)} of tokens, {share / even:.2f} × even"
                body.append(
                    f'<rect x="{left + e * cell:.2f}" y="{y:.1f}" width="{max(cell - gap, 0.4):.2f}" '
                    f'height="{max(tall - gap, 1):.1f}" class="cell{"" if share > 0 else " empty"}" '
                    f'style="--v:{strength:.2f}" {_tip(tip) if tips else ""}/>'
                )
        base = head + len(rows) * tall + 26
        body.append(_text(left - 8, head - 12, "layer", "tick", "end"))
        body += _ramp(left, base, min(220.0, span), top, even)
        return _svg(width, base + 40, body)

    return responsive(draw, title)


EVEN_STRENGTH = 0.38


def _strength(share: float, even: float, top: float) -> float:
    """Colour strength in [0, 1] of a share; the even share has ``EVEN_STRENGTH``."""
    if share <= even:
        return EVEN_STRENGTH * share / even
    return min(1.0, EVEN_STRENGTH + (1 - EVEN_STRENGTH) * (share - even) / (top - even))


def _ramp(x: float, y: float, width: float, top: float, even: float) -> list[str]:
    """Legend of the heat map: the ramp with none, even share and the busiest marked."""
    steps = 40
    body = [
        f'<rect x="{x + width * i / steps:.1f}" y="{y:.1f}" width="{width / steps + 0.5:.1f}" height="10" '
        f'class="cell" style="--v:{(i + 0.5) / steps:.3f}"/>'
        for i in range(steps)
    ]
    middle = x + width * EVEN_STRENGTH
    body += [_line(middle, y - 3, middle, y + 13, "mark"), _text(x, y + 28, "none", "tick")]
    body.append(_text(middle, y + 28, "even share", "tick", "middle"))
    body.append(_text(x + width, y + 28, f"{top / even:.1f} ×", "tick", "end"))
    return body


@dataclass(frozen=True, slots=True)
class Change:
    """Before and after of one layer, and whether the change was kept."""

    layer: int
    before: float
    after: float | None
    kept: bool


def dumbbells(changes: Sequence[Change], title: str, horizontal_room: int = 24) -> Markup:
    """Before (ring) and after (dot) per layer, joined by a line.

    Args:
        changes: One entry per layer.
        title: Sentence for screen readers.
        horizontal_room: Up to this many layers, the wide drawing labels each of them.
    """
    top = max((max(c.before, c.after or 0.0) for c in changes), default=1.0)
    ticks = nice_ticks(top)

    def draw(width: int) -> str:
        narrow = width == NARROW
        left, head, right = 48.0, 34.0, 14.0
        height = 190.0 if narrow else 230.0
        span = width - left - right
        body = []

        def x(i: int) -> float:
            return left + span * (i + 0.5) / max(len(changes), 1)

        def y(value: float) -> float:
            return head + height * (1 - value / ticks[-1])

        for tick in ticks:
            body += [_line(left, y(tick), width - right, y(tick), "grid")]
            body += [_text(left - 8, y(tick) + 4, percent(tick), "tick", "end")]
        body += [f'<circle cx="{left + 6}" cy="12" r="4.5" class="ring"/>', _text(left + 17, 16, "before", "label")]
        if any(c.kept and c.after is not None for c in changes):
            body += [f'<circle cx="{left + 84}" cy="12" r="4.5" class="dot accent"/>']
            body += [_text(left + 95, 16, "after calibration", "label accent")]
        layers = [c.layer for c in changes]
        for i in _layer_ticks(layers, 6 if narrow else horizontal_room):
            body.append(_text(x(i), head + height + 20, str(layers[i]), "tick", "middle"))
        body.append(_text(left + span / 2, head + height + 40, "layer", "tick", "middle"))
        radius = 4.5 if span / max(len(changes), 1) > 12 else 3.0
        for i, change in enumerate(changes):
            tip = f"layer {change.layer}: {percent(change.before)} before"
            moved = change.after is not None and change.kept
            if change.after is not None:
                tip += f", {percent(change.after)} after" if change.kept else "; the original router was kept"
            if moved and change.after is not None:
                body.append(_line(x(i), y(change.before), x(i), y(change.after), "stem"))
            body.append(f'<circle cx="{x(i):.1f}" cy="{y(change.before):.1f}" r="{radius}" class="ring" {_tip(tip)}/>')
            if moved and change.after is not None:
                body.append(
                    f'<circle cx="{x(i):.1f}" cy="{y(change.after):.1f}" r="{radius}" class="dot accent" {_tip(tip)}/>'
                )
        return _svg(width, head + height + 50, body)

    return responsive(draw, title)


def expert_bars(rows: Sequence[tuple[int, Sequence[float]]], title: str) -> Markup:
    """Tokens of each expert, sorted from busiest to idlest, one faint line per layer and their median in front.

    Args:
        rows: ``(layer, tokens per expert)``.
        title: Sentence for screen readers.
    """
    ordered = [(layer, sorted(counts, reverse=True)) for layer, counts in rows]
    experts = max((len(counts) for _, counts in ordered), default=1)
    top = max((counts[0] for _, counts in ordered if counts), default=1.0)
    ticks = nice_ticks(top)
    median = []
    for rank in range(experts):
        column = sorted(counts[rank] for _, counts in ordered if rank < len(counts))
        median.append(column[len(column) // 2])

    def draw(width: int) -> str:
        narrow = width == NARROW
        left, head, right = 56.0, 14.0, 14.0
        height = 180.0 if narrow else 210.0
        span = width - left - right
        body = []

        def x(i: int) -> float:
            return left + span * (i + 0.5) / experts

        def y(value: float) -> float:
            return head + height * (1 - value / ticks[-1])

        for tick in ticks:
            body += [_line(left, y(tick), width - right, y(tick), "grid")]
            body += [_text(left - 8, y(tick) + 4, thousands(tick), "tick", "end")]
        for _, counts in ordered:
            path = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(counts))
            body.append(f'<polyline points="{path}" class="line faint thin"/>')
        path = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(median))
        body.append(f'<polyline points="{path}" class="line accent"/>')
        if experts <= 64:
            for i, v in enumerate(median):
                tip = f"rank {i + 1}: median {thousands(v)} tokens"
                body.append(f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="3" class="dot accent" {_tip(tip)}/>')
        body.append(_text(left, head + height + 20, "busiest expert", "tick"))
        body.append(_text(width - right, head + height + 20, "idlest", "tick", "end"))
        anchor = len(median) // 2
        body.append(_text(x(anchor), max(y(median[anchor]) - 14, head + 10), "median layer", "label accent", "middle"))
        return _svg(width, head + height + 30, body)

    return responsive(draw, title)


def thousands(value: float) -> str:
    """Count with a k or M suffix, never two different values on one axis alike."""
    for limit, suffix in ((1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.3g}{suffix}"
    return f"{value:.0f}"


@dataclass(frozen=True, slots=True)
class Point:
    """One point of a scatter plot; ``front`` are those that no other beats."""

    label: str
    x: float
    y: float
    front: bool


def _axis(values: Sequence[float], count: int = 4) -> list[float]:
    """Round values around all ``values``; not from 0, because differences are what is looked at."""
    low, high = min(values), max(values)
    room = (high - low) or abs(high) or 1.0
    step = nice_ticks(room, count)[1]
    first, last = math.floor(low / step), math.ceil(high / step)
    # two ticks at least, also around a single value
    last += first == last
    return [step * i for i in range(first, last + 1)]


def scatter(points: Sequence[Point], x_name: str, y_name: str, reference: float | None = None) -> Markup:
    """Quality against size: a ring per run, filled and joined where no other run beats it.

    Args:
        points: At least one.
        x_name: What the horizontal axis measures.
        y_name: What the vertical one does.
        reference: Quality of the dense model, a dashed line; left out where it would flatten the rest.
    """
    x_ticks, y_ticks = _axis([p.x for p in points]), _axis([p.y for p in points])
    near = 0.5 * (y_ticks[-1] - y_ticks[0])
    if reference is not None and y_ticks[0] - near <= reference <= y_ticks[-1] + near:
        y_ticks = _axis([*(p.y for p in points), reference])
    else:
        reference = None

    def draw(width: int) -> str:
        narrow = width == NARROW
        left, right, head, height = 56.0, 16.0, 26.0, 240.0 if narrow else 340.0
        span = width - left - right
        body = [_text(left, 14, y_name, "tick")]

        def x(value: float) -> float:
            return left + span * (value - x_ticks[0]) / (x_ticks[-1] - x_ticks[0])

        def y(value: float) -> float:
            return head + height * (1 - (value - y_ticks[0]) / (y_ticks[-1] - y_ticks[0]))

        for tick in y_ticks:
            body += [_line(left, y(tick), width - right, y(tick), "grid")]
            body += [_text(left - 8, y(tick) + 4, f"{tick:.4g}", "tick", "end")]
        for tick in x_ticks:
            body.append(_text(x(tick), head + height + 20, f"{tick:.4g}", "tick", "middle"))
        body.append(_text(left + span / 2, head + height + 40, x_name, "tick", "middle"))
        if reference is not None:
            body.append(f'<polyline points="{left:.1f},{y(reference):.1f} {width - right:.1f},{y(reference):.1f}" '
                        f'class="line muted dashed"/>')  # fmt: skip
            body.append(_text(width - right, y(reference) - 6, "dense", "label muted", "end"))
        front = sorted((p for p in points if p.front), key=lambda p: p.x)
        path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in front)
        body.append(f'<polyline points="{path}" class="line accent"/>')
        for p in points:
            tip = f"{p.label}: {p.x:.4g} {x_name.rsplit(', ', 1)[-1]}, {y_name} {p.y:.5g}"
            style = "dot accent" if p.front else "ring"
            body.append(f'<circle cx="{x(p.x):.1f}" cy="{y(p.y):.1f}" r="5" class="{style}" {_tip(tip)}/>')
        return _svg(width, head + height + 50, body)

    title = f"{y_name} against {x_name} of {len(points)} runs; {len([p for p in points if p.front])} are not beaten"
    return responsive(draw, title)
