from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from llmcompress.report.plots import Point, scatter
from llmcompress.report.sweep import build_sweep_page


def row(name: str, size: int | None, value: float | None, pareto: bool = False) -> dict[str, Any]:
    return {
        "name": name, "values": {"stages.q.bits": name}, "status": "failed" if value is None else "finished",
        "bytes": size, "metrics": {} if value is None else {"text.perplexity": value}, "pareto": pareto,
        "dense": {} if value is None else {"text.perplexity": 4.0}, "seconds": 3.0, "peak_rss_bytes": 10**9,
        "error": "",
    }  # fmt: skip


def test_page_is_self_contained_and_shows_every_run(tmp_path: Path) -> None:
    rows = [
        row("<2>", 2_000_000, 9.25, True),
        row("3", 3_000_000, 5.5, True),
        row("4", 5_000_000, 6.5),
        row("5", None, None),
    ]
    data = {"recipe": "tiny", "metric": "text.perplexity", "higher_is_better": False, "runs": rows}
    page = build_sweep_page(data, tmp_path).read_text()
    assert "&lt;2&gt;" in page and "<2>" not in page
    assert page.count("best at its size") == 2
    assert "3 of 4 runs finished" in page and "9.250" in page
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "--accent" in page


def test_points_lie_where_their_values_are() -> None:
    drawn = scatter([Point("a", 1.0, 10.0, True), Point("b", 2.0, 5.0, True), Point("c", 3.0, 7.5, False)], "MB", "ppl")
    wide = drawn.split('class="plot narrow"')[0]
    circles = re.findall(r'<circle cx="([0-9.]+)" cy="([0-9.]+)" r="5" class="([a-z ]+)" data-tip="([a-c])', wide)
    places = {label: (float(x), float(y), style) for x, y, style, label in circles}
    assert places["a"][0] < places["b"][0] < places["c"][0]
    assert places["a"][1] < places["c"][1] < places["b"][1]
    middle = (places["a"][0] + places["c"][0]) / 2
    assert abs(places["b"][0] - middle) < 0.2
    assert places["c"][2] == "ring" and places["a"][2] == "dot accent"


def test_one_point_and_a_far_reference_are_drawn() -> None:
    assert "dense" not in scatter([Point("a", 1.0, 10.0, True)], "MB", "ppl", 1000.0)
    assert "dense" in scatter([Point("a", 1.0, 10.0, True)], "MB", "ppl", 9.5)
