"""OLMo Hybrid: gated delta rules with norms before them in most layers, OLMo 2's attention with norms after it.

What makes step sizes and decays is a row per head and stays dense, as in Qwen3-Next.
"""

from __future__ import annotations

from llmcompress.models.families.dense import norms_after
from llmcompress.models.families.facts import Facts
from llmcompress.models.families.parts import Family, Part, first_and_last, gated_mlp, norm, weights
from llmcompress.models.layout import DiskNames, LinearView, Role, ScanView, Sublayer, TensorView

_KINDS = ("linear_attention", "full_attention")


def _sizes(facts: Facts) -> tuple[int, int, int, int]:
    """Key heads, value heads, columns of a key and of a value."""
    key_heads, heads = (facts.optional_size(f"linear_num_{word}_heads") or facts.heads for word in ("key", "value"))
    key = facts.optional_size("linear_key_head_dim") or int(0.75 * facts.hidden / key_heads)
    return key_heads, heads, key, facts.optional_size("linear_value_head_dim") or 2 * key


def _kind(facts: Facts, index: int) -> str:
    count = facts.size("num_hidden_layers")
    # every fourth layer, and the last one of a model with less
    default = _KINDS[index % 4 == 3 or (count < 4 and index == count - 1)]
    return facts.layer_kind("layer_types", index, _KINDS, default)


def _delta_rule(facts: Facts, layer: str) -> Part:
    module, hidden, taps = f"{layer}.linear_attn", facts.hidden, facts.size("linear_conv_kernel_dim")
    key_heads, heads, key, value = _sizes(facts)
    rows = {"q": key_heads * key, "k": key_heads * key, "v": heads * value, "g": heads * value}
    mixed = sum(rows.values()) - rows["g"]

    def linear(name: str, size: int) -> LinearView:
        return LinearView(f"{module}.{name}_proj", size, hidden, Role.SSM)

    last = LinearView(f"{module}.o_proj", hidden, heads * value, Role.SSM)
    groups = first_and_last(module, [linear(name, size) for name, size in rows.items()], last)
    beside = (linear("a", heads), linear("b", heads))
    kept = weights(beside)
    kept += [TensorView(f"{module}.{name}", (heads,)) for name in ("dt_bias", "A_log")]
    kept.append(TensorView(f"{module}.conv1d.weight", (mixed, 1, taps)))
    scan = ScanView(module, "delta", heads, value, key, key_heads, mixed, taps)
    sublayer = Sublayer("ssm", module, f"{layer}.input_layernorm", None, groups, scan=scan, beside=beside)
    return Part(sublayer, (*kept, *norm(f"{module}.o_norm", value)))


def _olmo_hybrid(facts: Facts, index: int, layer: str) -> tuple[Part, ...]:
    if _kind(facts, index) == "full_attention":
        return norms_after(facts, layer, "full")
    return _delta_rule(facts, layer), gated_mlp(facts, layer)


def _disk(facts: Facts) -> DiskNames:
    key_heads, heads, key, value = _sizes(facts)
    lengths = {"q": key_heads * key, "k": key_heads * key, "v": heads * value}
    return DiskNames(
        # transformers writes all layers' norms by these names, and reads both
        (
            (".input_layernorm.", ".attention_layer_norm."),
            (".post_attention_layernorm.", ".feedforward_layer_norm."),
        ),
        cut=((".conv1d.weight", tuple((f".{word}_conv1d.weight", length) for word, length in lengths.items())),),
    )


FAMILIES = (
    Family(
        "olmo_hybrid",
        _olmo_hybrid,
        {
            "vocab_size": 100352, "hidden_size": 3840, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 30, "num_key_value_heads": None, "head_dim": None, "tie_word_embeddings": False,
            "attention_bias": False, "layer_types": None, "linear_num_key_heads": None, "linear_num_value_heads": None,
            "linear_key_head_dim": None, "linear_value_head_dim": None, "linear_conv_kernel_dim": 4,
        },
        disk=_disk,
        ignored=(r"^mtp",),
    ),
)  # fmt: skip
