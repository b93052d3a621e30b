"""Mixtral and Phi-MoE: every layer is a mixture; experts are named w1 (gate), w3 (up), w2 (down) on disk."""

from __future__ import annotations

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention, expert_bank, mixture
from llmcompress.models.layout import DiskNames, RouterView


def _mixtral(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    router = RouterView(f"{layer}.mlp.gate", "softmax_topk", renormalizes=True)
    bank = expert_bank(facts, layer, "num_local_experts", "intermediate_size", router)
    return attention(facts, layer), mixture(layer, bank)


def _phimoe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    # each weight is a softmax over the logits near its own maximum: the two do not sum to one
    router = RouterView(f"{layer}.mlp.router", "sparsemixer", renormalizes=False)
    bank = expert_bank(facts, layer, "num_local_experts", "intermediate_size", router)
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias), mixture(layer, bank)


_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "tie_word_embeddings": False,
    "hidden_act": "silu", "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
_PHI_DEFAULTS = {
    **_DEFAULTS, "vocab_size": 32064, "intermediate_size": 6400, "num_local_experts": 16, "attention_bias": False,
    "lm_head_bias": False,
}  # fmt: skip
_EXPERTS = (".mlp.experts", ".block_sparse_moe.experts")
_NAMES = ("w1.weight", "w3.weight", "w2.weight")

FAMILIES = (
    Family(
        "mixtral",
        _mixtral,
        _DEFAULTS,
        aliases={"num_local_experts": "num_experts"},
        disk=DiskNames(((".mlp.", ".block_sparse_moe."),), _EXPERTS, *_NAMES),
    ),
    Family(
        "phimoe",
        _phimoe,
        _PHI_DEFAULTS,
        disk=DiskNames(
            ((".mlp.router.", ".block_sparse_moe.gate."), (".mlp.", ".block_sparse_moe.")), _EXPERTS, *_NAMES
        ),
        norm_bias=True,
        head_bias="lm_head_bias",
    ),
)
