from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from llmcompress.errors import RecipeError
from llmcompress.quant.codecs.int_group import decode
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.gptq import Gptq, GptqConfig


def stage(**values: Any) -> Gptq:
    return Gptq("quantize", GptqConfig.model_validate(values))


def rules(layout: Any, bits: int, **values: Any) -> dict[str, Any]:
    roles = sorted({str(role) for _, role, _, _ in layout.quantizable()})
    return {"all": {"role": roles, "bits": bits, "group_size": 16, **values}}


def test_eight_bits_leave_the_outputs_alone(moe_family: str, tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", moe_family)
    stage(rules=rules(state.model.layout, 8)).run(state, tiny.context(tmp_path))
    plan = state.packed.plan()
    assert set(plan) == {name for name, *_ in state.model.layout.quantizable()}
    for _, patch in state.packed.blocks():
        assert set(patch.record["errors"]) == set(patch.packed)
        # relative output error, squared
        assert all(error < 1e-4 for error in patch.record["errors"].values())
        assert all(torch.isfinite(decode(packed)).all() for packed in patch.packed.values())


@pytest.mark.parametrize("bits", [2, 3])
def test_beats_rounding_on_the_inputs_it_saw(bits: int, tiny: Any, tmp_path: Path) -> None:
    errors = {}
    for name, damp in (("gptq", 0.01), ("almost_rounding", 0.99)):
        state = tiny.state(tmp_path / "model", "mixtral", samples=24)
        settings = {"rules": rules(state.model.layout, bits), "damp": damp, "diagnose_experts": False}
        stage(**settings).run(state, tiny.context(tmp_path / name))
        records = [patch.record["errors"] for _, patch in state.packed.blocks()]
        errors[name] = sum(sum(record.values()) for record in records)
    assert errors["gptq"] < errors["almost_rounding"]


def test_settings_reach_the_solver(tiny: Any, tmp_path: Path) -> None:
    made = {}
    for name, values in {
        "plain": {},
        "static": {"static_groups": True},
        "ordered": {"static_groups": True, "act_order": True},
        "minmax": {"grid": "minmax"},
        "damped": {"damp": 0.5},
        "affinity": {"rare_experts": {"weighting": "affinity"}},
    }.items():
        state = tiny.state(tmp_path / "model", "mixtral")
        stage(rules=rules(state.model.layout, 3), diagnose_experts=False, **values).run(
            state, tiny.context(tmp_path / name)
        )
        packed = state.packed.read_block(1).packed["model.layers.1.mlp.experts.down_proj"]
        made[name] = packed.tensors["weight_packed"].flatten().tolist()
    assert len({tuple(codes) for codes in made.values()}) == len(made)


def test_needs_data_and_sane_settings(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    state.calibration = None
    with pytest.raises(RecipeError, match="needs calibration data"):
        stage(rules=rules(state.model.layout, 4)).run(state, tiny.context(tmp_path))
    with pytest.raises(ValidationError, match="act_order needs static_groups"):
        GptqConfig.model_validate({"rules": {"a": {"role": "mlp", "bits": 4}}, "act_order": True})
    with pytest.raises(ValidationError, match="at least 1"):
        GptqConfig.model_validate({"rules": {}})


def test_estimate_grows_with_data_and_second_stream(tiny: Any) -> None:
    from llmcompress.models.registry import layout_from_config

    layout = layout_from_config(tiny.config("mixtral").to_dict())
    one = stage(rules=rules(layout, 4), diagnose_experts=False)
    two = stage(rules=rules(layout, 4), diagnose_experts=True)
    inputs = [PlanInputs(layout, 2, 4, samples, 64, {}, "cpu") for samples in (16, 32)]
    small, large = (one.estimate(i) for i in inputs)
    assert 0 < small.ram < large.ram
    assert small.flops < large.flops
    assert two.estimate(inputs[0]).ram - small.ram == 16 * 64 * 32 * 4
    gpu = one.estimate(PlanInputs(layout, 2, 2, 16, 64, {}, "cuda"))
    assert gpu.vram > 0
    # a bank that the compute type does not hold exactly is read a second time
    (bank,) = {block.bank.shape(block.bank.gate_up) for block in layout.blocks}
    again = one.estimate(PlanInputs(layout, 2, 2, 16, 64, {}, "cuda", exact=False))
    assert again.vram - gpu.vram == 2 * prod(bank)
