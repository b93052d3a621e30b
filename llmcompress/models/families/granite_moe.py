"""Granite 3 with experts, alone or beside a shared MLP; Granite 4 takes its experts from here."""

from __future__ import annotations

from functools import partial

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    Family,
    Part,
    attention,
    beside,
    expert_bank,
    first_and_last,
    mixture,
    scaled,
    with_sinks,
)
from llmcompress.models.layout import DiskNames, LinearView, Role, RouterView, Sublayer


def granite_experts(facts: Facts, layer: str) -> tuple[Part, ...]:
    """A shared MLP and experts side by side; one of the two where the other's size is 0."""
    parts, size = [], facts.size("shared_intermediate_size", at_least=0)
    if size:
        module = f"{layer}.shared_mlp"
        first = LinearView(f"{module}.input_linear", 2 * size, facts.hidden, Role.MLP)
        last = LinearView(f"{module}.output_linear", facts.hidden, size, Role.MLP)
        groups = first_and_last(module, (first,), last)
        parts.append(Part(Sublayer("mlp", module, f"{layer}.post_attention_layernorm", None, groups), ()))
    if facts.size("num_local_experts", at_least=0):
        router = RouterView(f"{layer}.block_sparse_moe.router", "topk_softmax", renormalizes=True)
        name = "block_sparse_moe"
        bank = expert_bank(facts, layer, "num_local_experts", "intermediate_size", router, name=name)
        parts.append(mixture(layer, bank, name=name))
    return beside(parts)


def _granite(facts: Facts, index: int, layer: str, sinks: bool = False) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    head = attention(facts, layer, bias, bias)
    parts = [with_sinks(head, facts.heads) if sinks else head, *granite_experts(facts, layer)]
    return scaled(parts, facts.number("residual_multiplier"))


_DEFAULTS = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "residual_multiplier": 1.0, "num_local_experts": 8,
    "num_experts_per_tok": 2, "shared_intermediate_size": 0,
}  # fmt: skip
GRANITE_DISK = DiskNames(
    renames=(
        (".block_sparse_moe.experts.gate_up_proj", ".block_sparse_moe.input_linear.weight"),
        (".block_sparse_moe.experts.down_proj", ".block_sparse_moe.output_linear.weight"),
        (".block_sparse_moe.router.weight", ".block_sparse_moe.router.layer.weight"),
    )
)

FAMILIES = (
    Family("granitemoe", _granite, _DEFAULTS, disk=GRANITE_DISK),
    Family("granitemoeshared", _granite, _DEFAULTS, disk=GRANITE_DISK),
    # transformers knows no older names of these
    Family("granitemoe_swa", partial(_granite, sinks=True), _DEFAULTS),
)
