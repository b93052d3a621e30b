"""Definition of ``group_gemm``: decode the weight, multiply."""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress_kernels.reference.bitpack import unpack


def decode(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int) -> Tensor:
    """Decode packed rows in fp32.

    Args:
        packed: ``[..., N, words(K, bits)]`` int32.
        scale: ``[..., N, G]`` fp16.
        zero: ``[..., N, words(G, bits)]`` int32, or None.
        bits: Code width.
        group_size: Columns per scale.
        columns: K.

    Returns:
        ``[..., N, K]`` fp32.
    """
    groups = scale.shape[-1]
    codes = unpack(packed, bits, columns).to(torch.float32)
    padding = groups * group_size - columns
    if padding > 0:
        codes = torch.nn.functional.pad(codes, (0, padding))
    grouped = codes.unflatten(-1, (groups, group_size))
    if zero is None:
        grouped.sub_(float(1 << (bits - 1)))
    else:
        grouped.sub_(unpack(zero, bits, groups).to(torch.float32).unsqueeze(-1))
    grouped.mul_(scale.to(torch.float32).unsqueeze(-1))
    return grouped.flatten(-2)[..., :columns]


def group_gemm(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """``x Wᵀ``; the weight is decoded in fp32, cast to the type of ``x``, and dropped again.

    Args:
        x: ``[..., K]``.
        packed: See :func:`decode`, as are the next four.
        scale: fp16.
        zero: Packed, or None.
        bits: Code width.
        group_size: Columns per scale.
        in_features: K.

    Returns:
        ``[..., N]``.
    """
    weight = decode(packed, scale, zero, bits, group_size, in_features).to(x.dtype)
    return torch.nn.functional.linear(x, weight)
