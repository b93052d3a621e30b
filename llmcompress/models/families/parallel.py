"""Families whose MLP reads the hidden states that attention reads: Cohere's Command models, early Phis, GPT-NeoX,
GPT-J, Falcon.
"""

from __future__ import annotations

from itertools import chain
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
    norm,
    plain_mlp,
)
from llmcompress.models.layout import DiskNames, LinearView, Role, RouterView, Sublayer


def _cohere(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias, normed = facts.flag("attention_bias"), facts.flag("use_qk_norm")
    head = attention(facts, layer, bias, bias, qk_norm="each" if normed else "none")
    return beside((head, gated_mlp(facts, layer, pre_norm="input_layernorm")))


def _cohere2_moe(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias, before = facts.flag("attention_bias"), "input_layernorm"
    head = attention(facts, layer, bias, bias)
    if facts.dense(index, facts.first_dense(index)):
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
    head = attention(facts, layer, True, True, names=AttentionNames(output="dense"))
    if facts.flag("qk_layernorm"):
        norms = [norm(f"{layer}.self_attn.{word}_layernorm", facts.head_dim, bias=True) for word in "qk"]
        head = Part(head.sublayer, (*head.kept, *chain(*norms)))
    return beside((head, plain_mlp(facts, layer, ("fc1", "fc2"), True, "input_layernorm")))


def _gpt_neox(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Queries, keys and values of each head side by side in one linear; two norms, or one sublayer after the other."""
    module, bias, size = f"{layer}.attention", facts.flag("attention_bias"), facts.hidden
    first = LinearView(f"{module}.query_key_value", 3 * size, size, Role.ATTENTION, bias)
    groups = first_and_last(module, (first,), LinearView(f"{module}.dense", size, size, Role.ATTENTION, bias))
    head = Part(Sublayer("attention", module, f"{layer}.input_layernorm", None, groups), biases(groups))
    parts = head, plain_mlp(facts, layer, ("dense_h_to_4h", "dense_4h_to_h"), True)
    return beside(parts) if facts.flag("use_parallel_residual") else parts


def _gptj(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    head = attention(facts, layer, names=AttentionNames("attn", "ln_1", output="out_proj"))
    size = facts.optional_size("n_inner") or 4 * facts.hidden
    mlp = plain_mlp(facts.having(intermediate_size=size), layer, ("fc_in", "fc_out"), True, "ln_1")
    return beside((head, mlp))


def _falcon(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Queries, keys and values in one linear: those of a group of heads side by side, or one key and value last."""
    module, bias, newer = f"{layer}.self_attention", facts.flag("bias"), facts.flag("new_decoder_architecture")
    if newer:
        pairs = facts.optional_size("num_kv_heads") or facts.heads
    else:
        pairs = 1 if facts.flag("multi_query") else facts.heads
    width = facts.hidden // facts.heads
    first = LinearView(
        f"{module}.query_key_value", (facts.heads + 2 * pairs) * width, facts.hidden, Role.ATTENTION, bias
    )
    last = LinearView(f"{module}.dense", facts.hidden, facts.hidden, Role.ATTENTION, bias)
    groups = first_and_last(module, (first,), last)
    norms = facts.optional_size("num_ln_in_parallel_attn") or (2 if newer else 1)
    before, between = ("ln_attn", "ln_mlp") if norms == 2 else ("input_layernorm", "input_layernorm")
    if not facts.flag("parallel_attn"):
        before, between = "input_layernorm", "post_attention_layernorm"
    size = facts.optional_size("ffn_hidden_size") or 4 * facts.hidden
    parts = (
        Part(Sublayer("attention", module, f"{layer}.{before}", None, groups), biases(groups)),
        plain_mlp(facts.having(intermediate_size=size), layer, ("dense_h_to_4h", "dense_4h_to_h"), bias, between),
    )
    return beside(parts) if newer or facts.flag("parallel_attn") else parts


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
    Family(
        "gptj",
        _gptj,
        {
            "vocab_size": 50400, "hidden_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16,
            "n_inner": None, "tie_word_embeddings": False, "lm_head_bias": True,
        },
        aliases={"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
        norm_bias=True,
        head_bias="lm_head_bias",
        body="transformer",
        layers="h",
        embedding="wte",
        final_norm="ln_f",
    ),
    Family(
        "falcon",
        _falcon,
        {
            "vocab_size": 65024, "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71,
            "num_kv_heads": None, "tie_word_embeddings": True, "bias": False, "multi_query": True,
            "parallel_attn": True, "new_decoder_architecture": False, "num_ln_in_parallel_attn": None,
            "ffn_hidden_size": None,
        },
        norm_bias=True,
        body="transformer",
        layers="h",
        embedding="word_embeddings",
        final_norm="ln_f",
    ),
)  # fmt: skip
