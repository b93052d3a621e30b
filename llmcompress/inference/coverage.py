"""Which models the native engines cover, as far as ``config.json`` tells; needs neither torch nor weights.

Loaded modules may still be declined (other codecs, hooks, a GPU): :func:`llmcompress.inference.native.decline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# with keys and values (engine.py), with states of fixed size (recurrent.py), and with both (hybrid.py)
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "seed_oss", "granite", "mixtral", "qwen3_moe", "olmoe",
    "qwen2_moe", "phimoe",
)  # fmt: skip
STATES = ("mamba2",)
HYBRIDS = ("bamba", "granitemoehybrid")
# rotary tables that do not depend on the length of the sequence
ROTARY = ("default", "linear", "llama3", "yarn")


def decline_config(config: Mapping[str, Any]) -> str | None:
    """Why no native engine can run a model, None if one may.

    Args:
        config: ``config.json`` of a text model.
    """
    family = str(config.get("model_type"))
    reason = decline_family(family, config.get("hidden_act", "silu"), (*FAMILIES, *STATES, *HYBRIDS))
    if reason is not None or family in STATES:
        return reason
    return _decline_rotary(config) or _decline_attention(family, config)


def decline_family(family: str, activation: str, families: Sequence[str]) -> str | None:
    """Whether a model is of one of some families, with the activation that the engines compute."""
    if family not in families:
        return f"the family {family} is not among {', '.join(families)}"
    return None if activation in ("silu", "swish") else f"the activation is {activation}, not silu"


def _decline_attention(family: str, config: Mapping[str, Any]) -> str | None:
    if family == "phimoe" and config.get("num_experts_per_tok", 2) != 2:
        return f"sparsemixer chooses 2 experts, not {config['num_experts_per_tok']}"
    if config.get("clip_qkv") is not None:
        return f"queries, keys and values are clipped at {config['clip_qkv']} (clip_qkv)"
    return None


def _decline_rotary(config: Mapping[str, Any]) -> str | None:
    # files of transformers 4 have the second name, older ones "type"
    rotary = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rotary.get("rope_type", rotary.get("type", "default"))
    # with the length transformers' Phi-MoE changes no more than the factor of its tables
    fixed = config.get("model_type") == "phimoe" and rotary.get("short_mscale") == rotary.get("long_mscale")
    if not (kind in ROTARY or (kind == "longrope" and fixed)):
        return f"rotary embedding {kind!r} depends on the length"
    part = rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if part != 1.0 and config.get("model_type") not in HYBRIDS:
        return "a part of each head is not turned by its position (partial_rotary_factor)"
    return None
