"""What config.json says about native decoding."""

from __future__ import annotations

from typing import Any

import pytest
from llmcompress_kernels import build
from llmcompress_kernels.decode import MAX_HEAD_DIM

from llmcompress.inference.coverage import FAMILIES, MOST_COLUMNS, decline_config, reach


def test_every_family_has_a_model_in_the_tests_of_the_engine(decoders: Any) -> None:
    assert set(FAMILIES) == set(decoders.families)


def test_the_most_columns_of_a_head_are_those_of_the_step() -> None:
    header = (build.SOURCES / "cpu/decode/decode.h").read_text()
    assert f"constexpr int MAX_HEAD_DIM = {MAX_HEAD_DIM};" in header
    assert MOST_COLUMNS == MAX_HEAD_DIM


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama"}, None),
        ({"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 2}, None),
        ({"model_type": "llama", "hidden_size": 4096, "num_attention_heads": 2}, "2048 columns"),
        ({"model_type": "qwen3", "head_dim": 1040}, "1040 columns"),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 512, "qk_rope_head_dim": 64}, None),
        ({"model_type": "deepseek_v3", "kv_lora_rank": 1024, "qk_rope_head_dim": 64}, "1088 columns"),
        ({"model_type": "mamba2"}, None),
        ({"model_type": "falcon_mamba"}, None),
        ({"model_type": "bamba", "partial_rotary_factor": 0.5}, None),
        ({"model_type": "granitemoehybrid", "rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"model_type": "zamba2", "hidden_act": "gelu"}, None),
        ({"model_type": "nemotron_h"}, None),
        ({"model_type": "nemotron_h", "mamba_hidden_act": "relu2"}, "mamba_hidden_act"),
        ({"model_type": "falcon_h1"}, None),
        ({"model_type": "falcon_h1", "mamba_rms_norm": True}, "mamba_norm_before_gate"),
        ({"model_type": "lfm2_moe"}, None),
        ({"model_type": "gptj"}, None),
        ({"model_type": "bloom"}, "the family bloom"),
        ({"model_type": "falcon"}, None),
        ({"model_type": "falcon", "alibi": True}, "alibi"),
        ({"model_type": "apertus"}, None),
        ({"model_type": "llama", "hidden_act": "xielu"}, "xielu"),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "vision"}, None),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "all"}, "use_bidirectional_attention"),
        ({"model_type": "gemma4_text", "head_dim": 256, "global_head_dim": 1040}, "1040 columns"),
        ({"model_type": "gpt_neox", "rotary_pct": 0.25, "hidden_act": "gelu"}, None),
        ({"model_type": "gpt_neox", "hidden_act": "gelu_fast"}, "gelu_fast"),
        ({"model_type": "hunyuan_v1_moe"}, None),
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [2, 2]}, None),
        ({"model_type": "hunyuan_v1_moe", "moe_topk": [2, 3]}, "moe_topk"),
        ({"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "alpha": 1000.0}}, None),
        ({"model_type": "hunyuan_v1_dense", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "granite_swa", "layer_rope_theta": [0, 10000.0]}, None),
        ({"model_type": "granite_swa", "layer_rope_theta": [0, 0]}, "layer_rope_theta"),
        ({"model_type": "afmoe"}, None),
        ({"model_type": "llama4_text"}, None),
        ({"model_type": "cohere", "use_qk_norm": True}, None),
        ({"model_type": "phi", "qk_layernorm": True}, None),
        ({"model_type": "phi", "partial_rotary_factor": 0.4}, None),
        ({"model_type": "llama", "hidden_act": "relu"}, None),
        ({"model_type": "llama", "hidden_act": "relu6"}, "relu6"),
        ({"model_type": "opt"}, None),
        ({"model_type": "gpt_neo", "activation_function": "relu6"}, "relu6"),
        ({"model_type": "llama", "hidden_act": "gelu"}, None),
        ({"model_type": "mamba2", "hidden_act": "gelu"}, "gelu"),
        ({"model_type": "bamba", "hidden_act": "gelu_pytorch_tanh"}, "gelu_pytorch_tanh"),
        ({"model_type": "llama", "hidden_act": "gelu_pytorch_tanh"}, None),
        # as transformers reads these files: the first Gemma's, and those that say nothing
        ({"model_type": "gemma", "hidden_act": "gelu"}, None),
        ({"model_type": "gemma2"}, None),
        ({"model_type": "gemma3_text", "hidden_activation": "gelu_fast"}, "gelu_fast"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
        (
            {
                "model_type": "gemma3_text",
                "rope_parameters": {"full_attention": {"rope_type": "dynamic"}, "sliding_attention": None},
            },
            "dynamic",
        ),
        # of transformers 4, of older ones, of 5
        ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "dynamic"),
        ({"model_type": "llama", "rope_parameters": {"rope_type": "dynamic"}}, "dynamic"),
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, None),
        ({"model_type": "llama", "rope_scaling": {"type": "su", "factor": 2.0}}, None),
        ({"model_type": "qwen2", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model_type": "phi3", "partial_rotary_factor": 0.75}, None),
        ({"model_type": "stablelm", "use_parallel_residual": True}, None),
        ({"model_type": "stablelm", "qk_layernorm": True}, None),
        ({"model_type": "olmoe", "clip_qkv": None}, None),
        ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv"),
    ],
)
def test_what_a_config_tells(config: dict[str, Any], reason: str | None) -> None:
    told = decline_config(config)
    assert told is None if reason is None else reason in str(told)


def test_how_far_a_sequence_reaches() -> None:
    longrope = {"rope_type": "longrope", "original_max_position_embeddings": 4096, "short_mscale": 1.2}
    assert reach({"model_type": "llama"}) is None
    assert reach({"model_type": "phi3", "rope_parameters": longrope}) == 4096
    assert reach({"model_type": "phimoe", "rope_parameters": {**longrope, "long_mscale": 1.3}}) == 4096
    assert reach({"model_type": "phimoe", "rope_parameters": {**longrope, "long_mscale": 1.2}}) is None
    sharpened = {"rope_type": "yarn", "original_max_position_embeddings": 16384, "llama_4_scaling_beta": 0.1}
    assert reach({"model_type": "ministral3", "rope_parameters": sharpened}) is None
    assert reach({"model_type": "gptj", "n_positions": 1024}) == 1024
    assert reach({"model_type": "opt", "max_position_embeddings": 512}) == 512
    assert reach({"model_type": "gpt_neo"}) == 2048
    assert reach({"model_type": "glm_moe_dsa"}) == 2048
    assert reach({"model_type": "deepseek_v32", "index_topk": 512, "rope_parameters": {"rope_type": "yarn"}}) == 512
    # beside the tables in older files
    older = {"rope_scaling": {"type": "su"}, "original_max_position_embeddings": 2048}
    assert reach({"model_type": "phi3", **older}) == 2048
    assert reach({"model_type": "phi3", "rope_scaling": {"type": "su"}, "max_position_embeddings": 64}) == 64
