"""GLM-4.5 to 4.7, dots.llm1, Solar Open and K-EXAONE: grouped-query attention beside DeepSeek-V3's experts;
GLM-4.7-Flash has its attention too.
"""

from __future__ import annotations

from dataclasses import replace

from llmcompress.models.families.deepseek import (
    by_kind,
    feed_forward,
    latent_attention,
    sigmoid_router,
    with_shared,
)
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import PER_EXPERT, Family, Part, attention
from llmcompress.models.families.prediction import further_layers


def _glm4_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias, normed = facts.flag("attention_bias"), facts.flag("use_qk_norm")
    head = attention(facts, layer, qkv_bias=bias, qk_norm="head" if normed else "none")
    return head, feed_forward(facts, index, layer, sigmoid_router(facts, layer))


def _dots1(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    head = attention(facts, layer, bias, bias, qk_norm="head")
    return head, feed_forward(facts, index, layer, sigmoid_router(facts, layer))


def _glm4_moe_lite(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    # transformers 5 reads no first_k_dense_replace here; without the list the first layer is dense
    return latent_attention(facts, layer), by_kind(facts, index, layer, index == 0)


def _solar_open(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    head = attention(facts, layer, qkv_bias=facts.flag("attention_bias"))
    return head, with_shared(facts, layer, sigmoid_router(facts, layer))


def _exaone_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return attention(facts, layer, qk_norm="head"), by_kind(facts, index, layer, facts.first_dense(index))


_SHARED = {"tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False}

FAMILIES = (
    Family(
        "glm4_moe",
        _glm4_moe,
        {
            **_SHARED, "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": None, "use_qk_norm": False,
            "first_k_dense_replace": 1, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
        aliases={"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
        disk=PER_EXPERT,
        ignored=further_layers("num_nextn_predict_layers"),
    ),
    Family(
        "dots1",
        _dots1,
        {
            **_SHARED, "vocab_size": 152064, "hidden_size": 4608, "intermediate_size": 10944, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "first_k_dense_replace": 0,
            "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0, "norm_topk_prob": False,
        },
        aliases={"n_routed_experts": "num_local_experts"},
        disk=PER_EXPERT,
    ),
    Family(
        "solar_open",
        _solar_open,
        {
            **_SHARED, "vocab_size": 196608, "hidden_size": 4096, "num_hidden_layers": 48, "num_attention_heads": 64,
            "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128, "n_shared_experts": 1,
            "num_experts_per_tok": 8, "moe_intermediate_size": 1280, "routed_scaling_factor": 1.0,
            "norm_topk_prob": True,
        },
        aliases={"n_routed_experts": "num_local_experts"},
        disk=PER_EXPERT,
    ),
    Family(
        "exaone_moe",
        _exaone_moe,
        {
            **_SHARED, "vocab_size": 102400, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": None, "first_k_dense_replace": 1,
            "mlp_layer_types": None, "n_routed_experts": 64, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1024, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        },
        aliases={"n_routed_experts": "num_experts", "n_shared_experts": "num_shared_experts"},
        disk=replace(PER_EXPERT, renames=((".mlp.gate.e_score_correction_bias", ".mlp.e_score_correction_bias"),)),
        ignored=(r"mtp",),
    ),
    Family(
        "glm4_moe_lite",
        _glm4_moe_lite,
        {
            **_SHARED, "vocab_size": 154880, "hidden_size": 2048, "intermediate_size": 10240, "num_hidden_layers": 47,
            "num_attention_heads": 20, "moe_intermediate_size": 1536, "n_shared_experts": 1, "n_routed_experts": 64,
            "num_experts_per_tok": 4, "routed_scaling_factor": 1.8, "norm_topk_prob": True, "kv_lora_rank": 512,
            "q_lora_rank": 768, "qk_rope_head_dim": 64, "qk_nope_head_dim": 192, "v_head_dim": 256,
            "mlp_layer_types": None, "num_nextn_predict_layers": 1,
        },
        aliases={"n_routed_experts": "num_local_experts"},
        disk=PER_EXPERT,
        ignored=further_layers("num_nextn_predict_layers"),
    ),
)  # fmt: skip
