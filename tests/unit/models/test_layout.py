from __future__ import annotations

import pytest

from llmcompress.models.registry import layout_from_config


def test_every_tensor_has_one_name() -> None:
    layout = layout_from_config({"model_type": "qwen2_moe", "mlp_only_layers": [0]})
    names = [view.name for view in layout.tensors()]
    assert len(names) == len(set(names))
    assert "model.layers.1.mlp.shared_expert_gate.weight" in names


def test_expert_shapes() -> None:
    bank = layout_from_config({"model_type": "gpt_oss"}).blocks[0].bank
    assert bank is not None
    assert bank.shape(bank.gate_up) == (128, 5760, 2880)
    assert bank.stored_shape(bank.gate_up) == (128, 2880, 5760)
    with pytest.raises(KeyError):
        bank.shape("model.layers.0.mlp.experts.up_proj")


def test_quantizable_weights_and_kept_tensors_do_not_overlap() -> None:
    layout = layout_from_config({"model_type": "phimoe", "attention_bias": True})
    for block in layout.blocks:
        kept = {view.name for view in block.kept}
        weights = {f"{linear.name}.weight" for linear in block.linears()}
        assert not kept & weights
        assert f"{block.name}.self_attn.q_proj.bias" in kept
        assert len(kept) + len(weights) + 2 == len(list(block.tensors()))


def test_names_in_hub_checkpoints() -> None:
    layout = layout_from_config({"model_type": "mixtral"})
    bank, disk = layout.blocks[0].bank, layout.disk
    assert bank is not None
    assert disk.name("model.layers.0.mlp.gate.weight") == "model.layers.0.block_sparse_moe.gate.weight"
    assert disk.name("model.layers.0.self_attn.q_proj") == "model.layers.0.self_attn.q_proj"
    assert disk.expert(bank, bank.gate_up, 3) == {
        "gate": "model.layers.0.block_sparse_moe.experts.3.w1.weight",
        "up": "model.layers.0.block_sparse_moe.experts.3.w3.weight",
    }
    assert disk.expert(bank, bank.down, 3) == {"down": "model.layers.0.block_sparse_moe.experts.3.w2.weight"}
    assert bank.parts(bank.gate_up) == {"gate": slice(0, 14336), "up": slice(14336, 28672)}
