"""AFMoE (Arcee Trinity) and Laguna: linears beside q, k and v make gates on what attention writes; sigmoid routing."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    PER_EXPERT,
    Family,
    Part,
    attention,
    expert_bank,
    gated_groups,
    gated_mlp,
    mixture,
    with_gate,
)
from llmcompress.models.layout import Role, RouterView, TensorView


def _afmoe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias, after = facts.flag("attention_bias"), f"{layer}.post_attention_layernorm"
    head = attention(facts, layer, bias, bias, qk_norm="head", post_norm=after)
    head = with_gate(head, "gate_proj", facts.heads * facts.head_dim)
    before, last = "pre_mlp_layernorm", "post_mlp_layernorm"
    if index < facts.size("num_dense_layers", at_least=0):
        return head, gated_mlp(facts, layer, pre_norm=before, post_norm=f"{layer}.{last}")
    correction = TensorView(f"{layer}.mlp.expert_bias", (facts.size("num_experts"),))
    router = RouterView(
        f"{layer}.mlp.router",
        "sigmoid_group_topk",
        renormalizes=True,
        scale=facts.number("route_scale"),
        correction=correction,
        matrix="gate.weight",
        sequences=True,
    )
    bank = expert_bank(facts, layer, "num_experts", "moe_intermediate_size", router)
    size = facts.size("moe_intermediate_size") * facts.size("num_shared_experts")
    shared = gated_groups(f"{layer}.mlp.shared_experts", facts.hidden, size, Role.SHARED_EXPERTS)
    return head, mixture(layer, bank, shared, pre_norm=before, post_norm=last)


def _laguna(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    if facts.number("moe_router_logit_softcapping") > 0:
        raise InputError(
            "config.json: moe_router_logit_softcapping is not supported in laguna: its routers are no linears then",
            "supported: 0",
        )
    each = "num_attention_heads_per_layer"
    heads = facts.heads if facts.get(each) is None else facts.layer_size(each, index)
    own, bias = facts.having(num_attention_heads=heads), facts.flag("attention_bias")
    rows = heads if facts.get("gating") in (True, "per-head") else heads * own.head_dim
    head = with_gate(attention(own, layer, bias, bias, qk_norm="head"), "g_proj", rows)
    if facts.dense(index, index == 0):
        return head, gated_mlp(facts, layer)
    module = f"{layer}.mlp.gate"
    correction = TensorView(f"{module}.e_score_correction_bias", (facts.size("num_experts"),))
    # the block multiplies what the experts write by a constant, not their weights
    router = RouterView(module, "sigmoid_group_topk", renormalizes=True, correction=correction)
    bank = expert_bank(facts, layer, "num_experts", "moe_intermediate_size", router)
    size = facts.size("shared_expert_intermediate_size")
    shared = gated_groups(f"{layer}.mlp.shared_experts", facts.hidden, size, Role.SHARED_EXPERTS)
    return head, mixture(layer, bank, shared)


_SHARED = {"tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False}

FAMILIES = (
    Family(
        "afmoe",
        _afmoe,
        {
            **_SHARED, "vocab_size": 200192, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 32,
            "num_attention_heads": 16, "num_key_value_heads": None, "head_dim": 128, "num_dense_layers": 1,
            "moe_intermediate_size": 1408, "num_experts": 64, "num_experts_per_tok": 6, "num_shared_experts": 2,
            "route_scale": 1.0,
        },
        disk=PER_EXPERT,
    ),
    Family(
        "laguna",
        _laguna,
        {
            **_SHARED, "vocab_size": 100352, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 40,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "gating": True,
            "num_attention_heads_per_layer": None, "mlp_layer_types": None, "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512, "num_experts": 256, "num_experts_per_tok": 8,
            "moe_router_logit_softcapping": 0.0,
        },
        disk=replace(
            PER_EXPERT,
            renames=(
                (".mlp.gate.e_score_correction_bias", ".mlp.experts.e_score_correction_bias"),
                (".mlp.shared_experts.", ".mlp.shared_expert."),
            ),
        ),
    ),
)  # fmt: skip
