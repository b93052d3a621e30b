"""``report``: write a run's HTML page again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llmcompress.cli.command import command
from llmcompress.cli.output import Output
from llmcompress.errors import InputError


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, "report")(report)


def report(out: Output, run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of a run.")]) -> None:
    """Write report.html of a run, finished or not."""
    from llmcompress.pipeline.run_dir import RunDir
    from llmcompress.report.build import build_report

    if not RunDir(run_dir).is_run():
        raise InputError(f"{run_dir}: not a run folder (no recipe.lock.json)", "llmcompress run RECIPE")
    path = build_report(run_dir)
    out.result({"report": str(path), "bytes": path.stat().st_size}, str(path))
