"""Every supported family: layout against transformers, then tiny model → quantize → save → load → same logits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.errors import InputError
from llmcompress.export.dense import DenseExporter
from llmcompress.export.native import write_native
from llmcompress.models.alignment import align
from llmcompress.models.assemble import compressed_model
from llmcompress.models.handle import ModelHandle
from llmcompress.models.orientation import canonical
from llmcompress.models.registry import families, layout_from_config
from llmcompress.quant.codecs import codec
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec
from llmcompress.quant.store import BlockPatch, PackedStore

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
MOE = {"moe_intermediate_size": 20, "num_experts": 5, "num_experts_per_tok": 2}
LOCAL = {"num_local_experts": 5, "num_experts_per_tok": 2}
EXPERTS = {
    "first_k_dense_replace": 1, "moe_intermediate_size": 20, "n_routed_experts": 6, "n_shared_experts": 2,
    "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
}  # fmt: skip
LATENT = {
    **EXPERTS, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 10,
    "num_key_value_heads": 4,
}  # fmt: skip
LATENT_ALONE = {key: value for key, value in LATENT.items() if key not in EXPERTS}
# fewer positions than the texts here have
INDEXER = {"index_topk": 5, "index_head_dim": 16, "index_n_heads": 3, "head_dim": None}
LONG = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0, 1.1, 1.2, 1.3], "short_mscale": 1.1,
    "long_factor": [1.0, 2.0, 3.0, 4.0], "long_mscale": 1.2, "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64,
    "beta_fast": 32, "beta_slow": 1, "mscale": 0.7, "mscale_all_dim": 0.7,
}  # fmt: skip
SCALED = {
    "rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
# families whose configs have other words
OLD = {"head_dim": None, "intermediate_size": None, "num_key_value_heads": None}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", LOCAL),
    "mixtral-tied": ("mixtral", {**LOCAL, "tie_word_embeddings": True}),
    "phimoe": ("phimoe", LOCAL),
    "phimoe-biases": ("phimoe", {**LOCAL, "attention_bias": True, "lm_head_bias": True}),
    "phimoe-long": ("phimoe", {**LOCAL, "rope_parameters": LONG, "max_position_embeddings": 256}),
    "qwen2_moe": ("qwen2_moe", {**MOE, "shared_expert_intermediate_size": 24}),
    "qwen2_moe-some-dense": (
        "qwen2_moe",
        {**MOE, "shared_expert_intermediate_size": 24, "decoder_sparse_step": 2, "qkv_bias": False},
    ),
    "qwen3_moe": ("qwen3_moe", MOE),
    "qwen3_moe-some-dense": ("qwen3_moe", {**MOE, "mlp_only_layers": [1], "attention_bias": True}),
    "olmoe": ("olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "head_dim": None}),
    "deepseek_v2": ("deepseek_v2", {**LATENT, "q_lora_rank": None, "topk_method": "greedy", "rope_parameters": YARN}),
    "deepseek_v2-query-latent": (
        "deepseek_v2",
        {**LATENT, "q_lora_rank": 12, "topk_method": "group_limited_greedy", "attention_bias": True, "mlp_bias": True},
    ),
    "deepseek_v3": ("deepseek_v3", {**LATENT, "q_lora_rank": 12}),
    "deepseek_v32": ("deepseek_v32", {**LATENT, **INDEXER, "q_lora_rank": 12, "rope_parameters": YARN}),
    "glm_moe_dsa": ("glm_moe_dsa", {**LATENT, **INDEXER, "q_lora_rank": 12, "attention_bias": True}),
    "glm_moe_dsa-shared": (
        "glm_moe_dsa",
        {
            **LATENT,
            **INDEXER,
            "q_lora_rank": 12,
            "indexer_types": ["full", "shared", "shared"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
    ),
    "gpt_oss": ("gpt_oss", {**LOCAL, "intermediate_size": 20, "sliding_window": 16}),
    "llama": ("llama", {}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama-scaled": ("llama", {"rope_parameters": SCALED}),
    "mistral": ("mistral", {"sliding_window": 16}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0, 1]}),
    "granite": ("granite", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2}),
    "seed_oss": ("seed_oss", {}),
    "seed_oss-biases": ("seed_oss", {"attention_bias": False, "attention_out_bias": True, "mlp_bias": True}),
    "phi3": ("phi3", {"sliding_window": 16}),
    "glm": ("glm", {}),
    "stablelm": ("stablelm", {"use_qkv_bias": True}),
    "stablelm-side-by-side": ("stablelm", {"qk_layernorm": True, "use_parallel_residual": True}),
    "starcoder2": ("starcoder2", {"tie_word_embeddings": True, "sliding_window": 16}),
    "glm4": ("glm4", {}),
    "ministral": ("ministral", {"sliding_window": 16}),
    "ministral3": ("ministral3", {"rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}}),
    "helium": ("helium", {"attention_bias": True}),
    "cwm": ("cwm", {"sliding_window": 16, "rope_parameters": SCALED}),
    "arcee": ("arcee", {"mlp_bias": True, "attention_bias": True}),
    "nemotron": ("nemotron", {"attention_bias": True}),
    "cohere": ("cohere", {"tie_word_embeddings": True, "head_dim": None}),
    "cohere-normed": ("cohere", {"tie_word_embeddings": True, "head_dim": None, "use_qk_norm": True}),
    "cohere2": ("cohere2", {"sliding_window": 16, "attention_bias": True, "head_dim": None}),
    "phi": ("phi", {"head_dim": None}),
    "phi-normed": ("phi", {"head_dim": None, "qk_layernorm": True}),
    "gpt_neox": ("gpt_neox", {"num_key_value_heads": None, "head_dim": None}),
    "gpt_neox-one-by-one": (
        "gpt_neox",
        {
            "num_key_value_heads": None,
            "head_dim": None,
            "use_parallel_residual": False,
            "attention_bias": False,
            "tie_word_embeddings": True,
        },
    ),
    "internlm3": ("internlm3", {"attention_bias": True, "mlp_bias": True}),
    "iquestcoder": ("iquestcoder", {}),
    "jais2": ("jais2", {}),
    "olmo": ("olmo", {"head_dim": None, "attention_bias": True}),
    "hyperclovax": ("hyperclovax", {"residual_multiplier": 0.3, "embedding_multiplier": 3.0, "logits_scaling": 0.5}),
    "hyperclovax-no-norms": ("hyperclovax", {"use_post_norm": False, "attention_bias": True, "mlp_bias": True}),
    "vaultgemma": ("vaultgemma", {"tie_word_embeddings": True, "sliding_window": 16}),
    "youtu": ("youtu", {**LATENT_ALONE, "q_lora_rank": 12, "attention_bias": True}),
    "youtu-no-query-latents": ("youtu", {**LATENT_ALONE, "q_lora_rank": None}),
    "minicpm3": ("minicpm3", {**LATENT_ALONE, "q_lora_rank": 12, "scale_depth": 0.7, "dim_model_base": 16}),
    "minicpm3-plain": (
        "minicpm3",
        {**LATENT_ALONE, "q_lora_rank": None, "v_head_dim": None, "scale_depth": None, "attention_bias": True},
    ),
    "apertus": ("apertus", {"attention_bias": True}),
    "apertus-relu": ("apertus", {"hidden_act": "relu2"}),
    "nanochat": ("nanochat", {"attention_bias": True}),
    "gptj": ("gptj", {**OLD, "n_embd": 32, "n_layer": 3, "n_head": 4, "rotary_dim": 4}),
    "falcon": ("falcon", {**OLD, "tie_word_embeddings": True}),
    "falcon-groups": ("falcon", {**OLD, "new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon-one-norm": (
        "falcon",
        {**OLD, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
    ),
    "falcon-one-by-one": ("falcon", {**OLD, "multi_query": False, "parallel_attn": False, "alibi": True, "bias": True}),
    "opt": ("opt", {**OLD, "ffn_dim": 48, "tie_word_embeddings": True}),
    "opt-no-biases": ("opt", {**OLD, "ffn_dim": 48, "enable_bias": False}),
    "gpt_neo": ("gpt_neo", {**OLD, "attention_types": [[["global", "local"], 1], [["global"], 1]], "window_size": 5}),
    "exaone4": ("exaone4", {"sliding_window": 16}),
    "olmo2": ("olmo2", {"attention_bias": True}),
    "olmo3": ("olmo3", {"sliding_window": 16}),
    "glm4_moe": ("glm4_moe", {**EXPERTS, "use_qk_norm": True, "routed_scaling_factor": 2.5}),
    "glm4_moe-plain": ("glm4_moe", {**EXPERTS, "attention_bias": True, "norm_topk_prob": False}),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": ("gemma2", {"tie_word_embeddings": True, "sliding_window": 16}),
    "gemma3_text": ("gemma3_text", {"tie_word_embeddings": True, "sliding_window": 16}),
}
DELTA = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 12,
    "linear_conv_kernel_dim": 3,
}  # fmt: skip
KIMI = {
    "moe_intermediate_size": 20, "num_experts": 6, "num_shared_experts": 2, "num_experts_per_token": 3,
    "num_expert_group": 2, "topk_group": 1, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12,
    "v_head_dim": 10, "num_key_value_heads": 4, "head_dim": None, "linear_num_heads": 3, "linear_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}  # fmt: skip
SHORT = {"head_dim": None, "layer_types": ["conv", "full_attention", "conv"]}
VARIANTS |= {
    "qwen3_next": (
        "qwen3_next",
        {
            **MOE, **DELTA, "shared_expert_intermediate_size": 24,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "qwen3_next-some-dense": (
        "qwen3_next",
        {
            **MOE, **DELTA, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0], "attention_bias": True,
            "num_hidden_layers": 4, "norm_topk_prob": False,
        },
    ),
    "qwen3_5_moe_text": (
        "qwen3_5_moe_text", {**MOE, **DELTA, "shared_expert_intermediate_size": 24, "num_hidden_layers": 4}
    ),
    "qwen3_5_text": ("qwen3_5_text", {**DELTA, "num_hidden_layers": 4, "tie_word_embeddings": True}),
    "olmo_hybrid": (
        "olmo_hybrid",
        {**DELTA, "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": None},
    ),
    "olmo_hybrid-equal-heads": ("olmo_hybrid", {"linear_conv_kernel_dim": 3, "head_dim": None, "attention_bias": True}),
    "kimi_linear": ("kimi_linear", {**KIMI, "num_hidden_layers": 5, "q_lora_rank": None}),
    "kimi_linear-kinds": (
        "kimi_linear",
        {
            **KIMI, "q_lora_rank": 12, "attention_bias": True, "tie_word_embeddings": False,
            "layer_types": ["full_attention", "linear_attention", "linear_attention"],
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
    ),
    "minimax": (
        "minimax",
        {
            **LOCAL, "intermediate_size": 20, "block_size": 4, "full_attn_alpha_factor": 1.5, "mlp_beta_factor": 0.7,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"], "linear_attn_beta_factor": 0.8,
        },
    ),
    "minimax_m2": ("minimax_m2", {**LOCAL, "intermediate_size": 20, "rotary_dim": 4}),
    "ernie4_5_moe": (
        "ernie4_5_moe",
        {"moe_intermediate_size": 20, "moe_num_experts": 5, "moe_k": 2, "tie_word_embeddings": True},
    ),
    "ernie4_5_moe-biases": (
        "ernie4_5_moe",
        {
            "moe_intermediate_size": 20, "moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 0,
            "moe_layer_interval": 2, "moe_layer_start_index": 0, "moe_layer_end_index": 1, "use_bias": True,
        },
    ),
    "ernie4_5": ("ernie4_5", {}),
    "glm4_moe_lite": ("glm4_moe_lite", {**LATENT, "q_lora_rank": 12, "head_dim": None}),
    "glm4_moe_lite-kinds": (
        "glm4_moe_lite",
        {
            **LATENT, "q_lora_rank": None, "head_dim": None, "attention_bias": True,
            "mlp_layer_types": ["sparse", "sparse", "dense"],
        },
    ),
    "solar_open": ("solar_open", {**EXPERTS, "routed_scaling_factor": 1.5, "attention_bias": True}),
    "exaone_moe": (
        "exaone_moe",
        {
            "moe_intermediate_size": 20, "num_experts": 6, "num_shared_experts": 2, "num_experts_per_tok": 3,
            "n_group": 2, "topk_group": 1, "sliding_window": 16,
        },
    ),
    "dots1": ("dots1", {**EXPERTS, "routed_scaling_factor": 2.5, "norm_topk_prob": True}),
    "hunyuan_v1_moe": ("hunyuan_v1_moe", {"num_experts": 5, "moe_topk": 2, "intermediate_size": 20}),
    "hunyuan_v1_moe-by-layer": (
        "hunyuan_v1_moe", {"num_experts": 5, "moe_topk": [1, 2, 3], "attention_bias": True}
    ),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", {"tie_word_embeddings": True}),
    "granitemoe": ("granitemoe", {**LOCAL, "residual_multiplier": 0.3, "head_dim": None}),
    "granitemoeshared": (
        "granitemoeshared",
        {**LOCAL, "residual_multiplier": 0.3, "head_dim": None, "shared_intermediate_size": 24},
    ),
    "granitemoeshared-alone": ("granitemoeshared", {**LOCAL, "head_dim": None, "attention_bias": True}),
    "lfm2": ("lfm2", {**SHORT, "block_multiple_of": 16}),
    "lfm2-biases": ("lfm2", {**SHORT, "conv_bias": True, "block_auto_adjust_ff_dim": False}),
    "lfm2_moe": ("lfm2_moe", {**MOE, **SHORT, "num_dense_layers": 1, "routed_scaling_factor": 1.3}),
    "lfm2_moe-uncorrected": (
        "lfm2_moe", {**MOE, **SHORT, "num_dense_layers": 1, "use_expert_bias": False, "norm_topk_prob": False}
    ),
    "flex_olmo": ("flex_olmo", {"num_experts": 5, "num_experts_per_tok": 2, "head_dim": None}),
}  # fmt: skip
NEAR = ["sliding_attention", "full_attention", "sliding_attention"]
VARIANTS |= {
    "afmoe": (
        "afmoe",
        {**MOE, "num_shared_experts": 2, "route_scale": 1.7, "mup_enabled": True, "sliding_window": 4},
    ),
    "afmoe-biases": (
        "afmoe",
        {**MOE, "num_shared_experts": 1, "num_dense_layers": 0, "attention_bias": True, "layer_types": NEAR},
    ),
    "mimo_v2_flash": (
        "mimo_v2_flash",
        {
            "moe_intermediate_size": 20, "n_routed_experts": 6, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
            "v_head_dim": 6, "sliding_window": 4, "num_key_value_heads": 1, "routed_scaling_factor": 1.5,
        },
    ),
    "mimo_v2_flash-kinds": (
        "mimo_v2_flash",
        {
            "moe_intermediate_size": 20, "n_routed_experts": 6, "num_experts_per_tok": 3, "v_head_dim": 12,
            "layer_types": NEAR, "mlp_layer_types": ["sparse", "dense", "sparse"], "attention_bias": True,
            "norm_topk_prob": False,
        },
    ),
    "llama4_text": (
        "llama4_text",
        {**LOCAL, "num_experts_per_tok": 1, "intermediate_size_mlp": 80, "attention_chunk_size": 4, "floor_scale": 3},
    ),
    "llama4_text-some-dense": (
        "llama4_text",
        {
            **LOCAL, "intermediate_size_mlp": 80, "interleave_moe_layer_step": 2, "use_qk_norm": False,
            "no_rope_layers": [1, 0, 1], "attention_bias": True,
        },
    ),
    "llama4_text-dense": ("llama4_text", {**LOCAL, "intermediate_size_mlp": 80, "moe_layers": []}),
    "gemma4_text": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0, "global_head_dim": 12, "sliding_window": 4, "attention_bias": True,
            "final_logit_softcapping": 2.0, "layer_types": NEAR, "tie_word_embeddings": True,
        },
    ),
    "gemma4_text-experts": (
        "gemma4_text",
        {
            "hidden_size_per_layer_input": 0, "global_head_dim": 12, "sliding_window": 4, "attention_k_eq_v": True,
            "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 5, "top_k_experts": 2,
            "moe_intermediate_size": 20,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "hy_v3": ("hy_v3", {**MOE, "num_shared_experts": 2, "router_scaling_factor": 2.5}),
    "hy_v3-kinds": (
        "hy_v3",
        {
            **MOE, "mlp_layer_types": ["sparse", "dense", "sparse"], "mlp_bias": True, "attention_bias": True,
            "enable_moe_fp32_combine": False,
        },
    ),
    "laguna": (
        "laguna",
        {
            **MOE, "shared_expert_intermediate_size": 24, "num_attention_heads_per_layer": [4, 2, 6],
            "moe_routed_scaling_factor": 2.5, "layer_types": NEAR, "sliding_window": 4,
        },
    ),
    "laguna-gates": (
        "laguna",
        {
            **MOE, "shared_expert_intermediate_size": 24, "gating": "per-element", "attention_bias": True,
            "mlp_layer_types": ["sparse", "dense", "sparse"],
        },
    ),
    "mellum": ("mellum", {**MOE, "layer_types": NEAR, "sliding_window": 4}),
    "mellum-kinds": (
        "mellum", {**MOE, "mlp_layer_types": ["sparse", "dense", "sparse"], "attention_bias": True, "num_mtp_layers": 1}
    ),
    "cohere2_moe": ("cohere2_moe", {**MOE, "tie_word_embeddings": True, "sliding_window": 4, "logit_scale": 0.3}),
    "cohere2_moe-shared": (
        "cohere2_moe",
        {
            **MOE, "num_shared_experts": 2, "expert_selection_fn": "sigmoid", "first_k_dense_replace": 1,
            "prefix_dense_intermediate_size": 80, "attention_bias": True, "rms_norm_eps": 1e-5,
        },
    ),
    "cohere2_moe-sum": (
        "cohere2_moe",
        {
            **MOE, "num_shared_experts": 1, "expert_selection_fn": "sigmoid", "norm_topk_prob": False,
            "shared_expert_combination_strategy": "sum",
        },
    ),
    "granite_swa": (
        "granite_swa",
        {
            "residual_multiplier": 0.3, "attention_multiplier": 0.2, "sliding_window": 4, "head_dim": None,
            "layer_rope_theta": [10000.0, 0, 500.0], "tie_word_embeddings": True,
        },
    ),
    "granitemoe_swa": (
        "granitemoe_swa",
        {
            **LOCAL, "residual_multiplier": 0.3, "sliding_window": 4, "head_dim": None, "shared_intermediate_size": 24,
            "layer_rope_theta": [10000.0, 0, 500.0],
        },
    ),
}  # fmt: skip
SCAN2 = {
    "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 12, "mamba_chunk_size": 4,
    "head_dim": None,
}  # fmt: skip
SHARED = {
    "n_mamba_heads": 8, "mamba_ngroups": 2, "mamba_d_state": 12, "chunk_size": 4, "tie_word_embeddings": True,
    "adapter_rank": 6, "num_key_value_heads": None, "head_dim": None, "num_hidden_layers": 4,
    "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
}  # fmt: skip
UNGATED = {
    "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 12, "chunk_size": 4,
    "layers_block_type": ["linear_attention", "full_attention", "moe"], "n_routed_experts": 6, "num_experts_per_tok": 2,
    "moe_intermediate_size": 20, "moe_shared_expert_intermediate_size": 24, "routed_scaling_factor": 1.7,
}  # fmt: skip
VARIANTS |= {
    "mamba": ("mamba", {"state_size": 6, "tie_word_embeddings": True}),
    "mamba-biases": ("mamba", {"state_size": 6, "use_bias": True, "use_conv_bias": False, "time_step_rank": 3}),
    "falcon_mamba": ("falcon_mamba", {"state_size": 6}),
    "mamba2": (
        "mamba2",
        {"num_heads": 8, "head_dim": 8, "n_groups": 2, "state_size": 12, "chunk_size": 4, "use_bias": True},
    ),
    "bamba": ("bamba", {**SCAN2, "attn_layer_indices": [1]}),
    "falcon_h1": (
        "falcon_h1",
        {
            **SCAN2, "mamba_d_ssm": 64, "mamba_rms_norm": True, "ssm_out_multiplier": 0.7,
            "attention_in_multiplier": 0.8, "attention_out_multiplier": 0.9, "mlp_multipliers": [0.9, 1.1],
            "ssm_multipliers": [0.9, 0.8, 1.1, 1.2, 0.7],
        },
    ),
    "falcon_h1-gated": ("falcon_h1", {**SCAN2, "mamba_d_ssm": 64, "mamba_rms_norm": False, "projectors_bias": True}),
    "granitemoehybrid": (
        "granitemoehybrid",
        {
            **SCAN2, **LOCAL, "shared_intermediate_size": 24, "residual_multiplier": 0.3,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "granitemoehybrid-dense": (
        "granitemoehybrid",
        {
            **SCAN2, "num_local_experts": 0, "shared_intermediate_size": 24, "position_embedding_type": "rope",
            "layer_types": ["mamba", "mamba", "attention"],
        },
    ),
    "nemotron_h": (
        "nemotron_h",
        {
            "mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 12, "chunk_size": 4,
            "layers_block_type": ["linear_attention", "full_attention", "mlp"], "time_step_limit": [0.01, 2.0],
        },
    ),
    "nemotron_h-experts": ("nemotron_h", UNGATED),
    "nemotron_h-latent": (
        "nemotron_h",
        {**UNGATED, "moe_latent_size": 12, "mlp_bias": True, "n_group": 2, "topk_group": 1, "norm_topk_prob": False},
    ),
    "zamba2": ("zamba2", SHARED),
    "zamba2-adapters": (
        "zamba2",
        {
            **SHARED, "num_mem_blocks": 2, "use_shared_attention_adapter": True, "use_mem_rope": True,
            "add_bias_linear": True, "num_hidden_layers": 5,
            "layers_block_type": ["hybrid", "mamba", "hybrid", "hybrid", "hybrid"],
        },
    ),
    "jamba": (
        "jamba",
        {
            **MOE, "mamba_d_state": 6, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 0,
        },
    ),
}  # fmt: skip
# names of one expert's tensors and of the router in hub checkpoints
SPLIT = ["mlp.experts.1.gate_proj.weight", "mlp.experts.1.up_proj.weight", "mlp.experts.1.down_proj.weight"]
W123 = [f"block_sparse_moe.experts.1.{name}.weight" for name in ("w1", "w2", "w3")]
DISK_NAMES = {
    "mixtral": [*W123, "block_sparse_moe.gate.weight"],
    "kimi_linear": [
        *W123,
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.gate.e_score_correction_bias",
        "block_sparse_moe.shared_experts.up_proj.weight",
    ],
    "minimax": [*W123, "block_sparse_moe.gate.weight"],
    "minimax_m2": [*W123, "block_sparse_moe.gate.weight", "block_sparse_moe.e_score_correction_bias"],
    "phimoe": [*W123, "block_sparse_moe.gate.weight"],
    **{
        name: [*SPLIT, "mlp.gate.weight"]
        for name in (
            "qwen2_moe",
            "qwen3_moe",
            "olmoe",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "glm_moe_dsa",
            "glm4_moe",
            "glm4_moe_lite",
            "dots1",
            "flex_olmo",
            "solar_open",
            "qwen3_next",
            "qwen3_5_moe_text",
            "mimo_v2_flash",
            "mellum",
            "cohere2_moe",
        )
    },
    "afmoe": [*SPLIT, "mlp.router.gate.weight", "mlp.expert_bias"],
    "hy_v3": [*SPLIT, "mlp.router.gate.weight", "mlp.expert_bias", "mlp.shared_mlp.up_proj.weight"],
    "laguna": [*SPLIT, "mlp.gate.weight", "mlp.experts.e_score_correction_bias", "mlp.shared_expert.up_proj.weight"],
    "exaone_moe": [*SPLIT, "mlp.gate.weight", "mlp.e_score_correction_bias"],
    "ernie4_5_moe": [*SPLIT, "mlp.gate.weight", "mlp.moe_statics.e_score_correction_bias"],
    "hunyuan_v1_moe": [*SPLIT, "mlp.gate.wg.weight"],
    "lfm2_moe": [*(f"feed_forward.experts.1.{n}.weight" for n in ("w1", "w2", "w3")), "feed_forward.gate.weight"],
    **{
        name: [f"block_sparse_moe.{n}.weight" for n in ("input_linear", "output_linear", "router.layer")]
        for name in ("granitemoe", "granitemoeshared")
    },
    "granitemoe_swa": [f"block_sparse_moe.{n}" for n in ("experts.gate_up_proj", "experts.down_proj", "router.weight")],
    "llama4_text": [f"feed_forward.{n}" for n in ("experts.gate_up_proj", "experts.down_proj", "router.weight")],
    "gemma4_text": ["experts.gate_up_proj", "experts.down_proj", "router.proj.weight", "router.per_expert_scale"],
    "gpt_oss": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj", "mlp.router.weight", "mlp.router.bias"],
    "jamba": [*(name.replace("mlp.", "feed_forward.") for name in SPLIT), "feed_forward.router.weight"],
    "nemotron_h": [*(f"mixer.experts.1.{n}_proj.weight" for n in ("up", "down")), "mixer.gate.weight"],
    "granitemoehybrid": [f"block_sparse_moe.{n}.weight" for n in ("input_linear", "output_linear", "router.layer")],
}
IDS = torch.tensor([[5, 9, 1, 33, 60, 2, 17, 8], [1, 2, 3, 4, 5, 6, 7, 8]])


def tiny_model(variant: str) -> Any:
    """A random float32 model; norms, routers and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, changes = VARIANTS[variant]
    config = AutoConfig.for_model(model_type, **{k: v for k, v in {**BASE, **changes}.items() if v is not None})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            scale = 0.3 if "embed" in name or tensor.ndim < 2 else tensor.shape[-1] ** -0.5
            tensor.copy_(torch.randn_like(tensor) * scale + (1.0 if "norm" in name else 0.0))
    # torch.matmul takes another order of sums where a gradient is wanted
    return model.requires_grad_(False)


def round_to_nearest(weight: torch.Tensor, spec: QuantSpec) -> PackedWeight:
    rows = weight.shape[-2] - spec.dense_rows
    dense = weight[rows:] if spec.dense_rows else None
    weight = weight[..., :rows, :].float()
    scale, zero = find_grid(weight, spec, "minmax")
    return codec("int_group").encode(round_codes(weight, scale, zero, spec), scale, zero, spec, dense)


def quantize_everything(handle: ModelHandle, root: Path) -> PackedStore:
    """4-bit symmetric linears, 3-bit asymmetric experts, 2-bit down projections, one replaced router."""
    store = PackedStore(root)
    for block in handle.layout.blocks:
        packed: dict[str, PackedWeight] = {}
        for linear in block.linears():
            weight = handle.checkpoint.tensor(f"{linear.name}.weight")
            spec = QuantSpec(4, 16, symmetric=True, dense_rows=linear.kept_rows)
            packed[linear.name] = round_to_nearest(weight, spec)
        replaced = {}
        bank = block.bank
        if bank is not None:
            for name, spec in ((bank.gate_up, QuantSpec(3, 16)), (bank.down, QuantSpec(2, -1))):
                packed[name] = round_to_nearest(canonical(bank, name, handle.checkpoint.tensor(name)), spec)
            router = bank.router.weight
            replaced[router] = handle.checkpoint.tensor(router).float() * 1.01
        store.write_block(block.index, BlockPatch(packed, replaced))
    return store


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(IDS).logits


def check_same(found: torch.Tensor, expected: torch.Tensor, variant: str) -> None:
    """The same bits; Llama 4 may sum in another order, for transformers runs every expert on every token."""
    if variant.startswith("llama4"):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    else:
        assert torch.equal(found, expected)


def disk_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        return set(handle.keys())


def test_every_family_has_a_variant_here() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == set(families())


@pytest.mark.parametrize("model_type", sorted({model_type for model_type, _ in VARIANTS.values()}))
def test_defaults_are_those_of_transformers(model_type: str) -> None:
    from transformers import AutoConfig

    # what has no default every released config sets
    given: dict[str, Any] = {
        "deepseek_v2": {"num_experts_per_tok": 6},
        "dots1": {"num_experts_per_tok": 6, "n_routed_experts": 128, "n_shared_experts": 2},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
        "gemma4_text": {"hidden_size_per_layer_input": 0},
    }.get(model_type, {})
    full = AutoConfig.for_model(model_type, **given).to_dict()
    assert layout_from_config({"model_type": model_type, **given}) == layout_from_config(full)


@pytest.mark.parametrize("variant", VARIANTS)
def test_family(variant: str, tmp_path: Path) -> None:
    from llmcompress import hf

    model = tiny_model(variant)
    source = tmp_path / "source"
    model.save_pretrained(source)
    handle = ModelHandle.open(source)

    # the layout is complete and every shape is right, from the file and from the config in memory
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if handle.layout.tied:
        del expected["lm_head.weight"]
    copies = tuple(f"{block.loan.module}." for block in handle.layout.blocks if block.loan is not None)
    expected = {name: shape for name, shape in expected.items() if not (copies and name.startswith(copies))}
    assert {view.name: view.shape for view in handle.layout.tensors()} == expected
    assert layout_from_config(model.config.to_dict()) == handle.layout
    assert handle.parameters == sum(p.numel() for p in model.parameters()) + sum(
        b.numel() for n, b in model.named_buffers() if n in expected
    )
    kinds = {type(model.get_submodule(linear.name)) for block in handle.layout.blocks for linear in block.linears()}
    # Falcon's multiply and add in two steps
    assert {kind.__name__ for kind in kinds} == {"FalconLinear" if handle.layout.model_type == "falcon" else "Linear"}

    # files name things as hub checkpoints do, and the checkpoint reads them back under run-time names
    last = handle.layout.blocks[-1 if handle.layout.blocks[-1].bank is not None else 1]
    if last.bank is not None:
        wanted = {f"{last.name}.{name}" for name in DISK_NAMES[handle.layout.model_type]}
        if handle.layout.model_type == "nemotron_h":
            wanted = {name.replace("model.", "backbone.", 1) for name in wanted}
        assert wanted <= disk_names(source)
    for name, tensor in model.state_dict().items():
        if name in expected:
            assert torch.equal(handle.checkpoint.tensor(name), tensor), name
    handle.checkpoint.verify(check_values=True)
    dense = handle.dense_model()
    check_same(logits(dense), logits(model), variant)

    # compress, save, load
    store = quantize_everything(handle, tmp_path / "blocks")
    compressed = compressed_model(handle, store, {})
    found = logits(compressed)
    assert torch.isfinite(found).all()
    assert not torch.equal(found, logits(model))
    artifact = tmp_path / "artifact"
    write_native(handle, store, {}, artifact, {"test": variant})
    loaded, tokenizer = hf.load(artifact)
    assert tokenizer is None
    assert torch.equal(logits(loaded.requires_grad_(False)), found)
    assert loaded.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 11)
    quantized = {name for name, *_ in handle.layout.quantizable()}
    assert set(json.loads((artifact / "config.json").read_text())["quantization_config"]["modules"]) == quantized


@pytest.mark.parametrize("variant", VARIANTS)
def test_dense_weights_are_found_by_transformers(variant: str, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "source")
    handle = ModelHandle.open(tmp_path / "source")
    DenseExporter().write(handle, PackedStore(tmp_path / "nothing"), {}, tmp_path / "out", {})
    found, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    align(found)  # a mapped file puts tensors anywhere, and last bits may depend on that
    assert torch.equal(logits(found.requires_grad_(False)), logits(model))


@pytest.mark.parametrize(
    "variant", ["mixtral", "gpt_oss", "deepseek_v2", "nemotron_h-latent", "llama4_text", "llama4_text-some-dense"]
)
def test_packed_experts_agree_with_dense_experts_of_the_same_values(variant: str, tmp_path: Path) -> None:
    """Ties the operator to transformers' own experts: orientation, interleaving, biases, activation."""
    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "source")
    handle = ModelHandle.open(tmp_path / "source")
    store = quantize_everything(handle, tmp_path / "blocks")
    from llmcompress.models.orientation import family_orientation

    with torch.no_grad():
        for block in handle.layout.blocks:
            patch = store.read_block(block.index)
            for linear in block.linears():
                decoded = codec("int_group").decode(patch.packed[linear.name])
                model.get_submodule(linear.name).weight.copy_(decoded)
            for name, tensor in patch.replaced.items():
                model.get_parameter(name).copy_(tensor)
            bank = block.bank
            if bank is not None:
                for name in (bank.gate_up, bank.down):
                    decoded = codec("int_group").decode(patch.packed[name])
                    model.get_parameter(name).copy_(family_orientation(bank, name, decoded))
    torch.testing.assert_close(logits(compressed_model(handle, store, {})), logits(model), atol=1e-5, rtol=1e-4)


def _with_eyes(variant: str) -> Any:
    """A tiny model of text and images whose text part is this."""
    import transformers

    own, changes = VARIANTS[variant]
    text = {k: v for k, v in {**BASE, **changes}.items() if v is not None}
    if own == "llama4_text":
        eyes = {
            "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14, "vision_output_dim": 32, "projector_input_dim": 32,
            "projector_output_dim": 32,
        }  # fmt: skip
        llama = transformers.Llama4Config(text_config=text, vision_config=eyes)
        return transformers.Llama4ForConditionalGeneration(llama)
    if own == "gemma4_text":
        eyes = {
            "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "head_dim": 8, "position_embedding_size": 16,
        }  # fmt: skip
        text["tie_word_embeddings"] = True
        gemma = transformers.Gemma4Config(text_config=text, vision_config=eyes, audio_config=None)
        return transformers.Gemma4ForConditionalGeneration(gemma)
    # the frequencies of three axes of positions share the turned quarter of a head
    text |= {"head_dim": 32, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    eyes = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    config = transformers.Qwen3_5MoeConfig(text_config=text, vision_config=eyes, tie_word_embeddings=False)
    return transformers.Qwen3_5MoeForConditionalGeneration(config)


@pytest.mark.parametrize("variant", ["qwen3_5_moe_text", "llama4_text", "gemma4_text-experts"])
def test_the_text_part_of_a_multimodal_model_is_saved_as_its_refusal_says(variant: str, tmp_path: Path) -> None:
    import transformers

    torch.manual_seed(0)
    whole = _with_eyes(variant).float().eval().requires_grad_(False)
    whole.save_pretrained(tmp_path / "whole")
    with pytest.raises(InputError, match="several modalities") as caught:
        ModelHandle.open(tmp_path / "whole")
    step = re.search(r"(?<=first: ).*?save_pretrained\(NEW\)", str(caught.value.hint))
    assert step is not None
    names = {name: getattr(transformers, name) for name in ("AutoConfig", "AutoModelForCausalLM", "Gemma4ForCausalLM")}
    exec(step[0], {**names, "PATH": tmp_path / "whole", "NEW": tmp_path / "text"})
    handle = ModelHandle.open(tmp_path / "text")
    assert handle.layout.model_type == VARIANTS[variant][0]
    torch.testing.assert_close(logits(handle.dense_model()), logits(whole), atol=1e-5, rtol=1e-5)


def test_models_with_a_cache_of_their_own_are_not_given_another() -> None:
    from llmcompress.inference.caches import empty_cache

    assert len(empty_cache(tiny_model("olmo_hybrid")).layers) == 3
    with pytest.raises(InputError, match="minimax have a cache of their own"):
        empty_cache(tiny_model("minimax"))


@pytest.mark.parametrize("variant", VARIANTS)
def test_smoothed_weights_compute_the_same_bits(variant: str, tmp_path: Path) -> None:
    """Whatever reads an input beside its linears, or makes it in another way than the layout says, would show here."""
    from llmcompress.models.smoothable import smoothable

    model = tiny_model(variant)
    model.save_pretrained(tmp_path / "source")
    handle = ModelHandle.open(tmp_path / "source")
    scales: dict[str, list[tuple[int, torch.Tensor]]] = {}
    generator = torch.Generator().manual_seed(0)
    for _, found in smoothable(handle.layout):
        factor = torch.exp2(torch.randint(-3, 4, (found.linears[0].in_features,), generator=generator).float())
        for name in found.makers:
            scales.setdefault(name, []).append((0, 1 / factor))
        for linear in found.linears:
            scales.setdefault(f"{linear.name}.weight", []).append((1, factor))
    # FlexOlmo has no norm before a sublayer, Nemotron's add one, nanochat's have no weights, a router reads all of
    # Cohere's, MiniMax-01's stay in the stream, and no linear reads what another makes
    if variant in ("flex_olmo", "nemotron", "nanochat", "cohere2_moe", "minimax"):
        assert not scales
        return
    # Gemma's norms add one to their weight, an MLP without a gate is not linear; all else has something to smooth
    assert scales, variant
    rescaled = handle.rescaled(scales)
    assert not torch.equal(rescaled.checkpoint.tensor(next(iter(scales))), handle.checkpoint.tensor(next(iter(scales))))
    plain = logits(handle.dense_model().requires_grad_(False))
    assert torch.equal(logits(rescaled.dense_model().requires_grad_(False)), plain)
    check_same(plain, logits(model), variant)
