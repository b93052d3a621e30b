"""Definition of ``group_gemm``: decode the weight, multiply.

A packed tensor, scales and packed zero points may come *interleaved* (:func:`interleave`): the
words of 16 consecutive rows side by side, the same bytes in an order that vector units like. The number
of dimensions tells the two apart.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress_kernels import pages
from llmcompress_kernels.reference.bitpack import unpack

# rows whose words lie side by side in the interleaved form
LANES = 16
# columns of an activation that share a scale when activations are quantized, at most
INT8_CHUNK = 64


def interleave(tensor: Tensor) -> Tensor:
    """``[..., N, W]`` → ``[..., N/16, W, 16]``, contiguous, in huge pages if large; N must be a multiple of 16."""
    turned = tensor.unflatten(-2, (-1, LANES)).transpose(-1, -2)
    if turned.is_contiguous():  # one word to a row
        return turned
    return pages.empty(turned.shape, turned.dtype, turned.device).copy_(turned)


def deinterleave(tensor: Tensor) -> Tensor:
    """Inverse of :func:`interleave`: ``[..., B, W, 16]`` → ``[..., 16 B, W]``, contiguous."""
    return tensor.transpose(-1, -2).flatten(-3, -2).contiguous()


def chunks(group_size: int, columns: int) -> list[tuple[int, int]]:
    """Column ranges ``(first, end)`` that share one activation scale: pieces of groups."""
    limit = INT8_CHUNK
    found = []
    for begin in range(0, columns, group_size):
        end = min(begin + group_size, columns)
        found += [(at, min(at + limit, end)) for at in range(begin, end, limit)]
    return found


def quantize_activations(x: Tensor, group_size: int) -> Tensor:
    """What remains of ``[..., K]`` after rounding to int8 with one scale per chunk, in the same type.

    The scale is the largest absolute value of the chunk divided by 127; products with codes are
    then sums of integers, and only the scales are applied in floating point.
    """
    out = torch.empty_like(x, dtype=torch.float32)
    for first, end in chunks(group_size, x.shape[-1]):
        part = x[..., first:end].to(torch.float32)
        scale = part.abs().amax(-1, keepdim=True) / 127
        out[..., first:end] = torch.where(scale > 0, (part / scale).round(), 0) * scale
    return out.to(x.dtype) if x.dtype == torch.float64 else out


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


def canonical(
    packed: Tensor, scale: Tensor, zero: Tensor | None, stack: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The tensors of a weight with ``stack`` leading dimensions in canonical order, whichever order they come in."""
    if packed.dim() == stack + 2:
        return packed, scale, zero
    return deinterleave(packed), deinterleave(scale), None if zero is None else deinterleave(zero)


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    int8: bool = False,
) -> Tensor:
    """``x Wᵀ``; the weight is decoded in fp32, cast to the type of ``x``, and dropped again.

    Args:
        x: ``[..., K]``.
        packed: See :func:`decode`, as are the next four; or all three interleaved.
        scale: fp16.
        zero: Packed, or None.
        bits: Code width.
        group_size: Columns per scale.
        in_features: K.
        int8: Round activations to int8 first (:func:`quantize_activations`).

    Returns:
        ``[..., N]``.
    """
    packed, scale, zero = canonical(packed, scale, zero)
    weight = decode(packed, scale, zero, bits, group_size, in_features)
    if int8:
        return torch.nn.functional.linear(quantize_activations(x, group_size), weight).to(x.dtype)
    return torch.nn.functional.linear(x, weight.to(x.dtype))
