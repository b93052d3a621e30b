"""gpt_oss: experts stored transposed with gate and up columns interleaved, biases everywhere, attention sinks."""

from __future__ import annotations

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention, expert_bank, mixture, with_sinks
from llmcompress.models.layout import RouterView


def _gpt_oss(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    router = RouterView(f"{layer}.mlp.router", "topk_softmax", renormalizes=True, bias=True)
    bank = expert_bank(
        facts,
        layer,
        "num_local_experts",
        "intermediate_size",
        router,
        bias=True,
        transposed=True,
        interleaved=True,
        activation="gpt_oss",
    )
    bias = facts.flag("attention_bias")
    return with_sinks(attention(facts, layer, bias, bias), facts.heads), mixture(layer, bank)


FAMILIES = (
    Family(
        "gpt_oss",
        _gpt_oss,
        {
            "vocab_size": 201088, "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36,
            "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": False,
            "num_local_experts": 128, "num_experts_per_tok": 4, "attention_bias": True,
        },
        aliases={"num_local_experts": "num_experts"},
    ),
)  # fmt: skip
