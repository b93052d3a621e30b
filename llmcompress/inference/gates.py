"""Gates on attention's results that a linear of their own makes (AFMoE), in the form that the native step reads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import matrix
from torch import Tensor

from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.tree_linear import TreeLinear
from llmcompress.quant.codecs.int_group import PACKED, SCALE, ZERO


def decline_gates(attention: Any) -> str | None:
    """Why queries and their gates, which are two linears (AFMoE), cannot become one matrix; None if they can.

    Args:
        attention: Any module.
    """
    sides = [getattr(attention, name, None) for name in ("q_proj", "gate_proj")]
    if None in sides:
        return None
    if any(isinstance(side, TreeLinear) for side in sides):
        return ": queries and gates of residual trees are not put together"
    alike = {type(side) for side in sides}, {getattr(side, "spec", None) for side in sides}
    rounded = {getattr(side, "int8_activations", False) for side in sides}
    return None if all(len(kinds) == 1 for kinds in (*alike, rounded)) else ": queries and gates are packed differently"


def with_gates(query: Any, gate: Any, heads: int) -> matrix.Matrix:
    """Rows of each head's queries and of its gates in turn, as Qwen3-Next stores them: a copy.

    Args:
        query: The linear that makes the queries, dense or packed.
        gate: The one that makes the gates, without a bias, alike (:func:`decline_gates`).
        heads: Query heads.
    """

    def in_turn(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if one is None or other is None:
            return None
        both = torch.cat([part.unflatten(0, (heads, -1)) for part in (one, other)], dim=1)
        return both.flatten(0, 1).contiguous()

    bias = None
    if query.bias is not None:
        bias = in_turn(query.bias.detach(), torch.zeros_like(query.bias))
    if not isinstance(query, PackedLinear):
        weight = in_turn(query.weight.detach(), gate.weight.detach())
        assert weight is not None
        return matrix.dense(weight, bias)
    stored = [side.packed_weight().tensors for side in (query, gate)]
    words, scale, zero = (in_turn(*(tensors.get(key) for tensors in stored)) for key in (PACKED, SCALE, ZERO))
    assert words is not None
    assert scale is not None
    found = matrix.packed(words, scale, zero, query.spec.bits, query.columns_per_group, query.shape[-1], bias)
    return replace(found, input_bytes=native.INT8_PLANES) if query.int8_activations else found
