from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.algorithms.router_calibration import RouterUpdate
from llmcompress.errors import InputError, RecipeError
from llmcompress.quant.codecs.int_group import decode, unpack_parts
from llmcompress.quant.store import PackedStore
from llmcompress.stages.blockwise.engine import BlockwiseQuantizer, run_blockwise
from llmcompress.stages.blockwise.method import Nearest
from llmcompress.stages.gptq import GptqConfig
from llmcompress.stages.rtn import RtnConfig

EXPERTS = {"experts": {"role": "experts", "bits": 2, "group_size": 16}}
ALL = {"attention": {"role": "attention", "bits": 4, "group_size": 16}, **EXPERTS}


def gptq(**values: Any) -> GptqConfig:
    return GptqConfig.model_validate({"rules": ALL, "diagnose_experts": False, **values})


def block_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


class Stop(BaseException):
    pass


@pytest.mark.parametrize("diagnose", [False, True])
@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "gpt_oss"])
def test_resume_gives_the_same_bytes(family: str, diagnose: bool, tiny: Any, tmp_path: Path) -> None:
    config = gptq(diagnose_experts=diagnose, rules={"all": {"match": "proj", "bits": 3, "group_size": 16}})
    changes = {"num_hidden_layers": 3}
    if family == "gpt_oss":
        changes["layer_types"] = ["full_attention"] * 3  # type: ignore[assignment]
    whole = tiny.state(tmp_path / "model", family, **changes)
    run_blockwise(config, whole, tiny.context(tmp_path / "whole"))
    expected = block_bytes(whole.packed.root)
    assert len(expected) == 3
    for kill_at in (0, 1):
        state = tiny.state(tmp_path / "model", family)
        ctx = tiny.context(tmp_path / f"killed{kill_at}")

        def emit(event: Any, kill_at: int = kill_at) -> None:
            if event.kind == "block_end" and event.data["index"] == kill_at:
                raise Stop

        killed = type(ctx)(*(getattr(ctx, n) if n != "emit_event" else emit for n in ctx.__dataclass_fields__))
        with pytest.raises(Stop):
            run_blockwise(config, state, killed)
        assert state.packed is None
        assert len(PackedStore(ctx.stage_dir / "blocks").finished()) == kill_at + 1
        events: list[Any] = []
        run_blockwise(config, state, tiny.context(tmp_path / f"killed{kill_at}", events=events))
        assert [e.data["index"] for e in events if e.kind == "block_end"] == list(range(kill_at + 1, 3))
        assert block_bytes(state.packed.root) == expected


@pytest.mark.parametrize("module", ["gptq", "router_calibration"])
def test_blocks_of_another_solver_are_told(
    module: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state, config = tiny.state(tmp_path / "model", "mixtral"), gptq(rules=EXPERTS, diagnose_experts=True)
    run_blockwise(config, state, tiny.context(tmp_path))
    last = max((tmp_path / "stages" / "quantize" / "blocks").glob("*.json"))

    def resumed() -> list[str]:
        for part in (last, last.with_suffix(".safetensors")):
            part.unlink()
        state.packed, events = None, []
        run_blockwise(config, state, tiny.context(tmp_path, events=events))
        return [event.data["text"] for event in events if event.kind == "warning" and "resumed" in event.data["text"]]

    assert resumed() == []
    monkeypatch.setattr(f"llmcompress.algorithms.{module}.REVISION", 99)
    (text,) = resumed()
    assert "of another solver" in text and "--force" in text and "99" in text
    # a folder of a version that noted none
    path = tmp_path / "stages" / "quantize" / "engine.json"
    noted = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in noted.items() if "solver" not in key}))
    assert len(resumed()) == 1


def test_finished_stage_does_nothing(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    run_blockwise(gptq(), state, tiny.context(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in state.packed.root.iterdir()}
    state.packed = None
    events: list[Any] = []
    run_blockwise(gptq(), state, tiny.context(tmp_path, events=events))
    assert not [e for e in events if e.kind.startswith("block")]
    assert before == {p: p.stat().st_mtime_ns for p in state.packed.root.iterdir()}


def test_unseen_experts_are_rounded_and_reported(tiny: Any, tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    for layer in model.model.layers:
        # all tokens prefer two experts, whatever they say
        layer.mlp.gate.weight.data.zero_()
        layer.mlp.experts.gate_up_proj.data[5, :, 3] = 0.0
    model.save_pretrained(tmp_path / "model")
    state = tiny.state(tmp_path / "model", "mixtral")
    events: list[Any] = []
    run_blockwise(gptq(rules=EXPERTS), state, tiny.context(tmp_path, events=events))
    patch = state.packed.read_block(0)
    counts = patch.record["tokens_per_expert"]
    unseen = [e for e, n in enumerate(counts) if n == 0]
    assert len(unseen) == 6
    for name in ("model.layers.0.mlp.experts.gate_up_proj", "model.layers.0.mlp.experts.down_proj"):
        assert patch.record["unseen_experts"][name] == unseen
        packed = patch.packed[name]
        dense = state.model.checkpoint.tensor(name).float()
        scale, zero = find_grid(dense, packed.spec, "mse")
        codes, _, _ = unpack_parts(packed)
        expected = round_codes(dense, scale, zero, packed.spec)
        values = decode(packed)
        assert torch.isfinite(values).all()
        for expert in unseen:
            assert torch.equal(codes[expert], expected[expert])
            assert float(values[expert].abs().max()) > 0
    warnings = [e.data["text"] for e in events if e.kind == "warning"]
    assert sum("saw no calibration token" in text for text in warnings) == 2 * 2 * 6


@pytest.mark.parametrize("below", ["blend", "rtn"])
def test_rare_experts_follow_the_policy(below: str, tiny: Any, tmp_path: Path) -> None:
    made = {}
    for needed in (1, 10**6):
        state = tiny.state(tmp_path / "model", "mixtral")
        config = gptq(rules=EXPERTS, rare_experts={"min_tokens": needed, "below": below})
        run_blockwise(config, state, tiny.context(tmp_path / f"{below}{needed}"))
        patch = state.packed.read_block(0)
        made[needed] = patch
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert "rare_experts" not in made[1].record
    seen = [e for e, n in enumerate(made[1].record["tokens_per_expert"]) if n > 0]
    assert made[10**6].record["rare_experts"][name] == seen
    assert not torch.equal(unpack_parts(made[1].packed[name])[0], unpack_parts(made[10**6].packed[name])[0])
    if below == "rtn":
        dense = state.model.checkpoint.tensor(name).float()
        scale, zero = find_grid(dense, made[1].packed[name].spec, "mse")
        expected = round_codes(dense, scale, zero, made[1].packed[name].spec)
        assert torch.equal(unpack_parts(made[10**6].packed[name])[0], expected)


def test_second_stage_works_on_top_of_the_first(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    attention = {"attention": ALL["attention"]}
    run_blockwise(RtnConfig.model_validate({"rules": attention}), state, tiny.context(tmp_path, "first"))
    first = state.packed
    run_blockwise(gptq(rules=EXPERTS), state, tiny.context(tmp_path, "second"))
    assert set(state.packed.plan()) == {name for name, *_ in state.model.layout.quantizable()}
    assert len(state.packed.read_block(0).packed) == 6
    # the experts saw activations of the rounded attention
    alone = tiny.state(tmp_path / "model", "mixtral")
    run_blockwise(gptq(rules=EXPERTS), alone, tiny.context(tmp_path, "alone"))
    name = "model.layers.1.mlp.experts.down_proj"
    assert not torch.equal(
        alone.packed.read_block(1).packed[name].tensors["weight_packed"],
        state.packed.read_block(1).packed[name].tensors["weight_packed"],
    )
    state.packed = first
    with pytest.raises(RecipeError, match=r"already quantized"):
        run_blockwise(gptq(rules=attention), state, tiny.context(tmp_path, "third"))


def test_nan_weights_are_named(tiny: Any, tmp_path: Path) -> None:
    model = tiny.model("mixtral")
    model.model.layers[1].mlp.experts.down_proj.data[2, 0, 0] = float("nan")
    model.save_pretrained(tmp_path / "model")
    state = tiny.state(tmp_path / "model", "mixtral")
    state.calibration = None
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.experts\.down_proj: the weight contains NaN"):
        run_blockwise(RtnConfig.model_validate({"rules": EXPERTS}), state, tiny.context(tmp_path))
    assert PackedStore(tmp_path / "stages/quantize/blocks").finished() == {0}


def test_shortfall_is_an_error(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    state.calibration = None
    run_blockwise(RtnConfig.model_validate({"rules": EXPERTS}), state, tiny.context(tmp_path))
    state.packed = None
    with pytest.raises(InputError, match="8 planned weights were not quantized"):
        run_blockwise(RtnConfig.model_validate({"rules": ALL}), state, tiny.context(tmp_path))


@pytest.mark.parametrize("with_data", [True, False])
def test_auto_plan_spends_its_budget_once(with_data: bool, tiny: Any, tmp_path: Path) -> None:
    rules = {"experts": {"role": "experts", "bits": {"auto": 2.5, "choices": [2, 3, 4]}, "group_size": 16}}
    state = tiny.state(tmp_path / "model", "mixtral")
    config = gptq(rules=rules)
    if not with_data:
        state.calibration = None
        config = RtnConfig.model_validate({"rules": rules})  # type: ignore[assignment]
    run_blockwise(config, state, tiny.context(tmp_path))
    plan = state.packed.plan()
    sizes = {name: prod(shape) for name, _, shape, _ in state.model.layout.quantizable() if name in plan}
    assert 2.2 <= sum(plan[name].bits * size for name, size in sizes.items()) / sum(sizes.values()) <= 2.5
    kept = tmp_path / "stages/quantize/bits.json"
    assert json.loads(kept.read_text()) == {name: spec.bits for name, spec in plan.items()}
    # a resumed run takes the widths that were chosen, not new ones
    kept.write_text(json.dumps(dict.fromkeys(plan, 4)))
    fresh = tiny.state(tmp_path / "model", "mixtral")
    fresh.calibration = state.calibration
    for path in (tmp_path / "stages/quantize/blocks").iterdir():
        path.unlink()
    run_blockwise(config, fresh, tiny.context(tmp_path))
    assert {spec.bits for spec in fresh.packed.plan().values()} == {4}


@pytest.mark.parametrize("stored", [torch.float32, torch.float16])
def test_low_precision_compute_quantizes_the_exact_weights(stored: Any, tiny: Any, tmp_path: Path) -> None:
    tiny.model("mixtral").to(stored).save_pretrained(tmp_path / "model")
    codes = []
    for dtype in ("float32", "bfloat16"):
        state = tiny.state(tmp_path / "model", "mixtral")
        state.calibration = None
        ctx = tiny.context(tmp_path / dtype)
        ctx = type(ctx)(*(getattr(ctx, n) if n != "dtype" else dtype for n in ctx.__dataclass_fields__))
        run_blockwise(RtnConfig.model_validate({"rules": ALL}), state, ctx)
        codes.append(block_bytes(state.packed.root))
    assert codes[0] == codes[1]


class Doubling:
    """Router hook that remembers what it saw and doubles the router."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, int]] = []
        self.inputs: dict[str, torch.Tensor] = {}

    def observe(self, block: Any, router: Any, x: torch.Tensor) -> None:
        self.calls.append(("observe", block.index))
        self.inputs[f"full{block.index}"] = x.clone()

    def calibrate(self, block: Any, router: Any, x_hat: torch.Tensor) -> RouterUpdate:
        self.calls.append(("calibrate", block.index))
        self.inputs[f"quantized{block.index}"] = x_hat.clone()
        ((name, weight),) = router.parameters().items()
        return RouterUpdate({name: weight.detach() * 2}, {"kept": True})


def test_router_hook_without_any_quantization(tiny: Any, tmp_path: Path) -> None:
    state = tiny.state(tmp_path / "model", "mixtral")
    hook, ctx = Doubling(), tiny.context(tmp_path)
    store = PackedStore(ctx.stage_dir / "blocks")
    method = Nearest()
    BlockwiseQuantizer(state.model, {}, method, store, ctx, calibration=state.calibration, hook=hook).run()
    assert hook.calls == [("observe", 0), ("calibrate", 0), ("observe", 1), ("calibrate", 1)]
    assert torch.equal(hook.inputs["full0"], hook.inputs["quantized0"])
    # doubled logits change the weights of the chosen experts, so the streams part
    assert not torch.equal(hook.inputs["full1"], hook.inputs["quantized1"])
    patch = store.read_block(1)
    name = "model.layers.1.mlp.gate.weight"
    assert patch.replaced[name].dtype == torch.bfloat16
    assert torch.equal(patch.replaced[name], state.model.checkpoint.tensor(name) * 2)
    assert patch.record["router"] == {"kept": True}
    assert patch.packed == {}
