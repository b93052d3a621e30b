"""Dense decoder families: Llama and those who changed a norm, a bias, a constant or which matrices are one."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import (
    AttentionNames,
    Family,
    Part,
    attention,
    beside,
    gated_mlp,
    norm,
    plain_mlp,
    scaled,
    with_sinks,
)
from llmcompress.models.layout import TensorView


def _llama(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias), gated_mlp(facts, layer, facts.flag("mlp_bias"))


def _helium(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return attention(facts, layer, facts.flag("attention_bias")), gated_mlp(facts, layer, facts.flag("mlp_bias"))


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


def _vaultgemma(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias), gated_mlp(facts, layer, pre_norm="pre_feedforward_layernorm")


def _gemma3(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return _sandwich(facts, layer, qk_norm=True)


def _seed_oss(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    biases = facts.flag("attention_bias"), facts.flag("attention_out_bias")
    return attention(facts, layer, *biases), gated_mlp(facts, layer, facts.flag("mlp_bias"))


def _granite(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return scaled(_llama(facts, index, layer), facts.number("residual_multiplier"))


def _granite_swa(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    head, mlp = _granite(facts, index, layer)
    return with_sinks(head, facts.heads), mlp


def _hyperclovax(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Granite, with a norm after each sublayer too."""
    parts = _granite(facts, index, layer)
    if not facts.flag("use_post_norm"):
        return parts
    names = (f"{layer}.post_norm{place}" for place in (1, 2))
    return tuple(Part(replace(part.sublayer, post_norm=name), part.kept) for part, name in zip(parts, names))


def _phi3(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return attention(facts, layer, form="fused"), gated_mlp(facts, layer, fused=True)


def _glm4(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    after = f"{layer}.post_self_attn_layernorm", f"{layer}.post_mlp_layernorm"
    return (
        attention(facts, layer, qkv_bias=facts.flag("attention_bias"), post_norm=after[0]),
        gated_mlp(facts, layer, post_norm=after[1], fused=True),
    )


def _glm(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return attention(facts, layer, qkv_bias=facts.flag("attention_bias")), gated_mlp(facts, layer, fused=True)


def _stablelm(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    head = attention(facts, layer, qkv_bias=facts.flag("use_qkv_bias"))
    if facts.flag("qk_layernorm"):
        # a norm for each head, a module of its own
        counts = {"q": facts.heads, "k": facts.kv_heads}
        names = [f"{layer}.self_attn.{w}_layernorm.norms.{i}" for w, count in counts.items() for i in range(count)]
        head = Part(head.sublayer, (*head.kept, *(view for name in names for view in norm(name, facts.head_dim))))
    if facts.flag("use_parallel_residual"):
        return beside((head, gated_mlp(facts, layer, pre_norm="input_layernorm")))
    return head, gated_mlp(facts, layer)


def _starcoder2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("use_bias")
    return attention(facts, layer, bias, bias), plain_mlp(facts, layer, ("c_fc", "c_proj"), bias)


def _without_gates(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    """Arcee, Jais 2 and Nemotron-4: Llama with MLPs without gates."""
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias), plain_mlp(facts, layer, bias=facts.flag("mlp_bias"))


def _apertus(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    head = attention(facts, layer, bias, bias, qk_norm="head", names=AttentionNames(pre_norm="attention_layernorm"))
    mlp = plain_mlp(facts, layer, pre_norm="feedforward_layernorm")
    if facts.get("hidden_act") != "xielu":
        return head, mlp
    # the activation is trained too (arXiv 2411.13010), and its constants are saved with it
    shapes: dict[str, tuple[int, ...]] = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}
    trained = [TensorView(f"{layer}.mlp.act_fn.{name}", shape) for name, shape in shapes.items()]
    return head, Part(mlp.sublayer, (*mlp.kept, *trained))


def _nanochat(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    bias = facts.flag("attention_bias")
    return attention(facts, layer, bias, bias), plain_mlp(facts, layer, ("fc1", "fc2"))


def norms_after(facts: Facts, layer: str, qk_norm: Literal["head", "full"]) -> tuple[Part, ...]:
    """Norms after each sublayer and none before."""
    bias, after = facts.flag("attention_bias"), f"{layer}.post_attention_layernorm"
    return (
        attention(facts, layer, bias, bias, qk_norm=qk_norm, post_norm=after, names=AttentionNames(pre_norm=None)),
        gated_mlp(facts, layer, pre_norm=None, post_norm=f"{layer}.post_feedforward_layernorm"),
    )


def _olmo2(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return norms_after(facts, layer, "full")


def _exaone4(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    return norms_after(facts, layer, "head")


_SEVEN_B = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
    "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
_QWEN = {**_SEVEN_B, "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32}
_GLM = {
    **_SEVEN_B,
    "vocab_size": 151552,
    "intermediate_size": 13696,
    "num_hidden_layers": 40,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "attention_bias": True,
}
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
    Family("ministral", _llama, {**_SEVEN_B, "intermediate_size": 14336, "num_key_value_heads": 8}),
    Family(
        "ministral3",
        _llama,
        {
            **_SEVEN_B, "vocab_size": 131072, "intermediate_size": 14336, "num_hidden_layers": 34,
            "num_key_value_heads": 8, "head_dim": 128,
        },
    ),
    Family(
        "helium",
        _helium,
        {
            **_SEVEN_B, "vocab_size": 48000, "hidden_size": 2560, "intermediate_size": 7040, "num_hidden_layers": 24,
            "num_attention_heads": 20, "num_key_value_heads": 20, "head_dim": 128,
        },
    ),
    Family(
        "cwm",
        _llama,
        {
            **_SEVEN_B, "vocab_size": 128256, "hidden_size": 6144, "intermediate_size": 21504, "num_hidden_layers": 64,
            "num_attention_heads": 48, "num_key_value_heads": 8, "head_dim": 128,
        },
    ),
    Family(
        "internlm3",
        _llama,
        {
            **_SEVEN_B, "vocab_size": 128512, "intermediate_size": 10240, "num_hidden_layers": 48,
            "num_key_value_heads": 2, "head_dim": 128,
        },
        aliases={"attention_bias": "qkv_bias", "mlp_bias": "bias"},
    ),
    Family(
        "iquestcoder",
        _llama,
        {
            **_SEVEN_B, "vocab_size": 76800, "hidden_size": 5120, "intermediate_size": 27648, "num_hidden_layers": 80,
            "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128,
        },
    ),
    Family(
        "jais2",
        _without_gates,
        {
            **_SEVEN_B, "vocab_size": 150272, "hidden_size": 3328, "intermediate_size": 26624,
            "num_attention_heads": 26, "attention_bias": True, "mlp_bias": True,
        },
        norm_bias=True,
    ),
    Family("arcee", _without_gates, {**_SEVEN_B, "hidden_size": 2560, "intermediate_size": 18432}),
    Family(
        "nemotron",
        _without_gates,
        {**_SEVEN_B, "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576, "num_attention_heads": 48},
        norm_bias=True,
        norm_adds_one=True,
    ),
    Family(
        "apertus",
        _apertus,
        {**_SEVEN_B, "vocab_size": 131072, "intermediate_size": 14336, "hidden_act": "xielu"},
    ),
    Family(
        "nanochat",
        _nanochat,
        {
            **_SEVEN_B, "vocab_size": 50304, "hidden_size": 768, "intermediate_size": 8192, "num_hidden_layers": 12,
            "num_attention_heads": 6,
        },
        norm_weights=False,
    ),
    Family("exaone4", _exaone4, {**_SEVEN_B, "vocab_size": 102400, "intermediate_size": 16384}),
    Family("qwen2", _qwen2, _QWEN),
    Family("qwen3", _qwen3, {**_QWEN, "head_dim": 128}),
    Family(
        "smollm3",
        _llama,
        {
            **_SEVEN_B, "vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
            "num_key_value_heads": 4, "tie_word_embeddings": True,
        },
    ),
    Family("granite", _granite, {**_SEVEN_B, "residual_multiplier": 1.0}),
    Family("hyperclovax", _hyperclovax, {**_SEVEN_B, "residual_multiplier": 1.0, "use_post_norm": True}),
    Family(
        "granite_swa",
        _granite_swa,
        {
            **_SEVEN_B, "vocab_size": 100352, "hidden_size": 2560, "intermediate_size": 8192, "num_hidden_layers": 24,
            "num_attention_heads": 20, "num_key_value_heads": 4, "tie_word_embeddings": True,
            "residual_multiplier": 1.0,
        },
    ),
    Family(
        "seed_oss",
        _seed_oss,
        {
            **_SEVEN_B, "vocab_size": 155136, "intermediate_size": 27648, "num_hidden_layers": 64,
            "num_attention_heads": 80, "num_key_value_heads": 8, "head_dim": 128, "attention_bias": True,
            "attention_out_bias": False,
        },
    ),
    Family("phi3", _phi3, {**_SEVEN_B, "vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192}),
    Family("glm", _glm, _GLM),
    Family("glm4", _glm4, _GLM),
    Family("olmo", _llama, {**_SEVEN_B, "vocab_size": 50304}, norm_weights=False),
    Family("olmo2", _olmo2, {**_SEVEN_B, "vocab_size": 50304}),
    Family("olmo3", _olmo2, {**_SEVEN_B, "vocab_size": 50304}),
    Family(
        "stablelm",
        _stablelm,
        {
            **_SEVEN_B, "vocab_size": 50304, "hidden_size": 2560, "intermediate_size": 6912, "num_key_value_heads": 32,
            "use_qkv_bias": False, "qk_layernorm": False, "use_parallel_residual": False,
        },
        norm_bias=True,
    ),
    Family(
        "starcoder2",
        _starcoder2,
        {
            **_SEVEN_B, "vocab_size": 49152, "hidden_size": 3072, "intermediate_size": 12288, "num_hidden_layers": 30,
            "num_attention_heads": 24, "num_key_value_heads": 2, "tie_word_embeddings": True, "use_bias": True,
        },
        norm_bias=True,
    ),
    Family("gemma", _llama, _GEMMA, norm_adds_one=True),
    Family("gemma2", _gemma2, _GEMMA2, norm_adds_one=True),
    Family("vaultgemma", _vaultgemma, _GEMMA2, norm_adds_one=True),
    Family("gemma3_text", _gemma3, {**_GEMMA2, "vocab_size": 262208}, norm_adds_one=True, package="gemma3"),
)  # fmt: skip
