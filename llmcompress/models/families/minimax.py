"""MiniMax-M2: sigmoid routing without groups, whose correction lies beside the router."""

from __future__ import annotations

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention, expert_bank, mixture
from llmcompress.models.families.prediction import further_layers
from llmcompress.models.layout import DiskNames, RouterView, TensorView


def _minimax_m2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    correction = TensorView(f"{layer}.mlp.e_score_correction_bias", (facts.size("num_local_experts"),))
    router = RouterView(f"{layer}.mlp.gate", "sigmoid_group_topk", renormalizes=True, correction=correction)
    bank = expert_bank(facts, layer, "num_local_experts", "intermediate_size", router)
    return attention(facts, layer, qk_norm="full"), mixture(layer, bank)


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
        disk=DiskNames(
            ((".mlp.", ".block_sparse_moe."),),
            (".mlp.experts", ".block_sparse_moe.experts"),
            *("w1.weight", "w3.weight", "w2.weight"),
        ),
        ignored=further_layers("num_mtp_modules"),
    ),
)  # fmt: skip
