"""GLM-4.5, 4.6 and 4.7: grouped-query attention beside DeepSeek-V3's mixture of experts."""

from __future__ import annotations

from llmcompress.models.families.deepseek import PER_EXPERT, feed_forward, prediction_layers, sigmoid_router
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention


def _glm4_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias, normed = facts.flag("attention_bias"), facts.flag("use_qk_norm")
    head = attention(facts, layer, qkv_bias=bias, qk_norm="head" if normed else "none")
    return head, feed_forward(facts, index, layer, *sigmoid_router(facts, layer))


FAMILIES = (
    Family(
        "glm4_moe",
        _glm4_moe,
        {
            "vocab_size": 151552, "hidden_size": 4096, "intermediate_size": 10944, "num_hidden_layers": 46,
            "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": None, "tie_word_embeddings": False,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "use_qk_norm": False,
            "first_k_dense_replace": 1, "n_routed_experts": 128, "n_shared_experts": 1, "num_experts_per_tok": 8,
            "moe_intermediate_size": 1408, "routed_scaling_factor": 1.0, "norm_topk_prob": True,
            "num_nextn_predict_layers": 1,
        },
        aliases={"n_routed_experts": "num_local_experts", "num_nextn_predict_layers": "num_mtp_layers"},
        disk=PER_EXPERT,
        ignored=prediction_layers,
    ),
)  # fmt: skip
