"""Hybrids of attention and state-space mixers: Bamba, Falcon-H1, Granite 4 and Jamba."""

from __future__ import annotations

from dataclasses import replace

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.granite_moe import GRANITE_DISK, granite_experts
from llmcompress.models.families.mixers import (
    headed_scan,
    mamba1,
    mamba2,
    time_step_rank,
    virtual_scan,
    whole_channels,
)
from llmcompress.models.families.parts import Family, Part, attention, expert_bank, gated_mlp, mixture, norm, scaled
from llmcompress.models.layout import DiskNames, RouterView

_HYBRID_KEYS = ("mamba_n_heads", "mamba_d_state", "mamba_n_groups", "mamba_d_conv")


def _hybrid_mamba(
    facts: Facts, layer: str, inner: float, out_bias: str = "mamba_proj_bias", gated: bool = True
) -> Part:
    """The Mamba-2 mixer of Bamba, Falcon-H1 and Granite 4, whose configs share their words."""
    heads, states, groups, width = (facts.size(key) for key in _HYBRID_KEYS)
    if facts.get("mamba_d_head") == "auto":
        channels = whole_channels(inner / heads, "channels per mamba head")
    else:
        channels = facts.size("mamba_d_head")
    scan = headed_scan(f"{layer}.mamba", heads, channels, states, groups, width)
    in_bias, conv_bias = facts.flag("mamba_proj_bias"), facts.flag("mamba_conv_bias")
    return mamba2(facts, scan, f"{layer}.input_layernorm", in_bias, facts.flag(out_bias), conv_bias, gated)


def _bamba(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    if index in facts.indices("attn_layer_indices"):
        first = attention(facts, layer, bias, bias)
    else:
        first = _hybrid_mamba(facts, layer, facts.number("mamba_expand") * facts.hidden)
    return first, gated_mlp(facts, layer, facts.flag("mlp_bias"), "pre_ff_layernorm", name="feed_forward")


def _falcon_h1(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Attention and Mamba-2 side by side on the same input, each with constants of its own."""
    inner = facts.optional_size("mamba_d_ssm") or facts.number("mamba_expand") * facts.hidden
    bias = facts.flag("attention_bias")
    scan = _hybrid_mamba(facts, layer, inner, "projectors_bias", facts.flag("mamba_rms_norm"))
    beside = attention(facts, layer, bias, bias)
    mixer = replace(scan.sublayer, output_scale=facts.number("ssm_out_multiplier"))
    parallel = replace(
        beside.sublayer,
        parallel=True,
        input_scale=facts.number("attention_in_multiplier"),
        output_scale=facts.number("attention_out_multiplier"),
    )
    mlp = gated_mlp(facts, layer, facts.flag("mlp_bias"), "pre_ff_layernorm", name="feed_forward")
    return Part(mixer, scan.kept), Part(parallel, beside.kept), mlp


def _granite(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Granite 4: Mamba-2 or attention, then experts and a shared MLP side by side."""
    bias = facts.flag("attention_bias")
    known = ("linear_attention", "full_attention")
    if facts.layer_kind("layer_types", index, known, "linear_attention") == "linear_attention":
        first = _hybrid_mamba(facts, layer, facts.number("mamba_expand") * facts.hidden)
    else:
        first = attention(facts, layer, bias, bias)
    facts.size("shared_intermediate_size")  # unlike Granite 3's, these layers always have a shared MLP
    return scaled([first, *granite_experts(facts, layer)], facts.number("residual_multiplier"))


def _jamba(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Mamba-1 with norms on dt, B and C, or attention; then a dense MLP or experts."""
    if index % facts.size("attn_layer_period") == facts.size("attn_layer_offset", at_least=0):
        first = attention(facts, layer)
    else:
        module, rank, states = f"{layer}.mamba", time_step_rank(facts, "mamba_dt_rank"), facts.size("mamba_d_state")
        norms = (
            *norm(f"{module}.dt_layernorm", rank),
            *norm(f"{module}.b_layernorm", states),
            *norm(f"{module}.c_layernorm", states),
        )
        inner = whole_channels(facts.number("mamba_expand") * facts.hidden, "mamba_expand * hidden_size")
        scan = virtual_scan(module, inner, states, facts.size("mamba_d_conv"))
        bias, conv_bias = facts.flag("mamba_proj_bias"), facts.flag("mamba_conv_bias")
        first = mamba1(facts, scan, f"{layer}.input_layernorm", rank, bias, conv_bias, norms)
    sparse = index % facts.size("expert_layer_period") == facts.size("expert_layer_offset", at_least=0)
    if not sparse or facts.size("num_experts") == 1:
        return first, gated_mlp(facts, layer, False, "pre_ff_layernorm", name="feed_forward")
    router = RouterView(f"{layer}.feed_forward.router", "softmax_topk", renormalizes=False)
    bank = expert_bank(facts, layer, "num_experts", "intermediate_size", router, name="feed_forward")
    return first, mixture(layer, bank, name="feed_forward", pre_norm="pre_ff_layernorm")


_HYBRID = {
    "vocab_size": 128000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "tie_word_embeddings": False,
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "mamba_n_heads": 128, "mamba_d_head": "auto",
    "mamba_n_groups": 1, "mamba_d_state": 256, "mamba_d_conv": 4, "mamba_expand": 2, "mamba_conv_bias": True,
    "mamba_proj_bias": False,
}  # fmt: skip


FAMILIES = (
    Family("bamba", _bamba, _HYBRID, final_norm="final_layernorm"),
    Family(
        "falcon_h1",
        _falcon_h1,
        {
            **_HYBRID, "mamba_d_ssm": 1024, "projectors_bias": False, "mamba_rms_norm": False,
            "attention_in_multiplier": 1.0, "attention_out_multiplier": 1.0, "ssm_out_multiplier": 1.0,
        },
        final_norm="final_layernorm",
    ),
    Family(
        "granitemoehybrid",
        _granite,
        {
            **_HYBRID, "vocab_size": 32000, "intermediate_size": 11008, "num_key_value_heads": None,
            "num_local_experts": 8, "num_experts_per_tok": 2, "shared_intermediate_size": 1024,
            "residual_multiplier": 1.0, "layer_types": None,
        },
        aliases={"layer_types": "layers_block_type"},
        disk=GRANITE_DISK,
    ),
    Family(
        "jamba",
        _jamba,
        {
            "vocab_size": 65536, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "tie_word_embeddings": False,
            "hidden_act": "silu", "num_experts_per_tok": 2, "num_experts": 16, "expert_layer_period": 2,
            "expert_layer_offset": 1, "attn_layer_period": 8, "attn_layer_offset": 4, "mamba_d_state": 16,
            "mamba_d_conv": 4, "mamba_expand": 2, "mamba_dt_rank": "auto", "mamba_conv_bias": True,
            "mamba_proj_bias": False,
        },
        aliases={"num_experts": "num_local_experts"},
        disk=DiskNames(experts=(".feed_forward.experts", ".feed_forward.experts")),
        final_norm="final_layernorm",
    ),
)  # fmt: skip
