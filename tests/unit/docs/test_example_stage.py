"""The stage that CONTRIBUTING.md shows does what it says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.models.handle import ModelHandle
from llmcompress.stages import check_stage
from llmcompress.stages.state import RunContext, RunState

PAGE = Path(__file__).resolve().parents[3] / "CONTRIBUTING.md"


def test_the_stage_of_the_page_measures_and_is_restored(tmp_path: Path) -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "outliers"}
    exec(compile(code, str(PAGE), "exec", dont_inherit=True), names)
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
