"""ERNIE 4.5: softmax routing whose choice a trained statistic corrects, shared experts, first layers dense."""

from __future__ import annotations

from dataclasses import replace

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
)
from llmcompress.models.layout import Role, RouterView, TensorView


def _is_sparse(facts: Facts, index: int) -> bool:
    last = facts.get("moe_layer_end_index")
    last = facts.size("num_hidden_layers") - 1 if last == -1 else facts.size("moe_layer_end_index", at_least=0)
    first, step = facts.size("moe_layer_start_index", at_least=0), facts.size("moe_layer_interval")
    return (index + 1) % step == 0 and first <= index <= last


def _ernie(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("use_bias")
    head = attention(facts, layer, bias, bias)
    if not _is_sparse(facts, index):
        return head, gated_mlp(facts, layer, bias)
    module = f"{layer}.mlp.gate"
    # one set of experts; the checkpoint has an axis for several
    correction = TensorView(f"{module}.moe_statics.e_score_correction_bias", (1, facts.size("moe_num_experts")))
    router = RouterView(module, "softmax_topk", renormalizes=True, correction=correction)
    bank = expert_bank(facts, layer, "moe_num_experts", "moe_intermediate_size", router)
    size = facts.size("moe_intermediate_size") * facts.size("moe_num_shared_experts", at_least=0)
    shared = gated_groups(f"{layer}.mlp.shared_experts", facts.hidden, size, Role.SHARED_EXPERTS, bias) if size else ()
    return head, mixture(layer, bank, shared)


def _dense(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("use_bias")
    return attention(facts, layer, bias, bias), gated_mlp(facts, layer, bias)


_SHARED = {
    "vocab_size": 103424, "hidden_act": "silu", "head_dim": None, "tie_word_embeddings": True, "use_bias": False,
}  # fmt: skip

FAMILIES = (
    Family(
        "ernie4_5_moe",
        _ernie,
        {
            **_SHARED, "hidden_size": 2560, "intermediate_size": 12288, "num_hidden_layers": 28,
            "num_attention_heads": 20, "num_key_value_heads": 4, "moe_intermediate_size": 1536, "moe_num_experts": 64,
            "num_experts_per_tok": 6, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
            "moe_layer_end_index": -1, "moe_layer_interval": 1,
        },
        aliases={"moe_num_experts": "num_experts", "num_experts_per_tok": "moe_k"},
        disk=replace(PER_EXPERT, renames=((".mlp.gate.moe_statics.", ".mlp.moe_statics."),)),
        head_bias="use_bias",
        ignored=(r"mtp",),
    ),
    Family(
        "ernie4_5",
        _dense,
        {
            **_SHARED, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 18,
            "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 128,
        },
        head_bias="use_bias",
    ),
)  # fmt: skip
