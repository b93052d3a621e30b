"""Stage smooth on tiny models: its model computes the same, loses less when rounded, and comes back after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.errors import RecipeError
from llmcompress.export.native import write_native
from llmcompress.models.assemble import compressed_model
from llmcompress.models.handle import ModelHandle
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.store import PackedStore
from llmcompress.stages.activations import Activations, ActivationsConfig
from llmcompress.stages.gptq import Gptq, GptqConfig
from llmcompress.stages.smooth import Smooth, SmoothConfig
from llmcompress.stages.state import RunState

RULES = {"all": {"match": ".", "bits": 8, "group_size": -1, "symmetric": True}}
IDS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(3))


def stage(**options: Any) -> Smooth:
    return Smooth("smooth", SmoothConfig(**options))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def with_outliers(tiny: Any, folder: Path, family: str) -> RunState:
    """Two channels of every norm are 64 times as large, and what reads them as much smaller: the same function."""
    state = tiny.state(folder / "plain", family)
    scales: dict[str, Any] = {}
    from llmcompress.models.smoothable import smoothable

    for _, found in smoothable(state.model.layout):
        factor = torch.ones(found.linears[0].in_features)
        factor[[1, 5]] = 1 / 64
        for name in found.makers:
            scales.setdefault(name, []).append((0, 1 / factor))
        for linear in found.linears:
            scales.setdefault(f"{linear.name}.weight", []).append((1, factor))
    state.model.rescaled(scales).dense_model(torch.bfloat16).save_pretrained(folder / "outliers")
    return RunState(model=ModelHandle.open(folder / "outliers", "float32"), calibration=state.calibration)


@pytest.mark.parametrize("family", ["mamba2", "bamba", "granitemoehybrid"])
def test_the_model_computes_the_same_and_its_rounded_inputs_lose_less(family: str, tiny: Any, tmp_path: Path) -> None:
    state = with_outliers(tiny, tmp_path, family)
    exact, layout = logits(state.model.dense_model(torch.float32)), state.model.layout
    activations = Activations("activations", ActivationsConfig())
    activations.run(state, tiny.context(tmp_path, "activations"))

    def error(state: RunState) -> float:
        store = PackedStore(tmp_path / "nothing")
        rounded = compressed_model(state.model, store, state.policies, dtype=torch.float32)
        return float((logits(rounded) - exact).norm() / exact.norm())

    before = error(state)
    events: list[Any] = []
    stage().run(state, tiny.context(tmp_path, "smooth", events))
    assert state.model.layout is layout
    assert torch.equal(logits(state.model.dense_model(torch.float32)), exact), "smoothing alone changes no bit"
    assert error(state) < 0.5 * before
    assert [e.kind for e in events].count("block_end") == len(layout.blocks)
    assert "inputs smoothed" in events[-1].data["text"]


def test_a_second_one_comes_on_top_of_the_first(tiny: Any, tmp_path: Path) -> None:
    state = with_outliers(tiny, tmp_path, "mamba2")
    expected = logits(state.model.dense_model(torch.float32))
    for name in ("first", "second"):
        stage().run(state, tiny.context(tmp_path, name))
    factors = [
        PackedStore(tmp_path / "stages" / name / "factors").read_block(0).replaced for name in ("first", "second")
    ]
    found = state.model.checkpoint.tensor("backbone.layers.0.norm.weight")
    (key,) = (name for name in factors[0] if name.endswith("in_proj"))
    source = ModelHandle.open(state.model.path).checkpoint.tensor("backbone.layers.0.norm.weight")
    assert torch.equal(found.float(), source.float() / factors[0][key] / factors[1][key])
    assert torch.equal(logits(state.model.dense_model(torch.float32)), expected)


def test_quantizing_stages_and_artifacts_get_the_rescaled_weights(tiny: Any, tmp_path: Path) -> None:
    from llmcompress import hf

    state = with_outliers(tiny, tmp_path, "mamba2")
    stage().run(state, tiny.context(tmp_path, "smooth"))
    Gptq("quantize", GptqConfig(rules=RULES)).run(state, tiny.context(tmp_path, "quantize"))
    name = state.model.layout.blocks[0].scan.module
    packed = state.packed.read_block(0).packed[f"{name}.out_proj"]
    from llmcompress.quant.codecs import codec

    decoded = codec("int_group").decode(packed)
    torch.testing.assert_close(
        decoded, state.model.checkpoint.tensor(f"{name}.out_proj.weight").float(), atol=0.02, rtol=0.02
    )
    write_native(state.model, state.packed, {}, tmp_path / "artifact", {})
    loaded, _ = hf.load(tmp_path / "artifact")
    assert torch.equal(
        loaded.get_parameter(f"{name}.norm.weight"), state.model.checkpoint.tensor(f"{name}.norm.weight")
    )
    compressed = compressed_model(state.model, state.packed, {}, dtype=torch.bfloat16)
    assert torch.equal(logits(loaded.requires_grad_(False)), logits(compressed.requires_grad_(False)))


def test_it_goes_on_after_a_kill_and_restores(tiny: Any, tmp_path: Path) -> None:
    whole = with_outliers(tiny, tmp_path, "bamba")
    source = whole.model
    stage(alpha=0.75).run(whole, tiny.context(tmp_path / "a", "smooth"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for path in (tmp_path / "b" / "stages" / "smooth" / "factors").glob("00001*"):
        path.unlink()
    again = RunState(model=source, calibration=whole.calibration)
    stage(alpha=0.75).run(again, tiny.context(tmp_path / "b", "smooth"))
    restored = RunState(model=source)
    stage(alpha=0.75).restore(restored, tiny.context(tmp_path / "b", "smooth"))
    for view in source.layout.tensors():
        wanted = whole.model.checkpoint.tensor(view.name)
        assert torch.equal(again.model.checkpoint.tensor(view.name), wanted), view.name
        assert torch.equal(restored.model.checkpoint.tensor(view.name), wanted), view.name


def test_refusals(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mamba2")
    bare = RunState(model=state.model)
    with pytest.raises(RecipeError, match="needs calibration data"):
        stage().run(bare, tiny.context(tmp_path, "smooth"))
    Gptq("quantize", GptqConfig(rules=RULES)).run(state, tiny.context(tmp_path, "quantize"))
    with pytest.raises(AssertionError, match="refuses this stage"):
        stage().run(state, tiny.context(tmp_path, "smooth"))
    ungated = layout_from_config({"model_type": "nemotron_h", "layers_block_type": ["moe"]})
    assert "can be rescaled exactly" in stage().check(ungated)[0]
