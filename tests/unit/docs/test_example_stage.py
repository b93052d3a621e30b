"""The stage that CONTRIBUTING.md shows does what it says."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.models.handle import ModelHandle
from llmcompress.stages import check_stage
from llmcompress.stages.state import RunContext, RunState

PAGE = (Path(__file__).resolve().parents[3] / "CONTRIBUTING.md").read_text(encoding="utf-8")
(CODE,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)


def test_the_stage_of_the_page_measures_and_is_restored(tmp_path: Path) -> None:
    names: dict[str, Any] = {"__name__": "outliers"}
    exec(compile(CODE, "CONTRIBUTING.md", "exec", dont_inherit=True), names)
    kind = check_stage("outliers", names["Outliers"])
    stage = kind("outliers", kind.Config.model_validate({"type": "outliers", "largest": 3}))
    model = ModelHandle.open("asset:reference_moe")
    ctx = RunContext(tmp_path, "outliers", tmp_path, 0, "cpu", "float32", {}, lambda event: None)
    state, later = RunState(model), RunState(model)
    stage.run(state, ctx)
    stage.restore(later, ctx)
    assert later.metrics == state.metrics and [metric.task for metric in state.metrics] == [
        f"block{i}" for i in range(6)
    ]
    weights = [model.checkpoint.tensor(f"model.layers.2.self_attn.{name}_proj.weight").float().abs() for name in "qkvo"]
    expected = max(torch.sort(w.flatten(), descending=True).values[:3].mean() / w.mean() for w in weights)
    assert state.metrics[2].dense == pytest.approx(float(expected), rel=1e-5)


def test_the_command_beside_it_is_planned_where_the_stage_is_installed(tmp_path: Path) -> None:
    (tmp_path / "outliers.py").write_text(CODE)
    about = tmp_path / "outliers-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outliers\nVersion: 1\n")
    (about / "entry_points.txt").write_text("[llmcompress.stages]\noutliers = outliers:Outliers\n")
    (line,) = re.findall(r"`llmcompress run ([^`]*outliers[^`]*)`", PAGE)
    words = [sys.executable, "-m", "llmcompress", "plan", *shlex.split(line), "--quiet"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    # not by chance: without the package it is refused
    elsewhere = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(words, env=elsewhere, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 3 and "unknown type 'outliers'" in done.stderr
