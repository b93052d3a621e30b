"""Dense decoder families: llama, qwen2, qwen3, mistral, gemma, gemma2, gemma3_text."""

from __future__ import annotations

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, attention, gated_mlp


def _llama(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias), gated_mlp(facts, layer, facts.flag("mlp_bias"))


def _qwen2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return attention(facts, layer, qkv_bias=True), gated_mlp(facts, layer)


def _qwen3(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias, qk_norm="head"), gated_mlp(facts, layer)


def _sandwich(facts: Facts, layer: str, qk_norm: bool) -> tuple[Part, ...]:
    """Gemma 2 and 3 put a norm before and after each sublayer."""
    bias = facts.flag("attention_bias")
    after = f"{layer}.post_attention_layernorm"
    return (
        attention(facts, layer, bias, bias, qk_norm="head" if qk_norm else "none", post_norm=after),
        gated_mlp(facts, layer, pre_norm="pre_feedforward_layernorm", post_norm=f"{layer}.post_feedforward_layernorm"),
    )


def _gemma2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _sandwich(facts, layer, qk_norm=False)


def _gemma3(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _sandwich(facts, layer, qk_norm=True)


_SEVEN_B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_QWEN = {**_SEVEN_B, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_GEMMA2 = {
    "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
    "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True,
    "attention_bias": False,
}  # fmt: skip
_GEMMA = {
    **_GEMMA2, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 16,
}  # fmt: skip

FAMILIES = (
    Family("llama", _llama, _SEVEN_B),
    Family("mistral", _llama, {**_SEVEN_B, "intermediate_size": 14336, "num_key_value_heads": 8}),
    Family("qwen2", _qwen2, _QWEN),
    Family("qwen3", _qwen3, {**_QWEN, "head_dim": 128}),
    Family("gemma", _llama, _GEMMA),
    Family("gemma2", _gemma2, _GEMMA2),
    Family("gemma3_text", _gemma3, {**_GEMMA2, "vocab_size": 262208}),
)
