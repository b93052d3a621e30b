"""MiniMax-M2: sigmoid routing without groups, whose correction lies beside the router. MiniMax-Text-01 and M1:
lightning attention in most layers, and normed inputs that take the place of the residual stream.
"""

from __future__ import annotations

from dataclasses import replace

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention, expert_bank, first_and_last, mixture, norm
from llmcompress.models.families.prediction import further_layers
from llmcompress.models.layout import DiskNames, LinearView, Role, RouterView, Sublayer, TensorView


def _minimax_m2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    correction = TensorView(f"{layer}.mlp.e_score_correction_bias", (facts.size("num_local_experts"),))
    router = RouterView(f"{layer}.mlp.gate", "sigmoid_group_topk", renormalizes=True, correction=correction)
    bank = expert_bank(facts, layer, "num_local_experts", "intermediate_size", router)
    return attention(facts, layer, qk_norm="full"), mixture(layer, bank)


def _lightning(facts: Facts, layer: str) -> Part:
    """Linear attention with constant decays (arXiv 2401.04658): queries, keys and values of each head side by side."""
    module, heads, block = f"{layer}.self_attn", facts.heads, facts.size("block_size")
    inner, hidden = heads * facts.head_dim, facts.hidden
    rows = {"qkv_proj": 3 * inner, "output_gate": inner}
    first = [LinearView(f"{module}.{name}", size, hidden, Role.ATTENTION) for name, size in rows.items()]
    groups = first_and_last(module, first, LinearView(f"{module}.out_proj", hidden, inner, Role.ATTENTION))
    # constants, which transformers saves
    shapes = {
        "slope_rate": (heads, 1, 1),
        "query_decay": (heads, block, 1),
        "key_decay": (heads, block, 1),
        "diagonal_decay": (1, heads, block, block),
    }
    constants = [TensorView(f"{module}.{name}", shape) for name, shape in shapes.items()]
    sublayer = Sublayer("attention", module, f"{layer}.input_layernorm", None, groups, decays=True)
    return Part(sublayer, (*norm(f"{module}.norm", inner), *constants))


def _keeping(facts: Facts, part: Part, word: str) -> Part:
    scale, keeps = facts.number(f"{word}_beta_factor"), facts.number(f"{word}_alpha_factor")
    return Part(replace(part.sublayer, output_scale=scale, keeps=keeps), part.kept)


def _minimax(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    kinds = ("full_attention", "linear_attention")
    linear = facts.layer_kind("layer_types", index, kinds, kinds[index % 2]) == "linear_attention"
    head = _lightning(facts, layer) if linear else attention(facts, layer)
    router = RouterView(f"{layer}.mlp.gate", "softmax_topk", renormalizes=True)
    bank = expert_bank(facts, layer, "num_local_experts", "intermediate_size", router)
    words = "linear_attn" if linear else "full_attn", "mlp"
    return tuple(_keeping(facts, part, word) for part, word in zip((head, mixture(layer, bank)), words))


_DISK = DiskNames(
    ((".mlp.", ".block_sparse_moe."),),
    (".mlp.experts", ".block_sparse_moe.experts"),
    *("w1.weight", "w3.weight", "w2.weight"),
)

FAMILIES = (
    Family(
        "minimax_m2",
        _minimax_m2,
        {
            "vocab_size": 200064, "hidden_size": 3072, "intermediate_size": 1536, "num_hidden_layers": 62,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": False,
            "hidden_act": "silu", "num_local_experts": 256, "num_experts_per_tok": 8, "num_mtp_modules": 0,
        },
        aliases={"num_local_experts": "num_experts"},
        disk=_DISK,
        ignored=further_layers("num_mtp_modules"),
    ),
    Family(
        "minimax",
        _minimax,
        {
            "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
            "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": None, "tie_word_embeddings": False,
            "hidden_act": "silu", "num_local_experts": 8, "num_experts_per_tok": 2, "layer_types": None,
            "block_size": 256,
            **{f"{name}_{end}_factor": 1 for name in ("full_attn", "linear_attn", "mlp") for end in ("alpha", "beta")},
        },
        aliases={"num_local_experts": "num_experts"},
        disk=_DISK,
    ),
)  # fmt: skip
