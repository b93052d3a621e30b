"""MiMo-V2-Flash: sinks and twice the keys in layers with windows, narrower values, DeepSeek-V3's routing."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.models.families.deepseek import sigmoid_router
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    PER_EXPERT,
    Family,
    Part,
    biases,
    expert_bank,
    first_and_last,
    gated_mlp,
    mixture,
    with_sinks,
)
from llmcompress.models.layout import LinearView, Role, Sublayer


def _attention(facts: Facts, layer: str, times: int) -> Part:
    """Attention with ``times`` as many heads of keys and values as the config names."""
    module, bias, width = f"{layer}.self_attn", facts.flag("attention_bias"), facts.size("v_head_dim")
    keys = times * facts.kv_heads
    rows = {"q": facts.heads * facts.head_dim, "k": keys * facts.head_dim, "v": keys * width}
    first = [LinearView(f"{module}.{n}_proj", size, facts.hidden, Role.ATTENTION, bias) for n, size in rows.items()]
    last = LinearView(f"{module}.o_proj", facts.hidden, facts.heads * width, Role.ATTENTION)
    groups = first_and_last(module, first, last)
    return Part(Sublayer("attention", module, f"{layer}.input_layernorm", None, groups), biases(groups))


def _mimo(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    # without a list the first layer and then every sixth see all positions
    default = "full_attention" if index == 0 or (index + 1) % 6 == 0 else "sliding_attention"
    kind = facts.layer_kind("layer_types", index, ("full_attention", "sliding_attention"), default)
    near = kind == "sliding_attention"
    head = with_sinks(_attention(facts, layer, 2), facts.heads) if near else _attention(facts, layer, 1)
    if facts.dense(index, index == 0):
        return head, gated_mlp(facts, layer)
    # released files say null
    scaled = facts if facts.get("routed_scaling_factor") is not None else facts.having(routed_scaling_factor=1.0)
    router = sigmoid_router(scaled, layer)
    return head, mixture(layer, expert_bank(facts, layer, "n_routed_experts", "moe_intermediate_size", router))


FAMILIES = (
    Family(
        "mimo_v2_flash",
        _mimo,
        {
            "vocab_size": 152576, "hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 48,
            "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 192, "v_head_dim": 128,
            "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False, "layer_types": None,
            "mlp_layer_types": None, "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8,
            "routed_scaling_factor": 1.0, "norm_topk_prob": True,
        },
        aliases={"n_routed_experts": "num_local_experts"},
        disk=replace(PER_EXPERT, renames=((".self_attn.sinks", ".self_attn.attention_sink_bias"),)),
        ignored=(r"model\.mtp\.",),
    ),
)  # fmt: skip
