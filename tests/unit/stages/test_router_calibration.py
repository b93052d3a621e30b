"""The router_calibration stage after another quantizer: an overlay that changes routers and nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcompress.errors import RecipeError
from llmcompress.models.activation_cache import ActivationCache
from llmcompress.models.assemble import compressed_model
from llmcompress.stages.router_calibration import RouterCalibration, RouterCalibrationConfig, RouterCalibrator
from llmcompress.stages.rtn import Rtn, RtnConfig

RULES = {"all": {"role": ["attention", "experts", "shared_experts", "mlp"], "bits": 3, "group_size": 16}}


def quantized(tiny, folder, family, **changes):
    state = tiny.state(folder / "model", family, **changes)
    Rtn("quantize", RtnConfig.model_validate({"rules": RULES})).run(state, tiny.context(folder))
    return state


def calibrate(tiny, state, folder, **fields):
    stage = RouterCalibration("routers", RouterCalibrationConfig(**fields))
    stage.run(state, tiny.context(folder, "routers"))
    return stage


def test_overlay_replaces_routers_only(tiny, tmp_path, moe_family):
    state = quantized(tiny, tmp_path, moe_family, samples=10)
    below = state.packed
    calibrate(tiny, state, tmp_path, guard=False)
    assert state.packed.base is below and state.packed.root != below.root
    for index, patch in state.packed.blocks():
        before = below.read_block(index)
        bank = state.model.layout.blocks[index].bank
        names = set()
        if bank is not None:
            names = {bank.router.weight} | ({f"{bank.router.module}.bias"} if bank.router.bias else set())
        assert set(patch.replaced) == names and not before.replaced
        assert set(patch.packed) == set(before.packed)
        assert patch.record.get("errors") == before.record.get("errors")
        for name, packed in patch.packed.items():
            assert all(torch.equal(t, before.packed[name].tensors[key]) for key, t in packed.tensors.items())


def test_calibrated_router_is_what_the_assembled_model_uses(tiny, tmp_path):
    state = quantized(tiny, tmp_path, "mixtral", samples=10)
    calibrate(tiny, state, tmp_path, guard=False)
    model = compressed_model(state.model, state.packed, {})
    for index, patch in state.packed.blocks():
        for name, tensor in patch.replaced.items():
            assert torch.equal(model.get_parameter(name).to(tensor.dtype), tensor), index


def test_a_router_keeps_the_type_it_has_in_the_source(tiny, tmp_path):
    tiny.state(tmp_path / "model", "mixtral", wide=".gate.weight")
    state = quantized(tiny, tmp_path, "mixtral")
    calibrate(tiny, state, tmp_path, guard=False)
    types = [tensor.dtype for _, patch in state.packed.blocks() for tensor in patch.replaced.values()]
    assert types == [torch.float32] * len(state.model.layout.blocks)


def test_held_out_shift_falls_where_the_fit_was_kept(tiny, tmp_path):
    state = quantized(tiny, tmp_path, "mixtral", samples=40)
    calibrate(tiny, state, tmp_path)
    records = [patch.record["router"] for _, patch in state.packed.blocks()]
    assert any(record["kept"] for record in records)
    for index, record in enumerate(records):
        if record["kept"]:
            assert record["after"]["overlap"] > record["before"]["overlap"]
        else:
            assert record["after"] == record["before"] and not state.packed.read_block(index).replaced


def test_resume_and_restore(tiny, tmp_path):
    state = quantized(tiny, tmp_path, "mixtral")
    below = state.packed
    stage = calibrate(tiny, state, tmp_path, guard=False)
    files = sorted(state.packed.root.glob("*.safetensors"))
    expected = [path.read_bytes() for path in files]
    files[1].unlink()
    state.packed = below
    stage.run(state, tiny.context(tmp_path, "routers"))
    assert [path.read_bytes() for path in files] == expected
    state.packed = below
    stage.restore(state, tiny.context(tmp_path, "routers"))
    assert state.packed.base is below and state.packed.finished() == {0, 1}


def test_a_budget_of_memory_moves_activations_into_files_and_changes_nothing(tiny, tmp_path, monkeypatch):
    state = quantized(tiny, tmp_path, "mixtral")
    below = state.packed
    calibrate(tiny, state, tmp_path, guard=False)
    expected = [path.read_bytes() for path in sorted(state.packed.root.glob("*.safetensors"))]
    files, in_file = [], ActivationCache._in_file
    monkeypatch.setattr(
        ActivationCache, "_in_file", lambda self, *what: files.append(what) or in_file(self, *what)
    )  # fmt: skip
    state.packed = below
    context = replace(tiny.context(tmp_path, "budget"), ram=1 << 10)
    RouterCalibration("routers", RouterCalibrationConfig(guard=False)).run(state, context)
    assert files
    assert [path.read_bytes() for path in sorted(state.packed.root.glob("*.safetensors"))] == expected


def test_needs_calibration_data(tiny, tmp_path):
    state = quantized(tiny, tmp_path, "mixtral")
    state.calibration = None
    with pytest.raises(RecipeError, match="calibration data"):
        calibrate(tiny, state, tmp_path)


def test_holdout_takes_whole_sequences_spread_over_the_set():
    def held(samples, share):
        calibrator = RouterCalibrator(None, samples, 8, share, lambda _name: torch.float32)
        return [i for i, h in enumerate(calibrator.held) if h]

    assert held(20, 0.1) == [9, 19] and held(8, 0.25) == [3, 7]
    assert held(5, 0.1) == [] and held(5, 0.0) == []


def test_estimate_needs_no_rules_and_counts_both_streams():
    import json
    from pathlib import Path

    from llmcompress.models.registry import layout_from_config
    from llmcompress.stages.base import PlanInputs

    config = json.loads((Path(__file__).parents[2] / "data/hub_configs/mixtral_8x7b.json").read_text())
    stage = RouterCalibration("routers", RouterCalibrationConfig())
    inputs = PlanInputs(layout_from_config(config), 2, 2, 128, 2048, {}, "cpu")
    estimate = stage.estimate(inputs)
    stream = 128 * 2048 * 4096 * 2
    assert estimate.ram > 2 * stream and estimate.disk == 0
