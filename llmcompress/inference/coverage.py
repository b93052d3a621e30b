"""Which models the native engines cover, as far as ``config.json`` tells; needs neither torch nor weights.

Loaded modules may still be declined (other codecs, hooks, a GPU): :func:`llmcompress.inference.native.decline`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from llmcompress.models.registry import layout_from_config

STATES = ("mamba2", "mamba", "falcon_mamba")
HYBRIDS = ("bamba", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "nemotron_h", "falcon_h1", "zamba2")
# with delta rules or lightning attention in some layers (delta.py)
DELTAS = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear", "minimax")
# with keys and values (engine.py), with states of fixed size (recurrent.py), and with both (hybrid.py)
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "smollm3", "seed_oss", "granite", "mixtral", "qwen3_moe", "olmoe",
    "qwen2_moe", "phimoe", "olmo2", "olmo3", "glm4_moe", "deepseek_v2", "deepseek_v3", "phi3", "glm", "glm4", "gemma",
    "gemma2", "gemma3_text", "stablelm", "starcoder2", "glm4_moe_lite", "dots1", "gpt_oss", "minimax_m2",
    "ernie4_5", "ernie4_5_moe", "ministral", "ministral3", "arcee", "nemotron", "cohere", "cohere2", "phi", "exaone4",
    "exaone_moe", "solar_open", "flex_olmo", "hunyuan_v1_dense", "hunyuan_v1_moe", "granitemoe", "granitemoeshared",
    "helium", "cwm", "gpt_neox", "deepseek_v32", "glm_moe_dsa", "mellum", "hy_v3", "afmoe",
    "granite_swa", "granitemoe_swa", "gemma4_text", "llama4_text", "cohere2_moe", "apertus", "nanochat",
    "gptj", "falcon", "mimo_v2_flash", "laguna", "internlm3", "iquestcoder", "jais2", "hyperclovax", "olmo",
    "vaultgemma", "youtu", "minicpm3", "opt", "gpt_neo",
)  # fmt: skip
# families whose heads may be turned in part, and those that turn columns side by side
PARTIAL = (
    *HYBRIDS, *DELTAS, "glm4_moe", "phi3", "glm", "glm4", "stablelm", "minimax_m2", "nemotron", "phi", "solar_open",
    "gpt_neox", "gemma4_text", "gptj", "mimo_v2_flash", "laguna",
)  # fmt: skip
_COHERE = ("cohere", "cohere2", "cohere2_moe")
NEIGHBOURS = ("glm", "glm4", "ernie4_5", "ernie4_5_moe", "helium", "llama4_text", "gptj", *_COHERE)
# families whose rotary tables say the number of a pair twice, side by side; whose layers that see all positions turn
# nothing; that norm heads once they are turned
TWICE, TURNED_IN_WINDOWS = _COHERE, ("cohere2", "cohere2_moe", "exaone4", "exaone_moe")
NORMS_LAST = ("hunyuan_v1_dense", "hunyuan_v1_moe", "nanochat")
# whose latents have turned pairs half of their part apart, without saying so in a config
HALVES_APART = ("minicpm3",)
# whose tokens see what an indexer chooses
INDEXED = ("deepseek_v32", "glm_moe_dsa")
# what configs call the activations of gated MLPs, and what the engines do; layers with states know the first one
ACTIVATIONS = {
    "silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
    "relu": "relu", "relu2": "relu2", "xielu": "xielu",
}  # fmt: skip
_GEMMA = ("gemma", "gemma2", "gemma3_text", "gemma4_text", "vaultgemma")
# what configs of other families call it
_CALLED = {
    "gptj": ("activation_function", "gelu_new"),
    "falcon": ("activation", "gelu"),
    "opt": ("activation_function", "relu"),
    "gpt_neo": ("activation_function", "gelu_new"),
    "apertus": ("hidden_act", "xielu"),
}
# whose tables of positions end, and what configs call the end
_ENDS = {"gptj": "n_positions", "opt": "max_position_embeddings", "gpt_neo": "max_position_embeddings"}
# columns of a head, or of what stands for all keys and values of a token: MAX_HEAD_DIM of the decode step
MOST_COLUMNS = 1024
# rotary tables that do not depend on the length of the sequence; those of longrope do beyond :func:`reach`
ROTARY = ("default", "linear", "llama3", "yarn", "proportional")


def decline_config(config: Mapping[str, Any]) -> str | None:
    """Why no native engine can run a model, None if one may.

    Args:
        config: ``config.json`` of a text model.
    """
    family = str(config.get("model_type"))
    reason = decline_family(family, activation_of(config), (*FAMILIES, *STATES, *HYBRIDS, *DELTAS))
    if reason is not None or family in STATES:
        return reason
    if family in DELTAS and config.get("sliding_window") and layout_from_config(config).decays:
        return f"layers without states see {config['sliding_window']} tokens alone (sliding_window)"
    return _decline_rotary(config) or _decline_columns(config) or _decline_attention(family, config)


def activation_of(config: Mapping[str, Any]) -> str:
    """The activation of a text model's MLPs, as its config calls it."""
    if config.get("model_type") == "nemotron_h":
        return str(config.get("mlp_hidden_act", "relu2"))
    if config.get("model_type") in _CALLED:
        return str(config.get(*_CALLED[config["model_type"]]))
    if config.get("model_type") not in _GEMMA:
        return str(config.get("hidden_act", "silu"))
    key = "hidden_act" if config["model_type"] == "gemma" else "hidden_activation"
    given = str(config.get(key) or "gelu_pytorch_tanh")
    # the first Gemma's files say gelu and mean this; transformers reads them so
    return "gelu_pytorch_tanh" if key == "hidden_act" and given == "gelu" else given


def decline_family(family: str, activation: str, families: Sequence[str]) -> str | None:
    """Whether a model is of one of some families, with the activation that the engines compute."""
    if family not in families:
        return f"the family {family} is not among {', '.join(families)}"
    # where MLPs do as the mixers do
    shared = family in (*STATES, *HYBRIDS, *DELTAS) and family not in ("nemotron_h", "zamba2")
    known = [name for name in ACTIVATIONS if ACTIVATIONS[name] == "silu" or not shared]
    known = [name for name in known if name != "xielu" or family == "apertus"]
    return None if activation in known else f"the activation {activation} is not among {', '.join(known)}"


def _decline_attention(family: str, config: Mapping[str, Any]) -> str | None:
    if family == "phimoe" and config.get("num_experts_per_tok", 2) != 2:
        return f"sparsemixer chooses 2 experts, not {config['num_experts_per_tok']}"
    if family == "falcon" and config.get("alibi"):
        return "scores get biases by distance (alibi)"
    if family == "hunyuan_v1_moe" and len(set(_experts_chosen(config))) > 1:
        return "layers choose different numbers of experts (moe_topk)"
    if config.get("mamba_rms_norm") and config.get("mamba_norm_before_gate", True):
        return "its mixers norm before their gates (mamba_norm_before_gate)"
    if config.get("mamba_hidden_act", "silu") != "silu":
        return f"the activation {config['mamba_hidden_act']} of its mixers (mamba_hidden_act) is not silu"
    # Gemma 4's "vision" is about images
    if config.get("use_bidirectional_attention") not in (None, False, "vision"):
        return "tokens attend to later ones (use_bidirectional_attention)"
    if config.get("clip_qkv") is not None:
        return f"queries, keys and values are clipped at {config['clip_qkv']} (clip_qkv)"
    return None


def _decline_columns(config: Mapping[str, Any]) -> str | None:
    def size(key: str) -> int:
        return int(config.get(key) or 0)

    own = size("head_dim") or size("attention_head_dim") or size("hidden_size") // max(1, size("num_attention_heads"))
    # latents stand for the keys and values of all heads, with the part of keys that is turned
    columns = max(own, size("global_head_dim"), size("v_head_dim"), size("kv_lora_rank") + size("qk_rope_head_dim"))
    return f"heads of {columns} columns, more than {MOST_COLUMNS}" if columns > MOST_COLUMNS else None


def _experts_chosen(config: Mapping[str, Any]) -> list[Any]:
    chosen = config.get("moe_topk", 1)
    return chosen if isinstance(chosen, list) else [chosen]


def reach(config: Mapping[str, Any]) -> int | None:
    """Tokens that a sequence may have in a native engine, None for any number.

    A longer sequence takes another of longrope's tables for all its tokens, or lets an indexer choose what they see
    (DeepSeek-V3.2), which sees everything up to there. Tables of learned positions end, and so does GPT-J's.

    Args:
        config: Config of a loaded text model.
    """
    limits = [turns(config), config.get("index_topk", 2048) if config.get("model_type") in INDEXED else None]
    end = _ENDS.get(str(config.get("model_type")))
    limits.append(None if end is None else config.get(end, 2048))
    return min((int(limit) for limit in limits if limit is not None), default=None)


def turns(config: Mapping[str, Any]) -> int | None:
    """Tokens beyond which a sequence takes another of longrope's tables, for all its tokens; None where none does.

    Args:
        config: Config of a loaded text model.
    """
    # transformers takes the whole length where the first one is not told
    keys = ("original_max_position_embeddings", "max_position_embeddings")
    told = next((int(config[key]) for key in keys if config.get(key)), None)
    limits = [
        rotary.get(keys[0], told)
        for rotary in _rotary(config)
        if _kind(rotary) == "longrope" and not _fixed(config, rotary)
    ]
    return min((int(limit) for limit in limits if limit is not None), default=None)


def _rotary(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What a config says about rotary embeddings, of each kind of layers where these differ."""
    # files of transformers 4 have the second name
    given: Mapping[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    return [part for part in given.values() if isinstance(part, Mapping)] or [given]


def _kind(rotary: Mapping[str, Any]) -> str:
    # older files say "type", and "su" of longrope
    kind = str(rotary.get("rope_type", rotary.get("type", "default")))
    return "longrope" if kind == "su" else kind


def _fixed(config: Mapping[str, Any], rotary: Mapping[str, Any]) -> bool:
    """Whether longrope does not depend on the length: transformers' Phi-MoE changes no more than a factor with it."""
    return config.get("model_type") == "phimoe" and rotary.get("short_mscale") == rotary.get("long_mscale")


def _decline_rotary(config: Mapping[str, Any]) -> str | None:
    bases = config.get("layer_rope_theta")
    if bases and not any(bases):
        return "no layer turns queries and keys to their positions (layer_rope_theta)"
    for rotary in _rotary(config):
        kind = _kind(rotary)
        # Hunyuan's alpha fixes what the name says is not
        fixed = kind == "dynamic" and config.get("model_type") in NORMS_LAST and bool(rotary.get("alpha"))
        if not (kind in ROTARY or kind == "longrope" or fixed):
            return f"rotary embedding {kind!r} depends on the length"
        part = rotary.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
        if part != 1.0 and config.get("model_type") not in PARTIAL:
            return "a part of each head is not turned by its position (partial_rotary_factor)"
    return None
