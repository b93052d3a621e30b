from __future__ import annotations

import torch

from llmcompress.export.compressed_tensors import CompressedTensorsExporter
from llmcompress.export.dense import DenseExporter, hub_dense
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.spec import QuantSpec

SIZES = {
    "vocab_size": 96, "hidden_size": 8, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2,
}  # fmt: skip


def test_experts_are_cut_apart_under_hub_names() -> None:
    layout = layout_from_config({**SIZES, "model_type": "mixtral"})
    block = layout.blocks[0]
    assert block.bank is not None
    stack = torch.arange(3 * 12 * 8.0).reshape(3, 12, 8)
    found = dict(hub_dense(layout, block, {block.bank.gate_up: stack}, torch.bfloat16))
    assert len(found) == 6
    gate = found["model.layers.0.block_sparse_moe.experts.1.w1.weight"]
    up = found["model.layers.0.block_sparse_moe.experts.1.w3.weight"]
    assert gate.dtype == torch.bfloat16
    assert torch.equal(torch.cat((gate, up)), stack[1].bfloat16())


def test_stacked_families_get_their_own_orientation_back() -> None:
    layout = layout_from_config({**SIZES, "model_type": "gpt_oss", "head_dim": 4})
    block = layout.blocks[0]
    assert block.bank is not None
    stack = torch.arange(3 * 12 * 8.0).reshape(3, 12, 8)
    ((name, tensor),) = hub_dense(layout, block, {block.bank.gate_up: stack}, torch.float32)
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
    found = dict(hub_dense(layout, block, {block.bank.gate_up: stack}, torch.float32))
    assert list(found) == [f"backbone.layers.0.mixer.experts.{expert}.up_proj.weight" for expert in range(3)]
    assert torch.equal(found["backbone.layers.0.mixer.experts.1.up_proj.weight"], stack[1])
    reasons = CompressedTensorsExporter().refusals(layout, {block.bank.gate_up: QuantSpec(4, 16, symmetric=True)}, {})
    assert any("without a gate" in reason for reason in reasons)
