"""Qwen2-MoE, Qwen3-MoE, Mellum, OLMoE and FlexOlmo: softmax routing, renormalised where the config says so."""

from __future__ import annotations

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    PER_EXPERT,
    AttentionNames,
    Family,
    Part,
    attention,
    expert_bank,
    gated_groups,
    gated_mlp,
    mixture,
)
from llmcompress.models.layout import Role, RouterView, TensorView


def softmax_router(facts: Facts, layer: str) -> RouterView:
    """Softmax over all experts, then the best of them."""
    return RouterView(f"{layer}.mlp.gate", "softmax_topk", renormalizes=facts.flag("norm_topk_prob"))


def is_sparse(facts: Facts, index: int) -> bool:
    """Whether a layer has experts, by Qwen's three keys."""
    step = facts.size("decoder_sparse_step")
    has_experts = facts.size("num_experts", at_least=0) > 0
    return index not in facts.indices("mlp_only_layers") and has_experts and (index + 1) % step == 0


def shared_expert_mixture(facts: Facts, layer: str, router: RouterView) -> Part:
    """Experts beside a shared one that a gate scales."""
    bank = expert_bank(facts, layer, "num_experts", "moe_intermediate_size", router)
    shared_size = facts.size("shared_expert_intermediate_size")
    shared = gated_groups(f"{layer}.mlp.shared_expert", facts.hidden, shared_size, Role.SHARED_EXPERTS)
    # one row that scales the whole shared expert: far too sensitive to quantize
    gate = TensorView(f"{layer}.mlp.shared_expert_gate.weight", (1, facts.hidden))
    return mixture(layer, bank, shared, (gate,))


def _qwen2_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    head = attention(facts, layer, qkv_bias=facts.flag("qkv_bias"))
    if not is_sparse(facts, index):
        return head, gated_mlp(facts, layer)
    return head, shared_expert_mixture(facts, layer, softmax_router(facts, layer))


def _normed(facts: Facts, layer: str, sparse: bool) -> tuple[Part, ...]:
    """Queries and keys normed head by head; experts without a shared one, or a dense MLP."""
    bias = facts.flag("attention_bias")
    head = attention(facts, layer, bias, bias, qk_norm="head")
    if not sparse:
        return head, gated_mlp(facts, layer)
    bank = expert_bank(facts, layer, "num_experts", "moe_intermediate_size", softmax_router(facts, layer))
    return head, mixture(layer, bank)


def _qwen3_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _normed(facts, layer, is_sparse(facts, index))


def _mellum(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _normed(facts, layer, not facts.dense(index, False))


def _olmoe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    bank = expert_bank(facts, layer, "num_experts", "intermediate_size", softmax_router(facts, layer))
    return attention(facts, layer, bias, bias, qk_norm="full"), mixture(layer, bank)


def _flex_olmo(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """OLMoE with norms after each sublayer and none before, as in OLMo 2."""
    bias, after = facts.flag("attention_bias"), f"{layer}.post_attention_layernorm"
    bank = expert_bank(facts, layer, "num_experts", "intermediate_size", softmax_router(facts, layer))
    head = attention(facts, layer, bias, bias, qk_norm="full", post_norm=after, names=AttentionNames(pre_norm=None))
    return head, mixture(layer, bank, pre_norm=None, post_norm="post_feedforward_layernorm")


_SHARED = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 24, "head_dim": None,
    "tie_word_embeddings": False, "hidden_act": "silu", "norm_topk_prob": False, "decoder_sparse_step": 1,
    "mlp_only_layers": None,
}  # fmt: skip

FAMILIES = (
    Family(
        "qwen2_moe",
        _qwen2_moe,
        {
            **_SHARED, "intermediate_size": 5632, "num_attention_heads": 16, "num_key_value_heads": 16,
            "moe_intermediate_size": 1408, "shared_expert_intermediate_size": 5632, "num_experts_per_tok": 4,
            "num_experts": 60, "qkv_bias": True,
        },
        disk=PER_EXPERT,
    ),
    Family(
        "qwen3_moe",
        _qwen3_moe,
        {
            **_SHARED, "intermediate_size": 6144, "num_attention_heads": 32, "num_key_value_heads": 4,
            "moe_intermediate_size": 768, "num_experts_per_tok": 8, "num_experts": 128, "attention_bias": False,
        },
        aliases={"num_experts": "num_local_experts"},
        disk=PER_EXPERT,
    ),
    Family(
        "mellum",
        _mellum,
        {
            **_SHARED, "vocab_size": 98304, "hidden_size": 2304, "intermediate_size": 7168, "num_hidden_layers": 28,
            "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "moe_intermediate_size": 896,
            "num_experts_per_tok": 8, "num_experts": 64, "norm_topk_prob": True, "mlp_layer_types": None,
            "attention_bias": False,
        },
        aliases={"num_experts": "num_local_experts"},
        disk=PER_EXPERT,
        ignored=(r"^mtp\.",),
    ),
    Family(
        "olmoe",
        _olmoe,
        {
            **_SHARED, "vocab_size": 50304, "intermediate_size": 2048, "num_hidden_layers": 16,
            "num_attention_heads": 16, "num_key_value_heads": None, "num_experts_per_tok": 8, "num_experts": 64,
            "attention_bias": False,
        },
        aliases={"num_experts": "num_local_experts"},
        disk=PER_EXPERT,
    ),
    Family(
        "flex_olmo",
        _flex_olmo,
        {
            **_SHARED, "vocab_size": 100352, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": None, "num_experts_per_tok": 5, "num_experts": 7,
            "attention_bias": False,
        },
        aliases={"num_experts": "num_local_experts"},
        disk=PER_EXPERT,
    ),
)  # fmt: skip
