from __future__ import annotations

import itertools
import re
from xml.etree import ElementTree

import pytest

from llmcompress.report.plots import (
    EVEN_STRENGTH,
    NARROW,
    WIDE,
    Change,
    Series,
    dumbbells,
    expert_bars,
    heat_map,
    line_chart,
    nice_ticks,
    percent,
)


def parse(markup: str) -> ElementTree.Element:
    """Both drawings must be well-formed XML."""
    return ElementTree.fromstring(f"<div>{markup}</div>")


def test_ticks_cover_the_data_and_are_round() -> None:
    assert nice_ticks(0.117) == pytest.approx([0, 0.05, 0.1, 0.15])
    assert nice_ticks(1.0)[-1] >= 1.0
    assert nice_ticks(0.0) == [0.0, 1.0]
    for top in (3e-7, 0.0123, 0.999, 17, 65536):
        ticks = nice_ticks(top)
        assert 3 <= len(ticks) <= 7
        assert ticks[-1] >= top * 0.99


def test_percent_keeps_two_digits_where_it_matters() -> None:
    assert [percent(v) for v in (0, 0.00123, 0.0123, 0.123, 1)] == [
        "0\u00a0%", "0.12\u00a0%", "1.2\u00a0%", "12\u00a0%", "100\u00a0%",
    ]  # fmt: skip


def test_every_chart_is_drawn_for_both_widths_with_a_text_alternative() -> None:
    charts = [
        line_chart([0, 1], [Series("a", [0.1, None], "accent")], "Line of a"),
        heat_map([0], [[0.25, 0.75]], "Heat"),
        dumbbells([Change(0, 0.2, 0.1, True)], "Shift"),
        expert_bars([(0, [5, 1])], "Bars"),
    ]
    for chart in charts:
        wide, narrow = parse(chart)
        for drawing, width in ((wide, WIDE), (narrow, NARROW)):
            assert drawing.attrib["role"] == "img"
            assert drawing.attrib["aria-label"]
            assert drawing[0].attrib["viewBox"].split()[2] == str(width)


def test_text_is_escaped() -> None:
    chart = line_chart([0, 1], [Series("<b>&\"'", [0.1, 0.2], "accent")], '"><script>')
    parse(chart)
    assert "<b>" not in chart
    assert "<script>" not in chart


def test_heat_map_colours_follow_the_shares() -> None:
    chart = heat_map([3], [[0.0, 0.25, 0.5, 0.25]], "Heat")
    cells = re.findall(r'class="cell( empty)?" style="--v:([\d.]+)" data-tip="layer 3, expert (\d)', chart)[:4]
    assert [(bool(empty), float(strength)) for empty, strength, _ in cells] == [
        (True, 0.0), (False, EVEN_STRENGTH), (False, 1.0), (False, EVEN_STRENGTH),
    ]  # fmt: skip


def test_labels_of_lines_never_overlap() -> None:
    series = [Series(f"line {i}", [0.1, 0.1 + 1e-4 * i], "accent") for i in range(5)]
    wide = str(line_chart([0, 1], series, "Lines")).split('class="plot narrow"')[0]
    places = sorted(float(y) for y in re.findall(r'y="([\d.]+)" class="label', wide))
    assert len(places) == 5
    assert min(b - a for a, b in itertools.pairwise(places)) >= 17.9


def test_nothing_is_drawn_outside_the_picture() -> None:
    series = [Series("error", [0.02 * i for i in range(60)], "accent")]
    for width, part in zip((WIDE, NARROW), parse(line_chart(list(range(60)), series, "Many layers"))):
        for element in part.iter():
            for key in ("x", "cx", "x1", "x2"):
                assert 0 <= float(element.attrib.get(key, 0)) <= width
