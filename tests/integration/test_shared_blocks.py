"""Zamba2's shared transformers: weights that belong to one block and are run by several."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.algorithms.gptq import solve
from llmcompress.algorithms.grids import round_to_nearest
from llmcompress.distributed.world import World
from llmcompress.errors import InputError
from llmcompress.export.compressed_tensors import CompressedTensorsExporter
from llmcompress.models import sizes
from llmcompress.models.assemble import compressed_model
from llmcompress.models.capture import recorded_inputs
from llmcompress.models.family import unsupported
from llmcompress.models.registry import layout_from_config
from llmcompress.models.streamed import StreamedModel
from llmcompress.models.walker import Walker
from llmcompress.quant.codecs import int_group
from llmcompress.quant.spec import QuantSpec
from llmcompress.stages.blockwise.engine import run_blockwise
from llmcompress.stages.blockwise.method import SecondOrder
from llmcompress.stages.blockwise.shared_statistics import gather, shared_moments
from llmcompress.stages.gptq import Gptq, GptqConfig

TWO = {
    "num_mem_blocks": 2, "num_hidden_layers": 6,
    "layers_block_type": ["linear_attention", "hybrid", "hybrid", "linear_attention", "hybrid", "hybrid"],
}  # fmt: skip
TOKENS = torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(5))
RULES = {
    "adapters": {"match": "adapter_list", "keep": True},
    "rest": {"match": ".", "bits": 8, "group_size": 16, "symmetric": True},
}


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.glob("*.safetensors")}


def test_shared_weights_count_once_and_are_met_at_every_use(tiny: Any) -> None:
    model = tiny.model("zamba2", **TWO)
    layout = layout_from_config(model.config.to_dict())
    assert sizes.parameters(layout) == sum(parameter.numel() for parameter in model.parameters())
    names = [name for name, *_ in layout.quantizable()]
    assert len(names) == len(set(names))
    loans = {block.index: block.loan for block in layout.blocks if block.loan is not None}
    assert {index: loan.block for index, loan in loans.items()} == {4: 1, 5: 2}
    shared = sum(sizes.borrowed_parameters(block) for block in layout.blocks)
    assert sizes.active_parameters(layout) == sizes.parameters(layout) - layout.hidden + shared
    # adapters belong to the block that runs them
    own = [view.name for view in layout.blocks[4].linears() if "adapter_list" in view.name]
    assert len(own) == 8
    assert all(".layers.1.shared_transformer." in name and "_adapter_list.2." in name for name in own)


def test_what_cannot_hold_shared_weights_refuses(tiny: Any) -> None:
    config = tiny.config("zamba2", **TWO).to_dict()
    layout = layout_from_config(config)
    assert "share weights" in unsupported(layout)[0]
    assert any("tie" in reason for reason in CompressedTensorsExporter().refusals(layout, {}, {}))
    with pytest.raises(InputError, match="tie_word_embeddings is false"):
        layout_from_config({**config, "tie_word_embeddings": False})


def test_every_use_sees_the_quantized_weights_and_a_resumed_run_has_the_same_bytes(tiny: Any, tmp_path: Path) -> None:
    config = GptqConfig(rules=RULES, damp=0.05)
    state = tiny.state(tmp_path / "model", "zamba2", samples=8, **TWO)
    Gptq("quantize", config).run(state, tiny.context(tmp_path))
    handle, store = state.model, state.packed
    assert not any("adapter_list" in name for name in store.plan())

    whole = compressed_model(handle, store, {}, torch.float32)
    streamed = StreamedModel(handle, store, [TOKENS], torch.float32)
    with torch.inference_mode():
        expected, dense = whole(TOKENS).logits, handle.dense_model(torch.float32)(TOKENS).logits
    found = streamed.logits(0, slice(0, 3))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert float((found - dense).norm()) > 10 * float((found - expected).norm())

    before = digests(store.root)
    for kept in (2, 5):
        for index in range(kept, 6):
            store.path(index).unlink()
        Gptq("quantize", config).run(tiny.state(tmp_path / "model", "zamba2", samples=8), tiny.context(tmp_path))
        assert digests(store.root) == before


def test_statistics_are_sums_over_all_uses(tiny: Any, tmp_path: Path) -> None:
    """The Hessian of a shared weight against inputs recorded in the plain model, every layer that runs it added."""
    state = tiny.state(tmp_path / "model", "zamba2", samples=6, **TWO)
    handle, tokens = state.model, state.calibration.tokens
    plan = {name: QuantSpec(4, 16) for name, *_ in handle.layout.quantizable()}
    model = handle.skeleton(torch.float32)
    walker = Walker(model, tokens)
    hidden = walker.embed([block.name for block in handle.layout.blocks])
    found = shared_moments(handle.layout, plan, tmp_path)
    assert found is not None
    gather(handle, model, plan, walker, hidden, found)
    assert not any("adapter" in name or name.endswith("linear") for name in found.first)

    whole = handle.dense_model(torch.float32)
    for layer in (1, 2):
        shared = f"model.layers.{layer}.shared_transformer"
        for name in ("self_attn.q_proj", "self_attn.o_proj", "feed_forward.gate_up_proj", "feed_forward.down_proj"):
            inputs: list[torch.Tensor] = []
            with recorded_inputs(
                [whole.get_submodule(f"{shared}.{name}")], lambda _, x, inputs=inputs: inputs.append(x)
            ):
                whole(tokens)
            assert len(inputs) == 2
            flat = torch.cat([x.flatten(0, -2) for x in inputs])
            gram = found.gram(f"{shared}.{name}", "cpu")
            assert int(gram.tokens) == len(flat)
            torch.testing.assert_close(gram.hessian()[0], 2 / len(flat) * flat.T @ flat, rtol=1e-3, atol=1e-3)


def test_a_shared_weight_is_solved_for_all_of_its_uses(tiny: Any, tmp_path: Path) -> None:
    """Summed over all uses its error is below that of solving for the first use alone, and of rounding to nearest."""
    state = tiny.state(tmp_path / "model", "zamba2", samples=16, **TWO)
    rules = {"shared": {"match": "shared_transformer.*_proj$", "bits": 3, "group_size": 16, "symmetric": True}}
    config = GptqConfig.model_validate({"rules": rules})
    Gptq("quantize", config).run(state, tiny.context(tmp_path / "sum"))
    assert not (tmp_path / "sum" / "stages" / "quantize" / "shared_moments.safetensors").exists()
    handle, plan, tokens = state.model, state.packed.plan(), state.calibration.tokens
    model = handle.skeleton(torch.float32)
    walker = Walker(model, tokens)
    found = shared_moments(handle.layout, plan, tmp_path)
    assert found is not None
    gather(handle, model, plan, walker, walker.embed([block.name for block in handle.layout.blocks]), found)
    method, whole = config.method(), handle.dense_model(torch.float32)
    assert isinstance(method, SecondOrder)
    options = method.options

    errors = {"all uses": 0.0, "first use": 0.0, "nearest": 0.0}
    for index in (1, 2):
        for name, packed in state.packed.read_block(index).packed.items():
            inputs: list[torch.Tensor] = []
            with recorded_inputs([whole.get_submodule(name)], lambda _, x, inputs=inputs: inputs.append(x)):
                whole(tokens)
            first = inputs[0].flatten(0, -2)
            weight = handle.checkpoint.tensor(f"{name}.weight").float()
            codes, scale, zero = round_to_nearest(weight[None], packed.spec, "mse")
            values = {
                "all uses": int_group.decode(packed).float(),
                "first use": solve(
                    weight[None], (2 / len(first) * first.T @ first)[None], packed.spec, options
                ).quantized[0],
                "nearest": int_group.dequantize(codes, scale, zero, packed.spec)[0],
            }
            hessian = found.gram(name, "cpu").hessian()[0]
            for key, value in values.items():
                errors[key] += float((((weight - value) @ hessian) * (weight - value)).sum())
    assert errors["all uses"] < 0.95 * errors["first use"], errors
    assert errors["all uses"] < 0.8 * errors["nearest"], errors


def test_sums_in_parts_come_to_the_same_and_spill_alike(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores, folders = [], []

    class Seen(Walker):
        def __init__(self, *args: Any, **options: Any) -> None:
            folders.append(options.get("folder"))
            super().__init__(*args, **options)

    monkeypatch.setattr("llmcompress.models.walker.Walker", Seen)
    for name, world in (("whole", World()), ("parts", World(deterministic=True))):
        state = tiny.state(tmp_path / "model", "zamba2", samples=8)
        config = GptqConfig.model_validate({"rules": {"all": {"match": ".", "bits": 4, "group_size": 16}}})
        run_blockwise(config, state, replace(tiny.context(tmp_path / name), world=world))
        stores.append(state.packed)
    # one for all windows, one for the parts', one for all that the parts' shared weights see
    assert len(folders) == 3 and None not in folders
    assert stores[0].plan() == stores[1].plan()
    for name, weight in stores[0].read_block(1).packed.items():
        other = stores[1].read_block(1).packed[name]
        assert (weight.tensors["weight_packed"] == other.tensors["weight_packed"]).float().mean() > 0.9, name
