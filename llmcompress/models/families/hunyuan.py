"""Hunyuan: norms on queries and keys after the rotation; with experts also a shared MLP beside them."""

from __future__ import annotations

from llmcompress.errors import InputError
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
from llmcompress.models.layout import Role, RouterView

_NAMES = AttentionNames(query_norm="query_layernorm", key_norm="key_layernorm")


def _attention(facts: Facts, layer: str) -> Part:
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias, qk_norm="head", names=_NAMES)


def _chosen(facts: Facts, index: int) -> int:
    """Experts per token, which the file may give layer by layer."""
    found = facts.get("num_experts_per_tok")
    if not isinstance(found, list):
        return facts.size("num_experts_per_tok")
    if index >= len(found) or not isinstance(found[index], int) or found[index] < 1:
        raise InputError(f"config.json: moe_topk has no number of experts for layer {index}")
    return int(found[index])


def _moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    router = RouterView(f"{layer}.mlp.gate", "softmax_topk", renormalizes=True, matrix="wg.weight")
    bank = expert_bank(facts, layer, "num_experts", "intermediate_size", router, top_k=_chosen(facts, index))
    size = facts.size("intermediate_size")
    shared = gated_groups(f"{layer}.mlp.shared_mlp", facts.hidden, size, Role.SHARED_EXPERTS)
    return _attention(facts, layer), mixture(layer, bank, shared)


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
)
