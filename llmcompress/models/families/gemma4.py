"""Gemma 4 without shared keys and embeddings per layer (31B, 26B-A4B): experts beside the MLP, one norm over both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention, expert_bank, gated_mlp, mixture
from llmcompress.models.layout import DiskNames, RouterView, TensorView


def _kind(facts: Facts, index: int) -> str:
    # without a list every sixth layer sees all positions, and the last one does in any case
    last = index == facts.size("num_hidden_layers") - 1
    default = "full_attention" if (index + 1) % 6 == 0 else "sliding_attention"
    kind = facts.layer_kind("layer_types", index, ("full_attention", "sliding_attention"), default)
    return "full_attention" if last else kind


def _own(facts: Facts, index: int, kind: str) -> Facts:
    """The config with the heads of one layer: files of transformers list them, released ones name those of a kind."""
    listed: Any = facts.get("per_layer_config")
    if listed is not None:
        # keys have as many digits as the largest, "05"
        known = isinstance(listed, dict) and all(str(key).isdecimal() for key in listed)
        if not known or not all(isinstance(values, dict) for values in listed.values()):
            raise InputError(f"config.json: per_layer_config must be a table of layers, not {listed!r}")
        return facts.having(**next((values for key, values in listed.items() if int(key) == index), {}))
    if kind == "sliding_attention":
        return facts
    heads = facts.optional_size("num_global_key_value_heads") if facts.flag("attention_k_eq_v") else None
    more = {} if heads is None else {"num_key_value_heads": heads}
    return facts.having(head_dim=facts.size("global_head_dim"), **more)


def _attention(facts: Facts, index: int, layer: str) -> Part:
    kind, bias = _kind(facts, index), facts.flag("attention_bias")
    after = f"{layer}.post_attention_layernorm"
    head = attention(_own(facts, index, kind), layer, bias, bias, qk_norm="head", post_norm=after)
    if kind == "sliding_attention" or not facts.flag("attention_k_eq_v"):
        return head
    # keys are values too
    first, last = head.sublayer.groups
    without = tuple(linear for linear in first.linears if not linear.name.endswith(".v_proj"))
    kept = tuple(view for view in head.kept if not view.name.endswith(".v_proj.bias"))
    return Part(replace(head.sublayer, groups=(replace(first, linears=without), last)), kept)


def _gemma4(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    for key, what in (
        ("num_kv_shared_layers", "layers that read the keys and values of earlier ones"),
        ("hidden_size_per_layer_input", "embeddings of each layer"),
    ):
        if facts.size(key, at_least=0):
            raise InputError(
                f"config.json: {key} {facts.get(key)}: Gemma 4 with {what} (E2B, E4B) is not supported",
                "supported: 0, as in Gemma 4 31B and 26B-A4B",
            )
    if facts.get("use_bidirectional_attention") == "all":
        raise InputError("config.json: use_bidirectional_attention 'all': only causal models are supported")
    head, before, after = _attention(facts, index, layer), "pre_feedforward_layernorm", "post_feedforward_layernorm"
    if not facts.flag("enable_moe_block"):
        return head, gated_mlp(facts, layer, pre_norm=before, post_norm=f"{layer}.{after}")
    beside = gated_mlp(facts, layer, pre_norm=before, post_norm=f"{layer}.{after}_1")
    module = f"{layer}.router"
    router = RouterView(module, "softmax_topk", renormalizes=True, matrix="proj.weight", floor=0.0, normed=True)
    bank = expert_bank(
        facts, layer, "num_experts", "moe_intermediate_size", router, top_k=facts.size("top_k_experts"),
        activation=facts.activation("hidden_activation"),
    )  # fmt: skip
    # the layer itself holds router and experts
    bank = replace(bank, module=f"{layer}.experts")
    scales = (
        TensorView(f"{module}.scale", (facts.hidden,)),
        TensorView(f"{module}.per_expert_scale", (bank.num_experts,)),
    )
    experts = mixture(layer, bank, extra=scales, pre_norm=f"{before}_2", post_norm=f"{after}_2")
    joined = replace(experts.sublayer, module=layer, joins=f"{layer}.{after}")
    return head, Part(replace(beside.sublayer, writes="aside"), beside.kept), Part(joined, experts.kept)


FAMILIES = (
    Family(
        "gemma4_text",
        _gemma4,
        {
            "vocab_size": 262144, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 30,
            "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "global_head_dim": 512,
            "num_global_key_value_heads": None, "tie_word_embeddings": True, "attention_bias": False,
            "hidden_activation": "gelu_pytorch_tanh", "layer_types": None, "per_layer_config": None,
            "attention_k_eq_v": False, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 256,
            "use_bidirectional_attention": None, "enable_moe_block": False, "num_experts": None,
            "top_k_experts": None, "moe_intermediate_size": None,
        },
        # a text part that was saved from a model that has images too
        disk=DiskNames(older=(("model.", "model.language_model."),)),
        package="gemma4",
        layer_scale="layer_scalar",
    ),
)  # fmt: skip
