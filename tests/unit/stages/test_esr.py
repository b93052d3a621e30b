"""The esr stage on tiny random models: overlay, resume, hybrids, rollback, refusals."""

from __future__ import annotations

import json

import pytest
import torch

from llmcompress.algorithms.state_reconstruction import Rounder
from llmcompress.errors import RecipeError
from llmcompress.models.assemble import compressed_model
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.esr import Esr, EsrConfig
from llmcompress.stages.rtn import Rtn, RtnConfig

FAST = {
    "epochs": 2,
    "batch_size": 8,
    "token_warmup": 2,
    "train": ["selective"],
    "lr": {"selective": 3e-3, "dt_bias": 3e-3},
}
POLICY = {"bits": 4, "codec": "dsq"}
RULES = {"all": {"match": ".", "bits": 3, "group_size": 16}}


def run(tiny, folder, family="mamba2", weights=False, **fields):
    state = tiny.state(folder / "model", family, samples=32)
    state.policies["state_cache"] = POLICY
    if weights:
        Rtn("quantize", RtnConfig.model_validate({"rules": RULES})).run(state, tiny.context(folder))
    stage = Esr("esr", EsrConfig(**{**FAST, **fields}))
    stage.run(state, tiny.context(folder, "esr"))
    return state, stage


@pytest.mark.parametrize("family", ["mamba2", "bamba", "granitemoehybrid", "falcon_h1", "nemotron_h", "zamba2"])
def test_only_the_mixers_change_and_the_loss_falls(tiny, tmp_path, family):
    # random models have little that tuning could repair, so give them coarse weights
    state, _ = run(tiny, tmp_path, family, weights=True)
    kept = 0
    for block in state.model.layout.blocks:
        patch = state.packed.read_block(block.index)
        if block.scan is None:
            assert not patch.replaced
            continue
        record = patch.record["esr"]
        assert record["after"] <= record["before"]
        assert bool(patch.replaced) == record["kept"]
        assert all(name.startswith(f"{block.scan.module}.") for name in patch.replaced)
        kept += record["kept"]
    assert kept
    model = compressed_model(state.model, state.packed, {})
    for _, patch in state.packed.blocks():
        for name, tensor in patch.replaced.items():
            assert torch.equal(model.get_parameter(name).to(tensor.dtype), tensor)


def test_trained_values_keep_the_type_they_have_in_the_source(tiny, tmp_path):
    tiny.state(tmp_path / "model", "mamba2", wide="A_log")
    state, _ = run(tiny, tmp_path, rollback=False)
    for _, patch in state.packed.blocks():
        types = {name.rpartition(".")[2]: tensor.dtype for name, tensor in patch.replaced.items()}
        assert types["A_log"] == torch.float32 and types["dt_bias"] == torch.bfloat16


def test_quantized_projections_stay_as_they_are(tiny, tmp_path):
    state, _ = run(tiny, tmp_path, weights=True)
    for index, patch in state.packed.blocks():
        below = state.packed.base.read_block(index)
        assert set(patch.packed) == set(below.packed) and patch.packed
        assert not any("proj" in name for name in patch.replaced)


def test_a_killed_run_ends_in_the_same_bytes(tiny, tmp_path):
    state, stage = run(tiny, tmp_path, weights=True)
    files = sorted(state.packed.root.glob("*.safetensors"))
    expected = [path.read_bytes() for path in files]
    below = state.packed.base
    files[-1].unlink()
    state.packed = below
    stage.run(state, tiny.context(tmp_path, "esr"))
    assert [path.read_bytes() for path in files] == expected
    state.packed = below
    stage.restore(state, tiny.context(tmp_path, "esr"))
    assert state.packed.base is below


def test_a_hopeless_block_is_rolled_back(tiny, tmp_path):
    state, _ = run(tiny, tmp_path, lr={"selective": 50.0, "dt_bias": 50.0}, bound=100.0)
    for index, patch in state.packed.blocks():
        assert not patch.record["esr"]["kept"], index
        assert not patch.replaced
    json.dumps([patch.record for _, patch in state.packed.blocks()])


def test_both_engines_agree(tiny, tmp_path):
    records = {}
    for engine in ("inject", "fused"):
        state, _ = run(tiny, tmp_path / engine, engine=engine, epochs=1, memory_mb=1)
        records[engine] = [patch.record["esr"]["after"] for _, patch in state.packed.blocks()]
    assert records["inject"] == pytest.approx(records["fused"], rel=2e-2)


def test_refusals(tiny, tmp_path):
    state = tiny.state(tmp_path / "a", "mamba2", samples=4)
    stage = Esr("esr", EsrConfig())
    with pytest.raises(RecipeError, match="no stage before it quantizes states"):
        stage.run(state, tiny.context(tmp_path, "esr"))
    state.policies["state_cache"] = POLICY
    state.calibration = None
    with pytest.raises(RecipeError, match="needs calibration data"):
        stage.run(state, tiny.context(tmp_path, "esr"))
    layout = tiny.state(tmp_path / "b", "mixtral", samples=4).model.layout
    assert "no Mamba-2 layers" in stage.check(layout)[0]


def test_the_estimate_grows_with_the_work(tiny, tmp_path):
    layout = tiny.state(tmp_path / "a", "mamba2", samples=4).model.layout
    small = PlanInputs(layout, 2, 4, 4, 16, {}, "cpu")
    large = PlanInputs(layout, 2, 4, 64, 16, {}, "cpu")
    stage = Esr("esr", EsrConfig())
    assert 0 < stage.estimate(small).ram < stage.estimate(large).ram
    assert stage.estimate(large).flops > stage.estimate(small).flops > 0


def test_the_kernel_is_used_where_it_knows_the_codec():
    from llmcompress.quant.states import StateSpec

    assert Rounder(StateSpec(bits=4)).has_kernel
    assert Rounder(StateSpec(bits=16, codec="none")).has_kernel
    assert Rounder(StateSpec(bits=4, rounding="dither")).has_kernel
    assert not Rounder(StateSpec(bits=4, rounding="stochastic")).has_kernel
    assert not Rounder(StateSpec(bits=4, codec="per_channel")).has_kernel
    assert not Rounder(StateSpec(bits=4, sqrt_axis="state")).has_kernel
