from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llmcompress.errors import ExportError
from llmcompress.export.base import hub_weights
from llmcompress.export.compressed_tensors import CompressedTensorsExporter
from llmcompress.export.dense import DenseExporter
from llmcompress.models.handle import ModelHandle
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.embedding import pack_rows
from llmcompress.quant.spec import QuantSpec
from llmcompress.quant.store import BlockPatch, PackedStore

SIZES = {
    "vocab_size": 96, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


def test_experts_are_cut_apart_under_hub_names() -> None:
    layout = layout_from_config({**SIZES, "model_type": "mixtral"})
    block = layout.blocks[0]
    assert block.bank is not None
    stack = torch.arange(3 * 12 * 8.0).reshape(3, 12, 8)
    found = dict(hub_weights(layout, block, [(block.bank.gate_up, stack)]))
    assert len(found) == 6
    gate = found["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    up = found["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert torch.equal(torch.cat((gate, up)), stack[1])


def test_stacked_families_get_their_own_orientation_back() -> None:
    layout = layout_from_config({**SIZES, "model_type": "gpt_oss", "head_dim": 4})
    block = layout.blocks[0]
    assert block.bank is not None
    stack = torch.arange(3 * 12 * 8.0).reshape(3, 12, 8)
    ((name, tensor),) = hub_weights(layout, block, [(block.bank.gate_up, stack)])
    assert name == "model.layers.0.mlp.experts.gate_up_proj"
    assert tensor.shape == (3, 8, 12)
    # columns alternate: gate 0, up 0, gate 1, ...
    assert torch.equal(tensor[2, :, 3], stack[2, 6 + 1])


def test_size_follows_the_wanted_type() -> None:
    layout = layout_from_config({**SIZES, "model_type": "mixtral"})
    assert DenseExporter("float32").output_bytes(layout, {}, 2) == 2 * DenseExporter().output_bytes(layout, {}, 2)


def test_experts_without_a_gate() -> None:
    layout = layout_from_config({
        "model_type": "nemotron_h", "hidden_size": 8, "layers_block_type": ["moe"], "moe_intermediate_size": 6,
        "n_routed_experts": 3, "moe_shared_expert_intermediate_size": 4,
    })  # fmt: skip
    block = layout.blocks[0]
    assert block.bank is not None
    stack = torch.arange(3 * 6 * 8.0).reshape(3, 6, 8)
    found = dict(hub_weights(layout, block, [(block.bank.gate_up, stack)]))
    assert list(found) == [f"backbone.layers.0.mixer.experts.{expert}.up_proj.weight" for expert in range(3)]
    assert torch.equal(found["backbone.layers.0.mixer.experts.1.up_proj.weight"], stack[1])
    reasons = CompressedTensorsExporter().refusals(layout, {block.bank.gate_up: QuantSpec(4, 16, symmetric=True)}, {})
    assert any("without a gate" in reason for reason in reasons)


def saved(folder: Path, store: PackedStore) -> ModelHandle:
    """A random Mixtral in bf16 whose norms and routers are in fp32, as some are published; attention is quantized."""
    from transformers import MixtralConfig, MixtralForCausalLM

    MixtralForCausalLM(MixtralConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    file = folder / "model.safetensors"
    wide = {k: t.float() + 1e-4 if t.ndim == 1 or ".gate." in k else t for k, t in load_file(file).items()}
    save_file(wide, file, metadata={"format": "pt"})
    handle, spec = ModelHandle.open(folder), QuantSpec(4, 8, symmetric=True)
    for block in handle.layout.blocks:
        packed = {
            view.name: pack_rows(handle.checkpoint.tensor(f"{view.name}.weight"), spec, lanes=1)
            for view in block.linears()
        }
        store.write_block(block.index, BlockPatch(packed, {}))
    return handle


@pytest.mark.parametrize("dtype", ["auto", "float32", "float16"])
def test_every_tensor_keeps_its_type_unless_one_is_named(tmp_path: Path, dtype: str) -> None:
    store, exporter, out = PackedStore(tmp_path / "blocks"), DenseExporter(dtype), tmp_path / "out"
    handle = saved(tmp_path / "source", store)
    source = load_file(tmp_path / "source" / "model.safetensors")
    assert {t.dtype for t in source.values()} == {torch.bfloat16, torch.float32}
    exporter.write(handle, store, {}, out, {})
    exporter.read_back(out, handle, store)
    found = load_file(out / "model.safetensors")
    assert {k: t.dtype for k, t in found.items()} == {
        k: t.dtype if dtype == "auto" else getattr(torch, dtype) for k, t in source.items()
    }
    if dtype != "float16":
        assert torch.equal(found["model.norm.weight"], source["model.norm.weight"])
    assert json.loads((out / "config.json").read_text())["dtype"] == ("bfloat16" if dtype == "auto" else dtype)


def test_a_decoded_weight_beyond_the_type_is_refused(tmp_path: Path) -> None:
    """Weights of bf16 models may lie beyond fp16; so may the decoded value of one just below its end."""
    store = PackedStore(tmp_path / "blocks")
    handle = saved(tmp_path / "source", store)
    patch, name = store.read_block(0), "model.layers.0.self_attn.o_proj"
    patch.packed[name].tensors["weight_scale"].fill_(60000)
    store.write_block(0, patch)
    with pytest.raises(ExportError, match=rf"{name}.weight: holds 480000, and float16 ends at 65504"):
        DenseExporter("float16").write(handle, store, {}, tmp_path / "out", {})
    assert not list(tmp_path.glob("out*"))
    DenseExporter("bfloat16").write(handle, store, {}, tmp_path / "out", {})
