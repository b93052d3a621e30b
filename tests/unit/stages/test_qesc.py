"""The qesc stage on tiny models: what it writes, in which order it works, and that it can be resumed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from llmcompress.models.registry import layout_from_config
from llmcompress.stages.qesc import Qesc, QescConfig

RULES = {
    "attention": {"role": "attention", "bits": 4, "group_size": 16},
    "experts": {"role": ["experts", "shared_experts", "mlp"], "bits": 2, "group_size": 16},
}


def stage(**fields):
    rules = fields.pop("rules", RULES)
    return Qesc("quantize", QescConfig.model_validate({"rules": rules, **fields}))


def bytes_of(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(store.glob("*.safetensors"))}


def test_routers_are_replaced_and_everything_is_recorded(tiny, tmp_path):
    state = tiny.state(tmp_path / "model", "mixtral", samples=20)
    stage(router={"guard": False}).run(state, tiny.context(tmp_path))
    handle = state.model
    for index, patch in state.packed.blocks():
        bank = handle.layout.blocks[index].bank
        name = f"{bank.router.module}.weight"
        original = handle.checkpoint.tensor(name)
        assert patch.replaced[name].dtype == original.dtype and not torch.equal(patch.replaced[name], original)
        router = patch.record["router"]
        assert router["kept"] and router["k"] == 8 and router["loss_after"] <= router["loss_before"]
        assert {"cr_any", "cr_half", "cr_all", "overlap"} <= set(router["before"]) & set(router["after"])
        assert set(patch.packed) == {n for n, _, _, block in handle.layout.quantizable() if block == index}
        assert sum(patch.record["tokens_per_expert"]) == 20 * 32 * bank.top_k


def test_the_first_router_sees_only_attention_error(tiny, tmp_path):
    """With dense attention block 0 has no error yet: nothing to calibrate, and nothing is changed."""
    rules = {"attention": {"role": "attention", "keep": True}, "experts": RULES["experts"]}
    state = tiny.state(tmp_path / "model", "mixtral")
    stage(rules=rules).run(state, tiny.context(tmp_path))
    first, second = (state.packed.read_block(i) for i in (0, 1))
    assert not first.replaced and first.record["router"]["before"]["cr_any"] == 0
    assert second.record["router"]["before"]["cr_any"] > 0


def test_without_calibration_it_is_gptq_with_diagnostics(tiny, tmp_path):
    from llmcompress.stages.gptq import Gptq, GptqConfig

    state = tiny.state(tmp_path / "model", "olmoe")
    stage(router={"calibrate": False}).run(state, tiny.context(tmp_path / "a"))
    other = tiny.state(tmp_path / "model", "olmoe")
    Gptq("quantize", GptqConfig.model_validate({"rules": RULES})).run(other, tiny.context(tmp_path / "b"))
    assert bytes_of(state.packed.root) == bytes_of(other.packed.root)
    record = state.packed.read_block(1).record["router"]
    assert record["before"]["cr_any"] > 0 and "after" not in record


def test_resume_after_the_first_block_gives_the_same_bytes(tiny, tmp_path):
    state = tiny.state(tmp_path / "model", "mixtral")
    context = tiny.context(tmp_path / "whole")
    stage().run(state, context)
    expected = bytes_of(state.packed.root)
    broken = tiny.context(tmp_path / "broken")
    (broken.stage_dir / "blocks").mkdir()
    for suffix in ("safetensors", "json"):
        source = context.stage_dir / "blocks" / f"00000.{suffix}"
        (broken.stage_dir / "blocks" / source.name).write_bytes(source.read_bytes())
    again = tiny.state(tmp_path / "model", "mixtral")
    stage().run(again, broken)
    assert bytes_of(again.packed.root) == expected
    restored = tiny.state(tmp_path / "model", "mixtral")
    stage().restore(restored, context)
    assert restored.packed.indices() == [0, 1]


def test_adam_solver_runs_and_is_repeatable(tiny, tmp_path):
    results = []
    for name in ("a", "b"):
        state = tiny.state(tmp_path / "model", "mixtral")
        stage(router={"solver": "adam", "guard": False, "adam": {"epochs": 2, "tokens_per_batch": 64}}).run(
            state, tiny.context(tmp_path / name)
        )
        results.append(bytes_of(state.packed.root))
    assert results[0] == results[1]


def test_checks():
    def config(name):
        return layout_from_config(json.loads((Path(__file__).parents[2] / "data/hub_configs" / name).read_text()))

    phi, olmoe, dense = config("phi35_moe.json"), config("olmoe_1b_7b.json"), config("smollm2_135m.json")
    rules = {"attention": {"role": "attention", "bits": 4}}
    assert stage(rules=rules, router={"k": "paper"}).check(phi) == []
    assert "no K for olmoe" in stage(rules=rules, router={"k": "paper"}).check(olmoe)[0]
    assert "between 8 and 64" in stage(rules=rules, router={"k": 4}).check(olmoe)[0]
    assert "no experts" in stage(rules=rules).check(dense)[0]
    with pytest.raises(ValidationError, match="ridge"):
        stage(router={"ridge": 0})


def test_full_precision_targets_bring_the_streams_closer(tiny, tmp_path, moe_family):
    """Both kinds of targets bring the last hidden states closer to the full-precision ones."""
    from llmcompress.models.assemble import compressed_model

    state = tiny.state(tmp_path / "model", moe_family, samples=40)
    handle, tokens = state.model, state.calibration.tokens
    with torch.no_grad():
        dense = handle.dense_model(torch.float32).base_model(tokens).last_hidden_state
        errors = []
        for targets in ("own", "full_precision", "residual_stream"):
            state.packed = None
            fields = {"targets": targets, "router": {"calibrate": False}, "rare_experts": {"min_tokens": 1}}
            stage(rules=RULES, **fields).run(state, tiny.context(tmp_path / targets))
            model = compressed_model(handle, state.packed, {}, dtype=torch.float32)
            errors.append(float((model.base_model(tokens).last_hidden_state - dense).square().mean()))
    assert max(errors[1:]) < errors[0]


def test_estimate_grows_with_full_precision_targets():
    from llmcompress.stages.base import PlanInputs

    folder = Path(__file__).parents[2] / "data/hub_configs"
    layout = layout_from_config(json.loads((folder / "mixtral_8x7b.json").read_text()))
    inputs = PlanInputs(layout, 2, 2, 128, 2048, {}, "cpu")
    rules = {"all": {"role": ["attention", "experts"], "bits": 4}}
    kinds = ("own", "full_precision", "residual_stream")
    own, both, residual = (stage(rules=rules, targets=t).estimate(inputs) for t in kinds)
    stream = 128 * 2048 * 4096 * 2
    assert both.ram > own.ram + stream and both.disk == own.disk
    # one more copy of the stream for attention and one for the experts
    assert residual.ram == both.ram + 2 * stream
