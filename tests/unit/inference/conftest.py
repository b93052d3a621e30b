"""Tiny random decoders of the families that the native engine covers, dense and packed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from llmcompress.errors import InputError
from llmcompress.inference.coverage import DELTAS
from llmcompress.inference.generate import Generator, Sampling
from llmcompress.inference.native import decline
from llmcompress.inference.speed import rounded
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.adapted_mixtures import adapt_mixtures
from llmcompress.nn.mixers import attach
from llmcompress.quant.spec import QuantSpec
from llmcompress.serving.rows import NativeRows

_SIZES: dict[str, Any] = {
    "vocab_size": 72, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 8, "max_position_embeddings": 512, "tie_word_embeddings": False, "intermediate_size": 80,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
_LATENT: dict[str, Any] = {
    "head_dim": None, "num_key_value_heads": 6, "kv_lora_rank": 48, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16,
    "v_head_dim": 48, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
    "n_shared_experts": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3,
}  # fmt: skip
_LATENT_ALONE = {key: _LATENT[key] for key in ("head_dim", "num_key_value_heads", *(k for k in _LATENT if "_dim" in k))}
_LATENT_ALONE |= {"kv_lora_rank": 48}
# gated delta rules in three of four layers
_RULES: dict[str, Any] = {
    "vocab_size": 72, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "num_key_value_heads": 1,
    "head_dim": 32, "max_position_embeddings": 512, "intermediate_size": 80, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 12, "linear_value_head_dim": 48, "num_experts": 6,
    "num_experts_per_tok": 3, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
}  # fmt: skip
# projections apart, step sizes up to two, attention without positions and with norms after it; no experts
_OLMO: dict[str, Any] = {key: None for key in _RULES if "expert" in key or key == "moe_intermediate_size"}
_OLMO |= {"rope_parameters": None, "linear_allow_neg_eigval": True, "linear_key_head_dim": 24}
# decays along keys, latents without positions, the first layer dense
_KIMI: dict[str, Any] = {
    **{key: _RULES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size")},
    "num_attention_heads": 3, "num_key_value_heads": 3, "head_dim": None, "linear_num_heads": 3,
    "linear_head_dim": 32, "layer_types": [*["linear_attention"] * 3, "full_attention"], "kv_lora_rank": 48,
    "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 48, "num_local_experts": 6, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 48,
}  # fmt: skip
# three layers that decay by constants, normed inputs in the place of hidden states
_LIGHTNING: dict[str, Any] = {
    **{key: _RULES[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")},
    "num_key_value_heads": 1, "head_dim": 32, "intermediate_size": 80, "num_local_experts": 6, "num_experts_per_tok": 3,
    "block_size": 16, "layer_types": [*["linear_attention"] * 3, "full_attention"], "linear_attn_alpha_factor": 1.4,
    "linear_attn_beta_factor": 0.7, "full_attn_alpha_factor": 0.9, "full_attn_beta_factor": 1.2,
    "mlp_alpha_factor": 1.1, "mlp_beta_factor": 0.8,
}  # fmt: skip
_WITH_RULES = {"olmo_hybrid": {**_RULES, **_OLMO}, "kimi_linear": _KIMI, "minimax": _LIGHTNING}
_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    # biases, grouped heads of a size that is no multiple of a vector
    "qwen2": {"head_dim": None},
    "qwen3": {"head_dim": 24, "num_key_value_heads": 1},
    "mistral": {"num_key_value_heads": 6, "sliding_window": None},
    # a layer whose queries and keys are not turned
    "smollm3": {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]},
    "seed_oss": {"attention_bias": True, "attention_out_bias": True, "mlp_bias": True},
    "granite": {
        "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 0.5,
        "head_dim": None,
    },
    "mixtral": {"num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40, "norm_topk_prob": False,
        "decoder_sparse_step": 1, "mlp_only_layers": [0],
    },
    # a shared expert with a share of its own, wider than the others; dense layers among the sparse ones
    "qwen2_moe": {
        "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "norm_topk_prob": False,
        "shared_expert_intermediate_size": 112, "num_hidden_layers": 4, "decoder_sparse_step": 2,
        "mlp_only_layers": [1], "head_dim": None,
    },
    # LayerNorm, biases everywhere, sparsemixer
    "phimoe": {
        "num_local_experts": 6, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True,
        "router_jitter_noise": 0.1,
    },
    # queries and keys normed over all heads
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 3},
    # norms after each sublayer and none before; queries and keys normed over all heads
    "olmo2": {},
    # and layers that see a window, with rotary tables of their own
    "olmo3": {
        "num_hidden_layers": 3, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    },
    # half of a head turned; sigmoids with a correction, groups of experts, a dense layer first
    "glm4_moe": {
        "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 48, "n_shared_experts": 2, "first_k_dense_replace": 1, "num_hidden_layers": 3,
        "n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.7,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    # latents; pairs turned side by side, queries made of few numbers, softmax within groups
    "deepseek_v2": {
        **_LATENT, "q_lora_rank": 48, "n_group": 4, "topk_group": 2, "topk_method": "group_limited_greedy",
        "routed_scaling_factor": 3.0,
    },
    "glm4_moe_lite": {
        **{key: value for key, value in _LATENT.items() if key != "first_k_dense_replace"}, "q_lora_rank": 48,
        "n_group": 4, "topk_group": 3, "routed_scaling_factor": 1.8,
    },
    # sinks, windows, biases everywhere, experts transposed with gates between what they open
    "gpt_oss": {
        "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": 16, "intermediate_size": 48,
        "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention"], "swiglu_limit": 0.7,
    },
    "dots1": {
        "head_dim": 16, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_group": 1,
        "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5,
    },
    # half of a head turned, queries and keys normed over all heads; sigmoids with a correction
    "minimax_m2": {
        "head_dim": 16, "num_local_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 48,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    # columns side by side turned; softmax with a correction of the choice, the first layer dense
    "ernie4_5": {"use_bias": True},
    "ernie4_5_moe": {
        "num_hidden_layers": 3, "moe_num_experts": 8, "moe_k": 3, "moe_intermediate_size": 48,
        "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    },
    "deepseek_v3": {**_LATENT, "q_lora_rank": None, "n_group": 2, "topk_group": 1, "rope_interleave": True},
    # an indexer in every layer or in some, of more positions than the texts here have
    "deepseek_v32": {
        **_LATENT, "q_lora_rank": 48, "n_group": 4, "topk_group": 2, "index_topk": 512, "index_head_dim": 32,
        "index_n_heads": 2,
    },
    "glm_moe_dsa": {
        **_LATENT, "q_lora_rank": 48, "index_topk": 512, "index_head_dim": 32, "index_n_heads": 2,
        "indexer_types": ["full", "shared", "shared"],
    },
    # queries, keys and values in one linear, gate and up in one; heads turned in part
    "phi3": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.75}},
    # columns side by side turned, biases; norms before sublayers, or before and after
    "glm": {},
    "glm4": {},
    # LayerNorm with biases; a head turned in part
    "stablelm": {"use_qkv_bias": True},
    # and an MLP without a gate, GELU, windows
    "starcoder2": {"sliding_window": 24},
    # layers that see a window; and tables by yarn
    "ministral": {"num_hidden_layers": 3, "sliding_window": 12,
                  "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    "ministral3": {
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 400,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
    "cwm": {
        "num_hidden_layers": 3, "sliding_window": 12, "num_key_value_heads": 6, "rope_parameters": None,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    # columns side by side turned
    "helium": {"attention_bias": True, "mlp_bias": True},
    # MLPs without gates, by squared relu; LayerNorm that multiplies by one more than it holds, half of a head turned
    "arcee": {"mlp_bias": True},
    "nemotron": {"head_dim": 16, "attention_bias": True},
    # the MLP reads what attention reads; LayerNorm without biases, columns side by side turned, a factor of logits
    "cohere": {"tie_word_embeddings": True, "logit_scale": 0.3, "head_dim": None},
    # and layers that see all and turn nothing
    "cohere2": {
        "num_hidden_layers": 3, "sliding_window": 12, "logit_scale": 2.0, "attention_bias": True, "head_dim": None,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    # likewise with biases, GELU, half of a head turned
    "phi": {"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": 1},
    # queries, keys and values of a head side by side in one linear; two norms, or one after the other
    "gpt_neox": {"head_dim": None, "num_attention_heads": 3, "num_key_value_heads": None},
    # norms after sublayers, queries and keys normed head by head, layers that see all and turn nothing
    "exaone4": {
        "num_hidden_layers": 3, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "exaone_moe": {
        "num_hidden_layers": 3, "sliding_window": 12, "num_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 48, "num_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "solar_open": {
        "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.5,
    },
    # OLMoE with norms after sublayers
    "flex_olmo": {"num_experts": 6, "num_experts_per_tok": 3},
    # queries and keys turned and then normed; with experts an MLP beside them
    "hunyuan_v1_dense": {
        "head_dim": 24,
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 50.0, "factor": 1.0},
    },
    "hunyuan_v1_moe": {"num_experts": 6, "moe_topk": 3, "intermediate_size": 48},
    # Granite's factors; experts alone, or beside an MLP
    "granitemoe": {
        "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 0.5,
        "num_local_experts": 6, "num_experts_per_tok": 3, "head_dim": None,
    },
    "granitemoeshared": {
        "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 0.5,
        "num_local_experts": 6, "num_experts_per_tok": 3, "shared_intermediate_size": 112, "head_dim": None,
    },
    # and sinks, windows, tables of several bases, layers that turn nothing
    "granite_swa": {
        "num_hidden_layers": 4, "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2,
        "logits_scaling": 0.5, "head_dim": None, "sliding_window": 12, "layer_rope_theta": [10000.0, 0, 300.0, 10000],
    },
    "granitemoe_swa": {
        "num_hidden_layers": 3, "residual_multiplier": 0.3, "attention_multiplier": 0.2, "num_local_experts": 6,
        "num_experts_per_tok": 3, "shared_intermediate_size": 112, "head_dim": None, "sliding_window": 12,
    },
    # Qwen3-MoE with windows and rotary tables by kind of layer
    "mellum": {
        "num_hidden_layers": 3, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40,
        "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    },
    # queries and keys normed head by head; sigmoids with a correction that lies beside the router
    "hy_v3": {
        "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
        "router_scaling_factor": 1.7,
    },
    # gates on heads by a linear of their own, norms before and after, layers that see all and turn nothing
    "afmoe": {
        "num_hidden_layers": 3, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
        "num_shared_experts": 1, "num_dense_layers": 1, "route_scale": 1.5, "mup_enabled": True, "sliding_window": 12,
        "attention_bias": True, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    # heads of other sizes in layers with windows, keys that are values, too, values normed, a factor after every layer;
    # experts with an input and norms of their own beside the MLP
    "gemma4_text": {
        "num_hidden_layers": 3, "sliding_window": 12, "tie_word_embeddings": True, "global_head_dim": 16,
        "num_global_key_value_heads": 3, "attention_k_eq_v": True, "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0, "enable_moe_block": True, "num_experts": 8, "top_k_experts": 3,
        "moe_intermediate_size": 48, "final_logit_softcapping": 4.0,
        "layer_types": ["sliding_attention", "full_attention", "full_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "proportional", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    },
    # windows that begin at multiples; queries and keys turned and then normed without weights; layers that turn nothing
    # and sharpen; weights of experts on their inputs, some layers dense
    "llama4_text": {
        "num_hidden_layers": 4, "intermediate_size": 48, "intermediate_size_mlp": 80, "num_local_experts": 8,
        "num_experts_per_tok": 2, "attention_chunk_size": 12, "no_rope_layers": [1, 1, 1, 0], "moe_layers": [1, 2, 3],
        "floor_scale": 8, "attn_scale": 0.4,
    },
    # experts that read what attention reads, their mean with an MLP
    "cohere2_moe": {
        "num_hidden_layers": 3, "sliding_window": 12, "logit_scale": 2.0, "intermediate_size": 48, "num_experts": 8,
        "num_experts_per_tok": 3, "num_shared_experts": 1, "expert_selection_fn": "sigmoid", "first_k_dense_replace": 1,
        "prefix_dense_intermediate_size": 80, "shared_expert_combination_strategy": "average",
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    # MLPs whose activations have two numbers of their own
    "apertus": {"attention_bias": True},
    # norms without weights, one of embeddings; columns turned the other way and then normed
    "nanochat": {"num_hidden_layers": 3, "final_logit_softcapping": 4.0},
    # half of a head turned by columns side by side, MLPs beside attention
    "gptj": {"rotary_dim": 4, "head_dim": None, "num_key_value_heads": None, "intermediate_size": None},
    # queries, keys and values of groups side by side
    "falcon": {
        "new_decoder_architecture": True, "num_kv_heads": 2, "head_dim": None, "num_key_value_heads": None,
        "intermediate_size": None, "bias": True,
    },
    # learned positions and no others; MLPs cut at zero
    "opt": {"head_dim": None, "num_key_value_heads": None, "intermediate_size": None, "ffn_dim": 80},
    # and layers that see a window, scores without a factor
    "gpt_neo": {
        "num_hidden_layers": 3, "head_dim": None, "num_key_value_heads": None, "window_size": 12,
        "attention_types": [[["local", "global"], 1], [["local"], 1]],
    },
    # biases everywhere, or nothing new
    "internlm3": {"attention_bias": True, "mlp_bias": True},
    "iquestcoder": {},
    # LayerNorm with biases or with nothing at all; MLPs without gates
    "jais2": {"attention_bias": True, "mlp_bias": True},
    "olmo": {"head_dim": None, "num_key_value_heads": None},
    # Granite's factors, of logits upside down, and norms after sublayers
    "hyperclovax": {
        "residual_multiplier": 0.3, "embedding_multiplier": 3.0, "attention_multiplier": 0.2, "logits_scaling": 0.5,
    },
    "vaultgemma": {
        "num_hidden_layers": 3, "sliding_window": 12, "tie_word_embeddings": True, "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
    },
    # latents without experts; Granite's factors by other names, pairs half of their part apart
    "youtu": {**_LATENT_ALONE, "q_lora_rank": 48},
    "minicpm3": {**_LATENT_ALONE, "q_lora_rank": 48, "scale_emb": 3, "scale_depth": 0.7, "dim_model_base": 24},
    # values narrower than keys and with a factor, other heads and sinks in layers with windows
    "mimo_v2_flash": {
        "num_hidden_layers": 3, "head_dim": 32, "v_head_dim": 16, "num_key_value_heads": 1, "sliding_window": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "num_local_experts": 8,
        "num_experts_per_tok": 3, "moe_intermediate_size": 48, "attention_value_scale": 0.7, "n_group": 1,
        "topk_group": 1, "mlp_layer_types": ["dense", "sparse", "sparse"], "attention_bias": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    },
    # gates that open by softplus, as many heads as a layer says, half of a head turned in some
    "laguna": {
        "num_hidden_layers": 3, "head_dim": 16, "num_attention_heads_per_layer": [4, 6, 4], "gating": "per-element",
        "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "shared_expert_intermediate_size": 64,
        "sliding_window": 12, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "moe_routed_scaling_factor": 1.4,
    },
    # embeddings with a factor, norms that multiply by one more than they hold, GELU
    "gemma": {"tie_word_embeddings": True},
    # norms before and after, caps of scores and logits, windows
    "gemma2": {
        "num_hidden_layers": 3, "sliding_window": 12, "tie_word_embeddings": True, "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.0,
    },
    # queries and keys normed, rotary tables by kind of layer
    "gemma3_text": {
        "num_hidden_layers": 3, "sliding_window": 12, "tie_word_embeddings": True, "query_pre_attn_scalar": 12,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0},
        },
    },
}  # fmt: skip


# None leaves these to the config
_OWN_DEFAULTS = ("head_dim", "intermediate_size", *(key for key in _RULES if "expert" in key), "moe_intermediate_size")


class Decoders:
    """Makes models; ``Decoders.packed`` rounds every quantizable weight to nearest."""

    families = tuple(_FAMILIES)
    # for heads of eight columns; tables change with the length where the last two differ
    longrope: ClassVar[dict[str, Any]] = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16,
        "short_factor": [1.0, 1.1, 1.3, 1.6], "long_factor": [2.0, 3.0, 4.0, 5.0],
        "short_mscale": 1.2, "long_mscale": 1.2,
    }  # fmt: skip

    @staticmethod
    def dense(family: str, **changes: Any) -> Any:
        """A float32 model in evaluation mode."""
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        own = _WITH_RULES.get(family, _RULES) if family in DELTAS else _FAMILIES.get(family, {})
        sizes = {**_SIZES, **own, **changes}
        sizes = {name: value for name, value in sizes.items() if value is not None or name not in _OWN_DEFAULTS}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).float().eval()
        adapt_mixtures(model, layout_from_config(model.config.to_dict()))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("A_log"):
                    # states that remember some tokens
                    parameter.uniform_(-3.0, -0.5)
                elif parameter.ndim > 1:
                    parameter.normal_(0, 0.3 if "embed" in name else parameter.shape[-1] ** -0.5)
                else:
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
            for name, buffer in model.named_buffers():
                if name.endswith("e_score_correction_bias"):
                    buffer.normal_(0, 0.3)
                if name.endswith("layer_scalar"):
                    buffer.uniform_(0.5, 1.5)
        return model

    @classmethod
    def packed(cls, family: str, bits: int = 4, group_size: int = 32, symmetric: bool = False, **changes: Any) -> Any:
        """The same model with packed weights."""
        return rounded(cls.dense(family, **changes), QuantSpec(bits, group_size, symmetric))


@pytest.fixture(scope="session")
def decoders() -> type[Decoders]:
    """Factory of tiny decoders."""
    return Decoders


@pytest.fixture(scope="session")
def ids() -> torch.Tensor:
    """Random tokens ``[300]`` that are not special."""
    return torch.randint(3, 72, (300,), generator=torch.Generator().manual_seed(5))


class _Wide(TorchFunctionMode):
    """Where modules ask for float32 they get float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def wide(value: Any) -> Any:
            return torch.float64 if value is torch.float32 else value

        own = torch.Tensor.double if func is torch.Tensor.float else func
        return own(*tree_map(wide, args), **tree_map(wide, kwargs or {}))


@torch.inference_mode()
def _in_double(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits float64 ``[T, V]`` by transformers' modules in float64, with the rotary tables of the float32 model."""
    wide = copy.deepcopy(model).double()
    # sums of a grouped product are of 32 bits at most
    wide.config._experts_implementation = "eager"
    positions, own = torch.arange(len(tokens))[None], getattr(model.base_model, "rotary_emb", None)
    if own is not None:
        tables = tuple(table.double() for table in own(torch.empty(0), positions))
        wide.base_model.rotary_emb.forward = lambda *given, **named: tables
    torch.set_default_dtype(torch.float64)
    try:
        with _Wide():
            found: torch.Tensor = wide(input_ids=tokens[None], position_ids=positions, use_cache=False).logits[0]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.dtype == torch.float64
    return found


class Sequences:
    """What every engine with recurrent states has to do with sequences."""

    @staticmethod
    def written_alike(model: Any, ids: torch.Tensor) -> None:
        """Generation takes the native engine, and writes what transformers' modules write."""
        prompts = [ids[:9].tolist(), ids[9:14].tolist(), ids[20:61].tolist()]
        own, theirs = Generator(model), Generator(model, "transformers")
        assert (own.engine, own.reason) == ("native", None)
        how = Sampling(16)
        expected = [one.tokens for one in theirs.generate(prompts, how)]
        assert [one.tokens for one in own.generate(prompts, how)] == expected
        # alone, and sampled twice
        assert own.generate(prompts[2:], how)[0].tokens == expected[2]
        sampled = [own.generate(prompts, Sampling(8, temperature=1.0, top_p=0.9, seed=3)) for _ in range(2)]
        assert [one.tokens for one in sampled[0]] == [one.tokens for one in sampled[1]]

    @staticmethod
    def served_alike(engine: Any, fresh: Callable[[], Any], ids: torch.Tensor, held: Callable[[int], int]) -> None:
        """Sequences join and leave at any place of the others' windows, and get places that others left in the middle.

        Args:
            engine: With two slots.
            fresh: Makes an engine for one sequence.
            ids: Tokens.
            held: Bytes at least of so many sequences.
        """
        rows, texts = NativeRows(engine, 2, 1000), {7: ids[:24], 8: ids[30:48], 9: ids[50:66]}
        prompts, starts, stops = {7: 12, 8: 3, 9: 5}, {7: 0, 8: 2, 9: 5}, {7: 12, 8: 5, 9: 12}
        found: dict[int, list[torch.Tensor]] = {key: [] for key in texts}
        for turn in range(12):
            for key in (key for key, stop in stops.items() if stop == turn):
                rows.leave(key)
            for key in (key for key, start in starts.items() if start == turn):
                found[key].append(rows.join(key, texts[key][: prompts[key]].tolist(), None, 30).clone())
            alive = [key for key in texts if starts[key] <= turn < stops[key]]
            assert rows.held_bytes() >= held(len(alive))
            taken = {key: int(texts[key][prompts[key] + turn - starts[key]]) for key in alive}
            for key, logits in rows.step(taken).items():
                found[key].append(logits)
        for key, logits in found.items():
            alone = Sequences.natively(fresh(), texts[key][: prompts[key] + len(logits) - 1], prompts[key])
            assert torch.equal(torch.stack(logits), alone)

    @staticmethod
    def natively(engine: Any, tokens: torch.Tensor, prompt: int, slot: int = 0) -> torch.Tensor:
        """Logits ``[T, V]`` from the prompt's last token on."""
        rows = [engine.prompt(slot, tokens[:prompt].tolist())]
        rows += [engine.step(tokens[i : i + 1], [slot])[0].clone() for i in range(prompt, len(tokens))]
        return torch.stack(rows)

    @staticmethod
    def differing(states: Any, layers: Any, window: int, since: int) -> list[float]:
        """Share of codes of the first sequence that differ from those of transformers' cache, which it takes over.

        Args:
            states: Of the engine.
            layers: Of the cache, those with a state.
            window: Tokens between two roundings.
            since: Tokens since the prompt.
        """
        differ = []
        for index, layer in enumerate(layers):
            held = layer.recurrent_states[0]
            same = states.codes[index, 0] == held.codes[0][0]
            differ.append(1 - float(same.float().mean()))
            # a scale that is fitted to its codes moves with one of them, the more the fewer they are
            alike = same.all(-1)
            torch.testing.assert_close(states.channel[index, 0][alike], held.channel[0][alike], rtol=2e-3, atol=0)
            states.codes[index, 0], states.channel[index, 0] = held.codes[0][0], held.channel[0]
            states.scale[index, 0], states.conv[index, 0] = held.state[0], layer.conv_states[0][0]
            if window > 1:
                filled = int(held.count[0])
                assert filled == since % window == int(states.count[0])
                states.recent[index, 0, :filled] = held.recent[0, :filled]
        return differ

    @staticmethod
    def refused(model: Any, policy: dict[str, Any] | None, reason: str) -> None:
        """With states stored like this no engine takes the model; generation goes on without."""
        if policy is not None:
            attach(model, layout_from_config(model.config.to_dict()), policy)
        assert reason in str(decline(model))
        assert Generator(model).engine == "transformers"
        with pytest.raises(InputError, match="cannot run"):
            Generator(model, "native")

    @staticmethod
    def as_exact_as_modules(engine: Any, tokens: torch.Tensor, prompt: int) -> None:
        """Beside float64 the engine errs no more than the modules do, but for what two orders of sums differ by."""
        exact = _in_double(engine.model, tokens)[prompt - 1 :]
        with torch.inference_mode():
            modules = engine.model(tokens[None], use_cache=False).logits[0, prompt - 1 :]
        theirs = Sequences.off(modules.double(), exact)
        natively = Sequences.natively(engine, tokens, prompt)
        assert Sequences.off(natively.double(), exact) < 2 * theirs + 5e-6

    @staticmethod
    def off(found: torch.Tensor, expected: torch.Tensor) -> float:
        """The largest difference of logits by the largest logit."""
        return float((found - expected).abs().max() / expected.abs().max())


@pytest.fixture(scope="session")
def sequences() -> type[Sequences]:
    """What every engine with recurrent states has to do, and how any engine is asked."""
    return Sequences
