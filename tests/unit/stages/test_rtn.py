from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.models.orientation import canonical
from llmcompress.quant.codecs.int_group import unpack_parts
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.rtn import Rtn, RtnConfig

RULES = {"all": {"role": ["attention", "experts", "shared_experts", "mlp"], "bits": 4, "group_size": 16}}


def stage(**values: Any) -> Rtn:
    return Rtn("quantize", RtnConfig.model_validate({"rules": RULES, **values}))


def present(layout: Any) -> dict[str, Any]:
    roles = sorted({str(role) for _, role, _, _ in layout.quantizable()})
    return {"rules": {"all": {"role": roles, "bits": 4, "group_size": 16}}}


def test_every_weight_is_rounded_as_the_plain_functions_do(moe_family: str, tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", moe_family)
    state.calibration = None
    quantizer = stage(**present(state.model.layout))
    assert quantizer.check(state.model.layout) == []
    quantizer.run(state, tiny.context(tmp_path))
    banks = {n: b for block in state.model.layout.blocks if (b := block.bank) for n in (b.gate_up, b.down)}
    names = []
    for _, patch in state.packed.blocks():
        for name, packed in patch.packed.items():
            names.append(name)
            bank = banks.get(name)
            dense = state.model.checkpoint.tensor(name if bank else f"{name}.weight")
            dense = (canonical(bank, name, dense) if bank else dense).float()
            dense = dense[..., : dense.shape[-2] - packed.spec.dense_rows, :]
            scale, zero = find_grid(dense, packed.spec, "minmax")
            codes, stored_scale, stored_zero = unpack_parts(packed)
            assert torch.equal(stored_scale, scale)
            assert stored_zero is not None
            assert zero is not None
            assert torch.equal(stored_zero, zero)
            assert torch.equal(codes, round_codes(dense, scale, zero, packed.spec))
        assert all(0 < error < 0.05 for error in patch.record["errors"].values())
    assert sorted(names) == sorted(name for name, *_ in state.model.layout.quantizable())


def test_shift_is_recorded_when_there_is_data(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    stage(rules={"e": {"role": "experts", "bits": 2, "group_size": 16}}).run(state, tiny.context(tmp_path))
    records = [patch.record for _, patch in state.packed.blocks()]
    assert "router" in records[0]
    assert sum(records[1]["tokens_per_expert"]) == 6 * 32 * 2


def test_restore_attaches_the_store(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "olmoe")
    quantizer = stage(**present(state.model.layout), diagnose_experts=False)
    quantizer.run(state, tiny.context(tmp_path))
    made = state.packed
    state.packed = None
    quantizer.restore(state, tiny.context(tmp_path))
    assert state.packed.plan() == made.plan() != {}


def test_estimate_counts_what_is_written(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "qwen2_moe")
    quantizer = stage(**present(state.model.layout))
    estimate = quantizer.estimate(PlanInputs(state.model.layout, 2, 4, 0, 0, {}, "cpu"))
    quantizer.run(state, tiny.context(tmp_path))
    packed = sum(pw.nbytes for _, patch in state.packed.blocks() for pw in patch.packed.values())
    assert estimate.disk == packed
    assert estimate.specs == state.packed.plan()
    assert estimate.ram > 0


def test_check_names_the_stage(tiny: Any, tmp_path: Path) -> None:
    layout = tiny.state(tmp_path / "model", "olmoe").model.layout
    found = stage(rules={"s": {"role": "shared_experts", "bits": 4}}).check(layout)
    assert len(found) == 1
    assert found[0].startswith("stages.quantize.rules.s.role: ")
