"""Families whose MLP reads the hidden states that attention reads: Cohere's Command models, early Phis, GPT-NeoX."""

from __future__ import annotations

from typing import Any

from llmcompress.errors import InputError
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    PER_EXPERT,
    AttentionNames,
    Family,
    Part,
    attention,
    beside,
    biases,
    expert_bank,
    first_and_last,
    gated_groups,
    gated_mlp,
    mixture,
    plain_mlp,
)
from llmcompress.models.layout import DiskNames, LinearView, Role, RouterView, Sublayer


def _cohere(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    facts.refuse("cohere", "use_qk_norm")  # no RMSNorm, as in phi
    bias = facts.flag("attention_bias")
    return beside((attention(facts, layer, bias, bias), gated_mlp(facts, layer, pre_norm="input_layernorm")))


def _cohere2_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias, before = facts.flag("attention_bias"), "input_layernorm"
    head, dense = attention(facts, layer, bias, bias), index < facts.size("first_k_dense_replace", at_least=0)
    if facts.layer_kind("mlp_layer_types", index, ("sparse", "dense"), "dense" if dense else "sparse") == "dense":
        wide = facts.optional_size("prefix_dense_intermediate_size") or facts.size("intermediate_size")
        return beside((head, gated_mlp(facts.having(intermediate_size=wide), layer, pre_norm=before)))
    chosen = {"softmax": "topk_softmax", "sigmoid": "sigmoid_group_topk"}
    kind: Any = chosen.get(facts.get("expert_selection_fn"))
    if kind is None:
        found = facts.get("expert_selection_fn")
        raise InputError(f"config.json: expert_selection_fn {found!r} is not known here", f"known: {', '.join(chosen)}")
    renormalizes = kind == "topk_softmax" or facts.flag("norm_topk_prob")
    router = RouterView(f"{layer}.mlp.gate", kind, renormalizes)
    bank = expert_bank(facts, layer, "num_experts", "intermediate_size", router)
    size = facts.size("intermediate_size") * facts.size("num_shared_experts", at_least=0)
    shared = gated_groups(f"{layer}.mlp.shared_experts", facts.hidden, size, Role.SHARED_EXPERTS) if size else ()
    return beside((head, mixture(layer, bank, shared, pre_norm=before)))


def _phi(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    facts.refuse("phi", "qk_layernorm")
    head = attention(facts, layer, True, True, names=AttentionNames(output="dense"))
    return beside((head, plain_mlp(facts, layer, ("fc1", "fc2"), True, "input_layernorm")))


def _gpt_neox(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Queries, keys and values of each head side by side in one linear; two norms, or one sublayer after the other."""
    module, bias, size = f"{layer}.attention", facts.flag("attention_bias"), facts.hidden
    first = LinearView(f"{module}.query_key_value", 3 * size, size, Role.ATTENTION, bias)
    groups = first_and_last(module, (first,), LinearView(f"{module}.dense", size, size, Role.ATTENTION, bias))
    head = Part(Sublayer("attention", module, f"{layer}.input_layernorm", None, groups), biases(groups))
    parts = head, plain_mlp(facts, layer, ("dense_h_to_4h", "dense_4h_to_h"), True)
    return beside(parts) if facts.flag("use_parallel_residual") else parts


_COMMAND = {
    "vocab_size": 256000, "hidden_size": 8192, "intermediate_size": 22528, "num_hidden_layers": 40,
    "num_attention_heads": 64, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": True,
    "attention_bias": False, "use_qk_norm": False,
}  # fmt: skip
_PHI = {
    "vocab_size": 51200, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
    "qk_layernorm": False, "lm_head_bias": True,
}  # fmt: skip
_NEOX = {
    "vocab_size": 50432, "hidden_size": 6144, "intermediate_size": 24576, "num_hidden_layers": 44,
    "num_attention_heads": 64, "tie_word_embeddings": False, "attention_bias": True, "use_parallel_residual": True,
}  # fmt: skip

FAMILIES = (
    Family("cohere", _cohere, _COMMAND),
    Family("cohere2", _cohere, _COMMAND),
    Family(
        "cohere2_moe",
        _cohere2_moe,
        {
            **_COMMAND,
            "head_dim": 128,
            "hidden_act": "silu",
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "num_shared_experts": 0,
            "expert_selection_fn": "softmax",
            "norm_topk_prob": True,
            "mlp_layer_types": None,
            "first_k_dense_replace": 0,
            "prefix_dense_intermediate_size": None,
        },
        disk=PER_EXPERT,
    ),
    Family("phi", _phi, _PHI, norm_bias=True, head_bias="lm_head_bias", final_norm="final_layernorm"),
    Family(
        "gpt_neox",
        _gpt_neox,
        _NEOX,
        disk=DiskNames(renames=(("lm_head.", "embed_out."),)),
        norm_bias=True,
        ignored=(r"\.attention\.(masked_)?bias$", r"\.attention\.rotary_emb\.inv_freq$"),
        body="gpt_neox",
        embedding="embed_in",
        final_norm="final_layer_norm",
    ),
)
