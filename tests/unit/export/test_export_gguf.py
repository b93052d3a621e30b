from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llmcompress.export.gguf import GGUFExporter, _rotate_rows
from llmcompress.export.gguf_blocks import block_type
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.codecs.int_group import decode, encode
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

SIZES = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 2,
}  # fmt: skip


def packed(shape: tuple[int, ...], spec: QuantSpec) -> PackedWeight:
    generator = torch.Generator().manual_seed(3)
    codes = torch.randint(0, spec.levels, shape, dtype=torch.uint8, generator=generator)
    grid = (*shape[:-1], spec.groups(shape[-1]))
    scale = (torch.rand(grid, generator=generator) * 0.1 + 1e-3).half()
    zero = None
    if not spec.symmetric:
        zero = torch.randint(0, spec.levels, grid, dtype=torch.uint8, generator=generator)
    return encode(codes, scale, zero, spec)


@pytest.mark.parametrize("spec", [QuantSpec(2, 32), QuantSpec(3, 32, True), QuantSpec(8, 32)], ids=str)
def test_other_widths_have_no_type(spec: QuantSpec) -> None:
    assert block_type(spec) is None
    layout = layout_from_config({**SIZES, "model_type": "llama"})
    (reason,) = GGUFExporter().refusals(layout, {"model.layers.0.self_attn.q_proj": spec}, {})
    assert "no GGML type" in reason


@pytest.mark.parametrize("group", [24, 48, 16])
def test_groups_must_be_made_of_whole_blocks(group: int) -> None:
    layout = layout_from_config({**SIZES, "model_type": "llama"})
    (reason,) = GGUFExporter().refusals(layout, {"model.layers.0.self_attn.q_proj": QuantSpec(4, group, True)}, {})
    assert "multiples of 32" in reason


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "gemma", "head_dim": 16}, "gemma is not among the model types"),
        ({"model_type": "qwen2_moe", "num_experts": 4, "norm_topk_prob": True}, "does not divide"),
        ({"model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": False, "head_dim": 16}, "divides"),
        (
            {
                "model_type": "qwen3_moe", "num_experts": 4, "norm_topk_prob": True, "head_dim": 16,
                "mlp_only_layers": [1], "num_hidden_layers": 2,
            },
            "experts in every layer",
        ),
        ({"model_type": "qwen2_moe", "num_experts": 4, "tie_word_embeddings": True}, "an output head of its own"),
        ({"model_type": "qwen2", "head_dim": 32}, "as wide as the model"),
        ({"model_type": "qwen3", "head_dim": 16, "attention_bias": True}, "o_proj: llama.cpp has no bias for it"),
    ],
)  # fmt: skip
def test_families_llama_cpp_computes_differently(config: dict[str, Any], words: str) -> None:
    (reason,) = GGUFExporter().refusals(layout_from_config({**SIZES, **config}), {}, {})
    assert words in reason


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, None),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, None),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rotary scaling 'yarn'"),
        ({"model_type": "mixtral", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, None),
        ({"model_type": "qwen2", "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rotary scaling 'llama3'"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rotary scaling 'dynamic'"),
        ({"sliding_window": 32, "max_position_embeddings": 64}, "window of 32 tokens"),
        ({"sliding_window": 32}, "window of 32 tokens"),
        ({"sliding_window": 64, "max_position_embeddings": 64}, None),
        ({"sliding_window": 32, "max_position_embeddings": 64, "use_sliding_window": False}, None),
        # what transformers takes where the config does not say
        ({"model_type": "mistral", "max_position_embeddings": 32768}, "window of 4096 tokens"),
        ({"model_type": "mistral", "max_position_embeddings": 4096}, None),
        ({"model_type": "mistral", "max_position_embeddings": 32768, "sliding_window": None}, None),
        ({"model_type": "mixtral", "max_position_embeddings": 32768}, None),
        ({"hidden_act": "gelu"}, "activation 'gelu'"),
    ],
)
def test_settings_of_the_source_that_llama_cpp_would_not_follow(
    config: dict[str, Any], words: str | None, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    no_tokenizer, *rest = GGUFExporter().source_refusals(tmp_path, config)
    assert "no tokenizer.json" in no_tokenizer
    assert len(rest) == (words is not None) and all(str(words) in problem for problem in rest)


@pytest.mark.parametrize("config", [{"model_type": "llama", "mlp_bias": True}, {"model_type": "qwen2"}])
def test_biases_that_llama_cpp_has(config: dict[str, Any]) -> None:
    layout = layout_from_config({**SIZES, "attention_bias": True, **config})
    assert any(linear.bias for block in layout.blocks for linear in block.linears())
    assert GGUFExporter().refusals(layout, {}, {}) == []


def test_row_order_of_rotary_heads() -> None:
    """llama.cpp rotates neighbouring rows, transformers rows half a head apart."""
    rows = torch.arange(8.0).reshape(8, 1).expand(8, 32).contiguous()
    assert _rotate_rows(rows, 2)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]  # type: ignore[index]
    weight = packed((8, 64), QuantSpec(4, 32, False))
    turned = _rotate_rows(weight, 2)
    assert isinstance(turned, PackedWeight)
    assert torch.equal(decode(turned), _rotate_rows(decode(weight), 2))
