"""Runs that the S2R acceptance scripts share.

With S2R_RUNS set to a folder they are kept there: finished ones are read, broken-off ones resumed, so that they can be
made in pieces.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from harness import llmcompress

# for the verdict, whose time of running says little then
KEPT = "; runs made before were read" if os.environ.get("S2R_RUNS") else ""


@contextmanager
def runs_folder() -> Iterator[Path]:
    """Where the runs are: kept, or removed at the end."""
    kept = os.environ.get("S2R_RUNS")
    folder = Path(kept or tempfile.mkdtemp(prefix="llmcompress-s2r-"))
    folder.mkdir(exist_ok=True)
    yield folder
    if not kept:
        shutil.rmtree(folder)


def ensure(run: Path, recipe: str, *words: str) -> Path:
    """Start a run, resume it where it broke off, or leave it when it is finished; return its folder."""
    if not (run / "report.html").exists():
        begun = (run / "run.json").exists()
        llmcompress(*(["resume", run] if begun else ["run", recipe, f"run.dir={run}", *words]), "--quiet")
    return run


def taught(folder: Path, seed: int) -> Path:
    """Base and SFT of one seed; the SFT model is in ``stages/init/model``."""
    return ensure(folder / f"sft_{seed}", "s2r_tiny", "stages.reinforce~", f"run.seed={seed}")


def reinforced(folder: Path, seed: int, recipe: str, name: str) -> Path:
    """Reinforcement of that SFT model by the recipe; the model is in ``stages/reinforce/model``."""
    model = taught(folder, seed) / "stages" / "init" / "model"
    return ensure(folder / f"{name}_{seed}", recipe, f"model.path={model}", "stages.init~", f"run.seed={seed}")


def figures_of(run: Path, stage: str, name: str) -> dict[str, Any]:
    """Figures that a stage kept under a name."""
    return dict(json.loads((run / "stages" / stage / f"behaviour_{name}.json").read_text()))
