from __future__ import annotations

from typing import Any

import pytest

from llmcompress.models.registry import layout_from_config
from llmcompress.models.smoothable import smoothable


def found(model_type: str, **config: Any) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Key → number of linears that read it and what makes it, in the second block."""
    layout = layout_from_config({"model_type": model_type, **config})
    return {f.key: (len(f.linears), f.makers) for block, f in smoothable(layout) if block.index == 1}


def test_dense_decoder() -> None:
    layer = "model.layers.1"
    assert found("llama", mlp_bias=True) == {
        f"{layer}.self_attn.q_proj": (3, (f"{layer}.input_layernorm.weight",)),
        f"{layer}.mlp.gate_proj": (2, (f"{layer}.post_attention_layernorm.weight",)),
        f"{layer}.mlp.down_proj": (1, (f"{layer}.mlp.up_proj.weight", f"{layer}.mlp.up_proj.bias")),
    }


def test_norms_with_a_bias_give_both_and_routers_keep_their_inputs() -> None:
    norm = "model.layers.1.input_layernorm"
    assert found("phimoe") == {"model.layers.1.self_attn.q_proj": (3, (f"{norm}.weight", f"{norm}.bias"))}


def test_shared_experts_and_mixers() -> None:
    shared = "model.layers.1.mlp.shared_expert"
    assert found("qwen2_moe")[f"{shared}.down_proj"] == (1, (f"{shared}.up_proj.weight",))
    mixer = "backbone.layers.1"
    assert found("mamba2") == {
        f"{mixer}.mixer.in_proj": (1, (f"{mixer}.norm.weight",)),
        f"{mixer}.mixer.out_proj": (1, (f"{mixer}.mixer.norm.weight",)),
    }
    assert list(found("mamba")) == [f"{mixer}.mixer.in_proj"]


def test_one_norm_before_two_modules_is_smoothed_for_both() -> None:
    assert found("falcon_h1")["model.layers.1.mamba.in_proj"][0] == 4


@pytest.mark.parametrize(("family", "absent"), [("gemma2", "self_attn"), ("nemotron_h", "down_proj")])
def test_left_alone(family: str, absent: str) -> None:
    layout = layout_from_config({"model_type": family})
    assert not any(absent in f.key for _, f in smoothable(layout))


def test_modules_that_several_blocks_run_are_left_alone() -> None:
    kinds = ["linear_attention", "hybrid", "hybrid"]
    layout = layout_from_config({"model_type": "zamba2", "layers_block_type": kinds, "num_hidden_layers": 3})
    keys = {f.key for _, f in smoothable(layout)}
    assert keys and not any("shared_transformer" in key for key in keys)
