"""Hunyuan: norms on queries and keys after the rotation; with experts also a shared MLP beside them. And Hy3."""

from __future__ import annotations

from dataclasses import replace

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

_NAMES = AttentionNames(query_norm="query_layernorm", key_norm="key_layernorm")


def _attention(facts: Facts, layer: str) -> Part:
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias, qk_norm="head", names=_NAMES)


def _moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    router = RouterView(f"{layer}.mlp.gate", "softmax_topk", renormalizes=True, matrix="wg.weight")
    bank = expert_bank(
        facts, layer, "num_experts", "intermediate_size", router, top_k=facts.layer_size("num_experts_per_tok", index)
    )
    size = facts.size("intermediate_size")
    shared = gated_groups(f"{layer}.mlp.shared_mlp", facts.hidden, size, Role.SHARED_EXPERTS)
    return _attention(facts, layer), mixture(layer, bank, shared)


def _hy_v3(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Hy3: norms before the rotation, the first layer dense, sigmoids with a correction that lies beside the router."""
    bias = facts.flag("attention_bias")
    head = attention(facts, layer, bias, bias, qk_norm="head")
    if facts.dense(index, index == 0):
        return head, gated_mlp(facts, layer, facts.flag("mlp_bias"))
    correction = TensorView(f"{layer}.mlp.e_score_correction_bias", (facts.size("num_experts"),))
    scale = facts.number("router_scaling_factor")
    router = RouterView(f"{layer}.mlp.gate", "sigmoid_group_topk", True, scale=scale, correction=correction)
    bank = expert_bank(facts, layer, "num_experts", "moe_intermediate_size", router)
    size = facts.size("moe_intermediate_size") * facts.size("num_shared_experts")
    module = f"{layer}.mlp.shared_experts"
    shared = gated_groups(module, facts.hidden, size, Role.SHARED_EXPERTS, facts.flag("mlp_bias"))
    return head, mixture(layer, bank, shared)


def _dense(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _attention(facts, layer), gated_mlp(facts, layer)


_DEFAULTS = {
    "vocab_size": 290943, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False,
}  # fmt: skip

FAMILIES = (
    Family(
        "hunyuan_v1_moe",
        _moe,
        {**_DEFAULTS, "num_experts": 1, "num_experts_per_tok": 1},
        aliases={"num_experts": "num_local_experts", "num_experts_per_tok": "moe_topk"},
        disk=PER_EXPERT,
    ),
    Family("hunyuan_v1_dense", _dense, _DEFAULTS),
    Family(
        "hy_v3",
        _hy_v3,
        {
            "vocab_size": 120832, "hidden_size": 4096, "intermediate_size": 13312, "num_hidden_layers": 80,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "mlp_layer_types": None,
            "moe_intermediate_size": 1536, "num_experts": 192, "num_experts_per_tok": 8, "num_shared_experts": 1,
            "router_scaling_factor": 2.826,
        },
        aliases={"num_experts": "num_local_experts"},
        disk=replace(
            PER_EXPERT,
            renames=(
                (".mlp.gate.weight", ".mlp.router.gate.weight"),
                (".mlp.e_score_correction_bias", ".mlp.expert_bias"),
                (".mlp.shared_experts.", ".mlp.shared_mlp."),
            ),
        ),
    ),
)  # fmt: skip
