"""Llama 4: routing weights multiply what experts read; a shared expert beside them, some layers dense."""

from __future__ import annotations

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention, expert_bank, gated_groups, gated_mlp, mixture
from llmcompress.models.layout import Role, RouterView

_NAME = "feed_forward"


def _is_sparse(facts: Facts, index: int) -> bool:
    if facts.get("moe_layers") is not None:
        return index in facts.indices("moe_layers")
    return (index + 1) % facts.size("interleave_moe_layer_step") == 0


def _llama4(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    head = attention(facts, layer, bias, bias)
    if not _is_sparse(facts, index):
        wide = facts.having(intermediate_size=facts.size("intermediate_size_mlp"))
        return head, gated_mlp(wide, layer, name=_NAME)
    router = RouterView(f"{layer}.{_NAME}.router", "sigmoid_group_topk", renormalizes=False)
    sizes = "num_local_experts", "intermediate_size"
    bank = expert_bank(facts, layer, *sizes, router, _NAME, transposed=True, scales_inputs=True)
    size = facts.size("intermediate_size")
    shared = gated_groups(f"{layer}.{_NAME}.shared_expert", facts.hidden, size, Role.SHARED_EXPERTS)
    return head, mixture(layer, bank, shared, name=_NAME)


FAMILIES = (
    Family(
        "llama4_text",
        _llama4,
        {
            "vocab_size": 202048, "hidden_size": 5120, "intermediate_size": 8192, "intermediate_size_mlp": 16384,
            "num_hidden_layers": 48, "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
            "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "num_local_experts": 16,
            "num_experts_per_tok": 1, "moe_layers": None, "interleave_moe_layer_step": 1,
        },
        package="llama4",
    ),
)  # fmt: skip
