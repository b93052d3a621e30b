"""Scales of the half-integer grid: ``w ≈ s (q - z)`` with ``z = (2^b - 1)/2``, so 1 bit means ``±s/2``.

At one and two bits the extremes of a group are useless as a range: covering them costs several times the error of
the best scale (1 bit: 0.78 against 0.36 of the variance of Gaussian weights). So scales are searched for, and with
one bit the best one is known: ``s/2`` is the (weighted) mean of ``|w|``.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
# fractions of the full range tried by the search
FRACTIONS = tuple(0.25 + 0.025 * i for i in range(31))


def half_scale(
    values: Tensor, bits: int, search: Literal["minmax", "mse"] = "mse", importance: Tensor | None = None
) -> Tensor:
    """Scale of every group, with values that fp16 can hold.

    Args:
        values: ``[..., g]`` fp32, one group per leading index.
        bits: Code width b.
        search: ``minmax`` covers the extremes; ``mse`` takes the scale with the least (weighted) squared error.
        importance: Non-negative, broadcastable to ``values``.

    Returns:
        ``[...]`` fp32; 1 for a group of zeros, where no scale is better than another.
    """
    levels = 1 << bits
    extreme = values.abs().amax(-1)
    # the outermost codes stand for ±s (2^b - 1)/2, and values up to half a step beyond round to them
    full = extreme * (2.0 / (levels - 1)) if search == "minmax" else extreme * (2.0 / levels)
    if search == "minmax":
        return _stored(full, extreme)
    if bits == 1:
        if importance is None:
            mean = values.abs().mean(-1)
        else:
            weight = importance.expand_as(values)
            mean = (values.abs() * weight).sum(-1) / weight.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return _stored(2.0 * mean, extreme)
    best_scale = _stored(full, extreme)
    best = _error(values, best_scale, levels, importance)
    for fraction in FRACTIONS[:-1]:
        scale = _stored(full * fraction, extreme)
        error = _error(values, scale, levels, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


@cache
def distortion(bits: int, group_size: int) -> float:
    """``φ(b) = E(x - x̂)² / E x²`` of Gaussian weights on this grid with the searched scale.

    Measured on a fixed sample rather than tabled, so that it holds for every group size.
    """
    if bits == 0:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(max(64, (1 << 15) // group_size), group_size, generator=generator)
    scale = half_scale(values, bits)
    error = _error(values, scale, 1 << bits, None).sum()
    return float(error / values.square().sum())


def _stored(scale: Tensor, extreme: Tensor) -> Tensor:
    """Round to fp16 and back; groups of zeros get 1."""
    rounded = scale.clamp(HALF_TINY, HALF_MAX).to(torch.float16).to(torch.float32)
    return torch.where(extreme == 0, torch.ones_like(rounded), rounded)


def _error(values: Tensor, scale: Tensor, levels: int, importance: Tensor | None) -> Tensor:
    """(Weighted) squared rounding error of each group."""
    exact = torch.div(values, scale.unsqueeze(-1)).add_((levels - 1) / 2)
    error = exact.round().clamp_(0.0, float(levels - 1)).sub_(exact).square_()
    if importance is not None:
        error.mul_(importance)
    return error.sum(-1).mul_(scale.square())
