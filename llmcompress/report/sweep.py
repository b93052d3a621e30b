"""``sweep.html``: quality against size of many runs, one self-contained page in the report's style."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress.durable import write_durably
from llmcompress.report.build import templates
from llmcompress.report.number_text import bytes_text, metric_text, seconds_text
from llmcompress.report.plots import Point, scatter


def build_sweep_page(data: Mapping[str, Any], root: Path) -> Path:
    """Write ``root/sweep.html``.

    Args:
        data: What ``results.json`` holds.
        root: The sweep's folder.

    Returns:
        Path of the page.
    """
    from markupsafe import Markup

    folder = Path(__file__).parent
    metric = data["metric"]
    short = metric.rsplit(".", 1)[-1] if metric else "quality"
    # one style for both pages: it lives in the run report's template
    style = re.search(r"<style>(.*?)</style>", (folder / "template.html").read_text(encoding="utf-8"), re.DOTALL)
    assert style is not None
    rows = sorted(data["runs"], key=lambda row: row["bytes"] or 0)
    known = [row for row in rows if metric in row["metrics"] and row["bytes"]]
    dense = next((row["dense"][metric] for row in known if metric in row["dense"]), None)
    points = [Point(row["name"], row["bytes"] / 1e6, row["metrics"][metric], row["pareto"]) for row in known]
    page = (
        templates()
        .get_template("sweep.html")
        .render(
            style=Markup(style.group(1)),
            name=data["recipe"],
            metric=metric,
            better="higher" if data["higher_is_better"] else "lower",
            plot=scatter(points, "weights, MB", metric, dense) if points else None,
            finished=sum(row["status"] != "failed" for row in rows),
            total=len(rows),
            dense=None if dense is None else metric_text(short, dense),
            keys=list(dict.fromkeys(key for row in rows for key in row["values"])),
            rows=[
                {
                    **row,
                    "size": bytes_text(row["bytes"]) if row["bytes"] else "–",
                    "value": metric_text(short, row["metrics"].get(metric)),
                    "time": seconds_text(row["seconds"]),
                    "peak": bytes_text(row["peak_rss_bytes"]),
                }
                for row in rows
            ],
        )
    )
    path = root / "sweep.html"
    write_durably(path, page.encode())
    return path
