"""Definition of ``delta_decode``: several models of one residual tree in one product, each shared node used once.

Rows of ``x`` belong to models and are sorted depth first in the tree, so that the rows of the models below a node are
one contiguous range. A node adds ``x[lo:hi] Wᵥᵀ`` to these rows; a row's result is the sum over the nodes on its
model's path. A node whose rows are not neighbours (another tree in another layer) is passed once per range.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress_kernels.reference.bitpack import unpack


def decode_node(packed: Tensor, scale: Tensor, bits: int, multiplier: float, group_size: int, columns: int) -> Tensor:
    """One node's residual in fp32: ``multiplier · (scale · (q - (2^b - 1)/2))``.

    Args:
        packed: ``[N, words(K, bits)]`` int32, LSB-first.
        scale: ``[N, G]`` fp16.
        bits: 1 to 6.
        multiplier: A power of two, so that it costs no rounding.
        group_size: Columns per scale.
        columns: K.

    Returns:
        ``[N, K]`` fp32.
    """
    groups = scale.shape[-1]
    codes = unpack(packed, bits, columns).to(torch.float32)
    padding = groups * group_size - columns
    if padding > 0:
        codes = torch.nn.functional.pad(codes, (0, padding))
    grouped = codes.unflatten(-1, (groups, group_size)).sub_(((1 << bits) - 1) / 2)
    grouped.mul_(scale.to(torch.float32).unsqueeze(-1)).mul_(multiplier)
    return grouped.flatten(-2)[..., :columns]


def delta_decode(
    x: Tensor,
    packed: list[Tensor],
    scale: list[Tensor],
    spans: Tensor,
    bits: list[int],
    multiplier: list[float],
    group_size: int,
) -> Tensor:
    """``y[t] = Σ_{v: lo_v ≤ t < hi_v} x[t] Wᵥᵀ``, summed in fp32 in the order of the nodes, then cast.

    Args:
        x: ``[T, K]``, any floating type.
        packed: Per node ``[N, words(K, b_v)]`` int32.
        scale: Per node ``[N, G]`` fp16.
        spans: ``[V, 2]`` int64 on the CPU: rows ``lo ≤ t < hi`` of each node; an empty range is skipped.
        bits: Per node, 1 to 6.
        multiplier: Per node, a power of two.
        group_size: Columns per scale.

    Returns:
        ``[T, N]`` in the type of ``x``; rows below no node are zero.
    """
    rows = packed[0].shape[0]
    out = x.new_zeros((x.shape[0], rows), dtype=torch.float32)
    wide = x.to(torch.float32)
    for node, (low, high) in enumerate(spans.tolist()):
        if high > low:
            weight = decode_node(packed[node], scale[node], bits[node], multiplier[node], group_size, x.shape[1])
            out[low:high] += torch.nn.functional.linear(wide[low:high], weight)
    return out.to(x.dtype)
