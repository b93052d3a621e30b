"""Latent attention (DeepSeek-V2 and V3, GLM-4.7-Flash) in the layout of the native decode step.

A token leaves its latents in the cache, as in transformers, which makes every head's keys and values of all of them
again for every token. The step multiplies a head's query with ``kv_b_proj``'s rows of keys, and its weighted sum of
latents with the rows of values: the same products in another order (section 2.1.2 of arXiv 2405.04434).
"""

from __future__ import annotations

from typing import Any

import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import matrix
from llmcompress_kernels.reference.group_gemm import LANES
from torch import Tensor, nn

from llmcompress.inference.coverage import HALVES_APART
from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.tree_linear import TreeLinear
from llmcompress.quant.codecs import codec


def is_latent(attention: Any) -> bool:
    """Whether an attention module keeps latents."""
    return hasattr(attention, "kv_b_proj")


def decline_latent(name: str, module: nn.Module) -> str | None:
    """Why the step cannot stand for a projection of latent attention, as what follows its name; None if it can.

    Args:
        name: Name of any module.
        module: The module.
    """
    if not name.endswith("kv_b_proj"):
        return None
    if isinstance(module, TreeLinear):
        return " is a TreeLinear, which latent attention does not read"
    if getattr(module, "int8_activations", False):
        return " rounds its inputs, which are no inputs where queries meet latents"
    return None


def latents_of(config: Any, attention: Any) -> native.Latents:
    """What heads make their keys and values of.

    Args:
        config: Config of the model.
        attention: The module of any layer.
    """
    return native.Latents(
        size=attention.kv_lora_rank,
        width=attention.kv_lora_rank + attention.qk_rope_head_dim,
        epsilon=attention.kv_a_layernorm.variance_epsilon,
        # transformers' DeepSeek-V2 knows no other order
        neighbours=bool(getattr(config, "rope_interleave", config.model_type not in HALVES_APART)),
    )


def keys_and_values(attention: Any) -> tuple[matrix.Matrix, matrix.Matrix]:
    """Keys ``[heads, D - R, C]`` and values ``[heads, V, C]`` of ``kv_b_proj``.

    Keys are multiplied across their rows, for which packed ones are a dense copy: float32, or bfloat16 of a bfloat16
    model.
    Packed values are shared where heads are whole blocks of rows.

    Args:
        attention: A module that keeps latents.
    """
    module, nope = attention.kv_b_proj, attention.qk_nope_head_dim
    packed = isinstance(module, PackedLinear)
    weight = _values_of(module, attention.kv_a_layernorm.weight.dtype) if packed else module.weight.detach()
    rows = weight.unflatten(0, (-1, nope + attention.v_head_dim))
    absorb = matrix.dense(rows[:, :nope])
    if not packed:
        return absorb, matrix.dense(rows[:, nope:])
    if nope % LANES == 0 and attention.v_head_dim % LANES == 0 and module.prepare():
        return absorb, _packed_values(module, len(rows), nope)
    return absorb, matrix.dense(_values_of(module, torch.float32).view_as(rows)[:, nope:])


def _values_of(module: PackedLinear, dtype: torch.dtype) -> Tensor:
    """What a packed weight stands for, float32 unless the model is bfloat16."""
    found = codec(module.spec.codec).decode(module.packed_weight()).float()
    return found.to(dtype) if dtype == torch.bfloat16 else found


def _packed_values(module: PackedLinear, heads: int, nope: int) -> matrix.Matrix:
    """The rows of values of all heads where they lie."""
    given = (module.weight_packed, module.weight_scale, module.zero)
    words, scale, zero = (
        None if part is None else part.unflatten(0, (heads, -1))[:, nope // LANES :] for part in given
    )
    assert words is not None
    assert scale is not None
    sizes = (module.spec.bits, module.columns_per_group, module.in_features)
    return matrix.packed(words, scale, zero, *sizes, interleaved=True)


def halves(pairs: Tensor) -> Tensor:
    """Turned numbers ``[..., R]`` whose pairs stand side by side, with those half of R apart."""
    return pairs.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


def side_by_side(turned: Tensor) -> Tensor:
    """The way back from :func:`halves`."""
    return turned.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
