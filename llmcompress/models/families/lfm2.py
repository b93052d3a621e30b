"""LFM2: short convolutions in most layers, attention in the others; with experts a corrected sigmoid routing."""

from __future__ import annotations

from math import ceil

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    AttentionNames,
    Family,
    Part,
    attention,
    biases,
    expert_bank,
    first_and_last,
    mixture,
)
from llmcompress.models.layout import DiskNames, LinearView, Role, RouterView, Sublayer, TensorView

_NORM = "operator_norm"
_NAMES = AttentionNames("self_attn", _NORM, "q_layernorm", "k_layernorm", "out_proj")


def _convolution(facts: Facts, layer: str) -> Part:
    """Two gates and an input of one projection, a short causal convolution between the gates, another projection.

    The convolution has a few weights per channel and stays dense.
    """
    module, hidden, bias = f"{layer}.conv", facts.hidden, facts.flag("conv_bias")
    first = LinearView(f"{module}.in_proj", 3 * hidden, hidden, Role.SSM, bias)
    last = LinearView(f"{module}.out_proj", hidden, hidden, Role.SSM, bias)
    groups = first_and_last(module, (first,), last)
    kept = [TensorView(f"{module}.conv.weight", (hidden, 1, facts.size("conv_L_cache")))]
    kept += [TensorView(f"{module}.conv.bias", (hidden,))] if bias else []
    return Part(Sublayer("ssm", module, f"{layer}.{_NORM}", None, groups), (*kept, *biases(groups)))


def _mixer(facts: Facts, index: int, layer: str, kind: str) -> Part:
    if facts.layer_kind("layer_types", index, ("conv", "full_attention"), kind) == "conv":
        return _convolution(facts, layer)
    return attention(facts, layer, qk_norm="head", names=_NAMES)


def _mlp(facts: Facts, layer: str, size: int) -> Part:
    module, hidden = f"{layer}.feed_forward", facts.hidden
    first = [LinearView(f"{module}.{name}", size, hidden, Role.MLP) for name in ("w1", "w3")]
    last = LinearView(f"{module}.w2", hidden, size, Role.MLP)
    return Part(Sublayer("mlp", module, f"{layer}.ffn_norm", None, first_and_last(module, first, last)), ())


def _lfm2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    size = facts.optional_size("block_ff_dim") or facts.size("intermediate_size")
    if facts.flag("block_auto_adjust_ff_dim"):
        step, size = facts.size("block_multiple_of"), int(2 * size / 3)
        if facts.get("block_ffn_dim_multiplier") is not None:
            size = step * ceil(int(facts.number("block_ffn_dim_multiplier") * size) / step)
    everywhere = facts.get("full_attn_idxs") is None
    kind = "full_attention" if everywhere or index in facts.indices("full_attn_idxs") else "conv"
    return _mixer(facts, index, layer, kind), _mlp(facts, layer, size)


def _lfm2_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    first = _mixer(facts, index, layer, "full_attention")
    if index < facts.size("num_dense_layers", at_least=0):
        return first, _mlp(facts, layer, facts.size("intermediate_size"))
    name, correction = "feed_forward", None
    if facts.flag("use_expert_bias"):
        correction = TensorView(f"{layer}.{name}.expert_bias", (facts.size("num_experts"),))
    router = RouterView(
        f"{layer}.{name}.gate",
        "sigmoid_group_topk",
        facts.flag("norm_topk_prob"),
        scale=facts.number("routed_scaling_factor"),
        correction=correction,
        floor=1e-6,
    )
    bank = expert_bank(facts, layer, "num_experts", "moe_intermediate_size", router, name, activation="silu")
    return first, mixture(layer, bank, name=name, pre_norm="ffn_norm")


_SHARED = {
    "vocab_size": 65536, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "head_dim": None, "tie_word_embeddings": True, "conv_bias": False, "conv_L_cache": 3, "layer_types": None,
}  # fmt: skip
_TIED = {"tie_word_embeddings": "tie_embedding"}

FAMILIES = (
    Family(
        "lfm2",
        _lfm2,
        {
            **_SHARED, "hidden_size": 2560, "intermediate_size": 12288, "block_ff_dim": None, "block_multiple_of": 256,
            "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "full_attn_idxs": None,
        },
        aliases=_TIED,
        final_norm="embedding_norm",
    ),
    Family(
        "lfm2_moe",
        _lfm2_moe,
        {
            **_SHARED, "hidden_size": 2048, "intermediate_size": 7168, "moe_intermediate_size": 1792,
            "num_dense_layers": 2, "num_experts_per_tok": 4, "num_experts": 32, "use_expert_bias": True,
            "routed_scaling_factor": 1.0, "norm_topk_prob": True,
        },
        aliases=_TIED,
        disk=DiskNames(
            experts=(".feed_forward.experts", ".feed_forward.experts"),
            gate="w1.weight",
            up="w3.weight",
            down="w2.weight",
        ),
        final_norm="embedding_norm",
    ),
)  # fmt: skip
