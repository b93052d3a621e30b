"""Attention of a model's layers as the native decode step reads it: projections, norms of heads, windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from llmcompress_kernels import matrix
from llmcompress_kernels.decode_layer import Heads
from torch import Tensor

from llmcompress.inference.coverage import NORMS_LAST
from llmcompress.inference.latent import is_latent, keys_and_values
from llmcompress.inference.weights import centres, linear_matrix, linear_parts, norm_of, ones_of


def window_of(config: Any, layer: int) -> int:
    """Positions that a token of a layer sees, itself the last of them; 0 for all.

    Args:
        config: Config of a text model. Families whose configs do not know windows ignore the key.
        layer: Which one.
    """
    if is_chunked(config, layer):
        return int(config.attention_chunk_size or 0)
    if hasattr(type(config), "attention_types"):
        # GPT-Neo's words
        return int(config.window_size) if config.attention_layers[layer] == "local" else 0
    known = hasattr(type(config), "sliding_window") and getattr(config, "use_sliding_window", True)
    kinds = getattr(config, "layer_types", None)
    if not known or (kinds is not None and kinds[layer] != "sliding_attention"):
        return 0
    return int(config.sliding_window or 0)


def is_chunked(config: Any, layer: int) -> bool:
    """Whether a layer's tokens see those since the last multiple of its window (Llama 4)."""
    kinds = getattr(config, "layer_types", None)
    return kinds is not None and kinds[layer] == "chunked_attention"


def projections(attention: Any, config: Any, members: Sequence[str], adds_one: bool) -> dict[str, Any]:
    """What attention reads before and after, by the names of :class:`~llmcompress_kernels.decode.Layer`.

    Args:
        attention: A layer's module.
        config: Config of the model.
        members: Members of a family, or none.
        adds_one: Norms multiply by one more than they hold.
    """
    last = next(getattr(attention, name) for name in ("o_proj", "dense", "out_proj") if hasattr(attention, name))
    output = linear_matrix(last, members)
    if is_latent(attention):
        return {**_latent_projections(attention), "output": output, "heads": heads_of(attention, config)}
    heads, sizes = _heads(attention, config, members), heads_of(attention, config)
    return {
        **heads,
        **_norms(attention, config, sizes, members, adds_one),
        "output": output,
        "heads": sizes,
        "sinks": norm_of(attention, "sinks"),
        "gates": heads["query"].rows == 2 * sizes.count * sizes.key_dim,
        **_head_gates(attention, members),
    }


def _norms(attention: Any, config: Any, sizes: Heads, members: Sequence[str], adds_one: bool) -> dict[str, Any]:
    """Norms of queries, keys and values."""
    ones = ones_of(sizes.key_dim, members)
    if hasattr(attention, "qk_norm"):
        # Llama 4's have no weights
        return {"query_norm": ones, "key_norm": ones, "norms_last": True}
    found: dict[str, Any] = {}
    for side in ("query", "key"):
        names = (f"{side[0]}_norm", f"{side}_layernorm", f"{side[0]}_layernorm")
        module = next((getattr(attention, name) for name in names if hasattr(attention, name)), None)
        if module is None:
            continue
        own = list(getattr(module, "norms", [module]))
        weights = [norm_of(each, adds_one=adds_one) for each in own]
        bias = [norm_of(each, "bias") for each in own]
        # heads beside each other, of every member
        weight = ones if weights[0] is None else torch.cat(weights, dim=-1)
        found[f"{side}_norm"] = weight
        if bias[0] is not None or centres(own[0]):
            found[f"{side}_norm_bias"] = torch.zeros_like(weight) if bias[0] is None else torch.cat(bias, dim=-1)
            # one head of keys has as many weights as all of them would share
            own_rows = weight.numel() > sizes.key_dim * max(1, len(members))
            found["own_norms"] = found.get("own_norms", False) or own_rows
    if "query_norm" in found and "query_norm_bias" not in found:
        found["whole_norms"] = found["query_norm"].shape[-1] != sizes.key_dim
        found["norms_last"] = config.model_type in NORMS_LAST
    if hasattr(attention, "v_norm"):
        weight = norm_of(attention.v_norm, adds_one=adds_one)
        found["value_norm"] = torch.ones(sizes.value_dim) if weight is None else weight
    return found


def _head_gates(attention: Any, members: Sequence[str]) -> dict[str, Any]:
    """Gates on results that a linear of their own makes, of all their columns or one for each head."""
    module = getattr(attention, "gate_proj", getattr(attention, "g_proj", None))
    if module is None:
        return {}
    return {"head_gates": linear_matrix(module, members), "softplus": hasattr(attention, "g_proj")}


def heads_of(attention: Any, config: Any) -> Heads:
    """Sizes of a layer's attention.

    Args:
        attention: Its module.
        config: Config of the model, for what modules do not tell.
    """
    count = int(getattr(attention, "num_heads", None) or config.num_attention_heads)
    if is_latent(attention):
        return Heads(count, 1, attention.qk_head_dim, attention.v_head_dim)
    size = int(attention.head_dim if hasattr(attention, "head_dim") else attention.head_size)
    value_dim = int(getattr(attention, "v_head_dim", None) or size)
    shared = getattr(attention, "num_kv_heads", None) or count // getattr(attention, "num_key_value_groups", 1)
    return Heads(count, int(shared), size, value_dim)


def scale_of(attention: Any) -> float:
    """Factor of a layer's scores."""
    for name in ("scaling", "inv_norm_factor"):
        if hasattr(attention, name):
            return float(getattr(attention, name))
    # GPT-Neo's have none
    return 1.0 / float(getattr(attention, "scale_attn", 1.0))


def query_scales(config: Any, positions: int) -> Tensor | None:
    """Factors float32 ``[positions]`` by which some layers multiply queries, None where none does.

    Args:
        config: Config of a text model. Llama 4 knows its own three numbers (arXiv 2501.19399), Ministral 3 two of its
            rotary tables; to transformers the former's first position is 1.
        positions: How many.
    """
    at = torch.arange(positions, dtype=torch.float32)
    if getattr(config, "attn_temperature_tuning", False):
        return torch.log1p(torch.floor((at + 1.0) / config.floor_scale)) * config.attn_scale + 1.0
    rotary = getattr(config, "rope_parameters", None) or {}
    beta = rotary.get("llama_4_scaling_beta") if config.model_type == "ministral3" else None
    if beta is None:
        return None
    return 1 + beta * torch.log(1 + torch.floor(at / rotary["original_max_position_embeddings"]))


def sharpens(config: Any, attention: Any) -> bool:
    """Whether a layer multiplies its queries by :func:`query_scales`."""
    return config.model_type == "ministral3" or not getattr(attention, "use_rope", True)


def _heads(attention: Any, config: Any, members: Sequence[str]) -> dict[str, Any]:
    """Queries, keys and values from one linear or three; where each head's or group's are side by side, copies."""
    names = ("query", "key", "value")
    sizes = heads_of(attention, config)
    if hasattr(attention, "query_key_value"):
        both: Any = attention.query_key_value
        rows = torch.arange(both.out_features).view(sizes.shared, -1, sizes.key_dim)
        sides = (rows[:, :-2], rows[:, -2], rows[:, -1])
        return {name: linear_matrix(both, members, side.flatten()) for name, side in zip(names, sides)}
    if not hasattr(attention, "qkv_proj"):
        linears = {name: getattr(attention, f"{name[0]}_proj") for name in names}
        found: dict[str, Any] = {
            name: None if linear is None else linear_matrix(linear, members) for name, linear in linears.items()
        }
        if getattr(attention, "v_scale", 1.0) != 1.0:
            found["value"] = matrix.times(found["value"], attention.v_scale)
        return found
    counts = (sizes.count, sizes.shared, sizes.shared)
    return dict(zip(names, linear_parts(attention.qkv_proj, [count * sizes.key_dim for count in counts], members)))


def _latent_projections(attention: Any) -> dict[str, Any]:
    low = attention.q_lora_rank is not None
    absorb, expand = keys_and_values(attention)
    return {
        "query": linear_matrix(attention.q_b_proj if low else attention.q_proj),
        "query_down": linear_matrix(attention.q_a_proj) if low else None,
        "query_down_norm": norm_of(attention.q_a_layernorm) if low else None,
        "key": linear_matrix(attention.kv_a_proj_with_mqa),
        "key_norm": norm_of(attention.kv_a_layernorm),
        "value": None,
        "absorb": absorb,
        "expand": expand,
    }
