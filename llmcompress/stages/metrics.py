"""Where a stage keeps what it has measured: ``metrics.json`` in its folder, read by report, resume and a second run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from llmcompress.durable import write_durably
from llmcompress.errors import InputError
from llmcompress.stages.state import Metric

FILE = "metrics.json"


def write_metrics(metrics: Sequence[Metric], stage_dir: Path) -> None:
    """Keep what a stage has measured.

    Args:
        metrics: All of it, in the order of the table.
        stage_dir: The stage's folder.
    """
    rows = [asdict(metric) for metric in metrics]
    write_durably(stage_dir / FILE, json.dumps(rows, indent=1, sort_keys=True).encode())


def read_metrics(stage_dir: Path) -> list[Metric]:
    """What a finished stage has measured.

    Args:
        stage_dir: Its folder.

    Raises:
        InputError: Its file is missing or damaged.
    """
    path = stage_dir / FILE
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot read the metrics: {error}", "delete the stage's folder and resume") from error
    return [_metric(row) for row in rows]


def _metric(row: dict[str, Any]) -> Metric:
    known = {field.name for field in fields(Metric)}
    return Metric(**{key: value for key, value in row.items() if key in known})
