"""Qwen3-Next and the text model of Qwen3.5: gated delta rule in most layers, gated attention in the others.

Facts found in transformers 5.23: what makes the step size and the decay of a delta rule (``in_proj_ba``, or
``in_proj_b`` and ``in_proj_a``) is a row or two per head whose errors act through a sigmoid and an exponential, like
Mamba-2's time steps; it stays dense, as do convolution, ``A_log`` and ``dt_bias``. Norms add one to their weight, but
not the gated norm inside a delta rule.
"""

from __future__ import annotations

from dataclasses import replace

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import PER_EXPERT, Family, Part, attention, first_and_last, gated_mlp, norm
from llmcompress.models.families.qwen_moe import is_sparse, shared_expert_mixture, softmax_router
from llmcompress.models.layout import DiskNames, LinearView, Role, RouterView, ScanView, Sublayer, TensorView

_KINDS = ("linear_attention", "full_attention")


def gated_delta(facts: Facts, layer: str, apart: bool) -> Part:
    """A mixer with the gated delta rule (Yang et al., arXiv 2412.06464): projections, convolution, rule, gated norm.

    Args:
        facts: The config.
        layer: Run-time name of the decoder layer.
        apart: Whether the gate z, the step sizes b and the decays a have projections of their own.
    """
    module, heads, hidden = f"{layer}.linear_attn", facts.size("linear_num_value_heads"), facts.hidden
    key_heads, key_head, taps = (
        facts.size(f"linear_{name}") for name in ("num_key_heads", "key_head_dim", "conv_kernel_dim")
    )
    head = facts.size("linear_value_head_dim")
    value, mixed = heads * head, 2 * key_heads * key_head + heads * head
    rows = {"qkv": mixed, "z": value} if apart else {"qkvz": mixed + value}
    small = {"b": heads, "a": heads} if apart else {"ba": 2 * heads}
    first = [LinearView(f"{module}.in_proj_{name}", size, hidden, Role.SSM) for name, size in rows.items()]
    last = LinearView(f"{module}.out_proj", hidden, value, Role.SSM)
    kept = [TensorView(f"{module}.{name}", (heads,)) for name in ("dt_bias", "A_log")]
    kept.append(TensorView(f"{module}.conv1d.weight", (mixed, 1, taps)))
    kept += [TensorView(f"{module}.in_proj_{name}.weight", (size, hidden)) for name, size in small.items()]
    groups = first_and_last(module, first, last)
    scan = ScanView(module, "delta", heads, head, key_head, key_heads, mixed, taps)
    sublayer = Sublayer("ssm", module, f"{layer}.input_layernorm", None, groups, scan=scan)
    return Part(sublayer, (*kept, *norm(f"{module}.norm", head)))


def _mixer(facts: Facts, index: int, layer: str, apart: bool) -> Part:
    """The delta rule or attention, by the list of layer types or every few layers."""
    every = facts.size("full_attention_interval")
    if facts.layer_kind("layer_types", index, _KINDS, _KINDS[(index + 1) % every == 0]) == "linear_attention":
        return gated_delta(facts, layer, apart)
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias, qk_norm="head", form="gated")


def _qwen3_next(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    first = _mixer(facts, index, layer, apart=False)
    if not is_sparse(facts, index):
        return first, gated_mlp(facts, layer)
    return first, shared_expert_mixture(facts, layer, softmax_router(facts, layer))


def _qwen3_5_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    router = RouterView(f"{layer}.mlp.gate", "softmax_topk", renormalizes=True)
    return _mixer(facts, index, layer, apart=True), shared_expert_mixture(facts, layer, router)


def _qwen3_5(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _mixer(facts, index, layer, apart=True), gated_mlp(facts, layer)


_SHARED = {
    "vocab_size": 151936, "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 16,
    "num_key_value_heads": 2, "head_dim": 256, "hidden_act": "silu", "tie_word_embeddings": False,
    "attention_bias": False, "layer_types": None, "full_attention_interval": 4, "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
}  # fmt: skip
_EXPERTS = {
    **_SHARED, "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "num_experts_per_tok": 10,
    "num_experts": 512,
}  # fmt: skip
# transformers saves the text part of a model that also sees under the names of the whole
_WHOLE = (("model.", "model.language_model."),)
# layers that predict further tokens, and what sees pictures
_MTP, _EYES = r"^mtp", r"^model\.visual\."

FAMILIES = (
    Family(
        "qwen3_next",
        _qwen3_next,
        {
            **_EXPERTS, "intermediate_size": 5632, "decoder_sparse_step": 1, "norm_topk_prob": True,
            "mlp_only_layers": None,
        },
        disk=PER_EXPERT,
        norm_adds_one=True,
        ignored=(_MTP,),
    ),
    Family(
        "qwen3_5_moe_text",
        _qwen3_5_moe,
        {
            **_EXPERTS, "vocab_size": 248320, "num_hidden_layers": 40, "num_experts_per_tok": 8, "num_experts": 256,
        },
        disk=replace(PER_EXPERT, older=_WHOLE),
        norm_adds_one=True,
        ignored=(_MTP, _EYES),
        package="qwen3_5_moe",
    ),
    Family(
        "qwen3_5_text",
        _qwen3_5,
        {
            **_SHARED, "vocab_size": 248320, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 32,
            "num_key_value_heads": 4,
        },
        disk=DiskNames(older=_WHOLE),
        norm_adds_one=True,
        ignored=(_MTP, _EYES),
        package="qwen3_5",
    ),
)  # fmt: skip
