"""Scale and zero point of a group: from its extremes, or by searching for the least error.

Legend: N rows, K columns, G groups per row, g columns per group. Leading dimensions are free.

Scales are rounded to fp16 here, before any code is chosen, so that later steps see exactly what
is stored. An all-zero group gets scale 1 and codes that decode to exactly zero.

On the half-integer grid ``w ≈ s (q - z)`` with ``z = (2^b - 1)/2``, 1 bit means ``±s/2``. At one and two bits the
extremes of a group are useless as a range: covering them costs several times the error of the best scale (1 bit: 0.78
against 0.36 of the variance of Gaussian weights). So scales are searched for (:func:`half_scale`), and with one bit the
best one is known: ``s/2`` is the (weighted) mean of ``|w|``.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import torch
from torch import Tensor

from llmcompress.quant.spec import QuantSpec

Search = Literal["minmax", "mse"]

HALF_MAX = 65504.0
HALF_TINY = 2.0**-24
# fractions of the min-max range tried by the search, coarse first, then refined around the best
COARSE = tuple(1.0 - 0.05 * i for i in range(14))
FINE = (-0.025, -0.0125, 0.0125, 0.025)
# the wider the code, the less clipping pays; how much of COARSE is worth trying
TRIED = {2: 14, 3: 11, 4: 8, 8: 3}
# fractions of the full range tried on the half-integer grid
FRACTIONS = tuple(0.25 + 0.025 * i for i in range(30))


def tried_fractions(bits: int, search: Search) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Fractions of the min-max range that a search tries beside the whole, and offsets from the best tried then."""
    return ((), ()) if search == "minmax" else (COARSE[1 : TRIED[bits]], FINE)


def group_view(w: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Split ``[..., K]`` into ``[..., G, g]``; a short last group is filled by repeating its last column.

    Returns:
        The view (or padded copy) and, when padded, a mask ``[G, g]`` that is 0 on the filling.
    """
    columns = w.shape[-1]
    size, groups = spec.group(columns), spec.groups(columns)
    missing = size * groups - columns
    if not missing:
        return w.unflatten(-1, (groups, size)), None
    filled = torch.cat([w, w[..., -1:].expand(*w.shape[:-1], missing)], -1)
    mask = torch.ones(groups, size, dtype=torch.float32, device=w.device)
    mask[-1, size - missing :] = 0
    return filled.unflatten(-1, (groups, size)), mask


def find_grid(
    w: Tensor, spec: QuantSpec, search: Search = "mse", weights: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Choose scale and zero point of every group.

    Args:
        w: ``[..., N, K]`` fp32 weights.
        spec: Bits, group size, symmetry.
        search: ``minmax`` covers the extremes; ``mse`` tries narrower ranges and keeps the one with the
            smallest (weighted) squared rounding error.
        weights: ``[..., K]`` non-negative importance of columns, broadcast over rows, used by ``mse``.

    Returns:
        ``scale [..., N, G]`` fp16 and ``zero [..., N, G]`` uint8, None on a symmetric grid.
    """
    values, mask = group_view(w, spec)
    importance = None if weights is None else group_view(weights.unsqueeze(-2), spec)[0]
    if mask is not None:
        importance = mask if importance is None else importance * mask
    return grid_of_groups(values, spec, search, importance)


def grid_of_groups(
    values: Tensor, spec: QuantSpec, search: Search, importance: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """:func:`find_grid` on weights already split into groups.

    Args:
        values: ``[..., g]`` fp32, one group per leading index.
        spec: Bits and symmetry (the group size is that of ``values``).
        search: As in :func:`find_grid`.
        importance: Broadcastable to ``values``.

    Returns:
        ``scale [...]`` fp16 and ``zero [...]`` uint8 or None.
    """
    if spec.half:
        return half_scale(values, spec.bits, search, importance).to(torch.float16), None
    low = values.amin(-1).clamp(max=0)
    high = values.amax(-1).clamp(min=0)
    scale, zero = _grid_from_range(low, high, spec)
    if search == "minmax":
        return scale.to(torch.float16), None if zero is None else zero.to(torch.uint8)
    best = _error(values, scale, _offset(zero, spec), spec.levels, importance)
    fraction = torch.ones_like(scale)
    coarse, fine = tried_fractions(spec.bits, search)
    for shrink in coarse:
        scale, zero, best, fraction = _try(values, low, high, fraction.new_full((), shrink), spec, importance,
                                           (scale, zero, best, fraction))  # fmt: skip
    centre = fraction.clone()
    for offset in fine:
        scale, zero, best, fraction = _try(values, low, high, centre + offset, spec, importance,
                                           (scale, zero, best, fraction))  # fmt: skip
    return scale.to(torch.float16), None if zero is None else zero.to(torch.uint8)


def half_scale(values: Tensor, bits: int, search: Search = "mse", importance: Tensor | None = None) -> Tensor:
    """Scale of every group on the half-integer grid, with values that fp16 can hold.

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
    empty = extreme == 0
    # the outermost codes stand for ±s (2^b - 1)/2, and values up to half a step beyond round to them
    full = extreme * (2.0 / (levels - 1)) if search == "minmax" else extreme * (2.0 / levels)
    if search == "minmax":
        return _stored(full, empty)
    if bits == 1:
        if importance is None:
            mean = values.abs().mean(-1)
        else:
            weight = importance.expand_as(values)
            mean = (values.abs() * weight).sum(-1) / weight.sum(-1).clamp(min=torch.finfo(torch.float32).tiny)
        return _stored(2.0 * mean, empty)
    middle = (levels - 1) / 2
    best_scale = _stored(full, empty)
    best = _error(values, best_scale, middle, levels, importance)
    for fraction in FRACTIONS:
        scale = _stored(full * fraction, empty)
        error = _error(values, scale, middle, levels, importance)
        better = error < best
        best = torch.where(better, error, best)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale


@cache
def distortion(bits: int, group_size: int) -> float:
    """``φ(b) = E(x - x̂)² / E x²`` of Gaussian weights on the half-integer grid with the searched scale.

    Measured on a fixed sample rather than tabled, so that it holds for every group size.
    """
    if bits == 0:
        return 1.0
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(max(64, (1 << 15) // group_size), group_size, generator=generator)
    scale = half_scale(values, bits)
    error = _error(values, scale, ((1 << bits) - 1) / 2, 1 << bits, None).sum()
    return float(error / values.square().sum())


def round_codes(w: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec) -> Tensor:
    """Nearest code of every weight.

    Args:
        w: ``[..., N, K]`` fp32.
        scale: ``[..., N, G]`` fp16.
        zero: ``[..., N, G]`` uint8, or None on a symmetric grid.
        spec: Bits and group size.

    Returns:
        ``[..., N, K]`` uint8.
    """
    columns = w.shape[-1]
    values, _ = group_view(w, spec)
    codes = nearest(values / scale.to(torch.float32).unsqueeze(-1), _offset(zero, spec), spec.half)
    codes.clamp_(0, spec.levels - 1)
    return codes.to(torch.uint8).flatten(-2)[..., :columns].contiguous()


def round_to_nearest(w: Tensor, spec: QuantSpec, grid: Search) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes, scale and zero point without any second-order information.

    Args:
        w: ``[..., N, K]`` fp32.
        spec: Bits, group size, symmetry.
        grid: How grids are chosen.

    Returns:
        ``codes [..., N, K]`` uint8, ``scale [..., N, G]`` fp16, ``zero [..., N, G]`` uint8 or None.
    """
    scale, zero = find_grid(w, spec, grid)
    return round_codes(w, scale, zero, spec), scale, zero


def nearest(steps: Tensor, offset: Tensor | float, half: bool) -> Tensor:
    """Round weights in units of their scale to codes, in place; a half-integer offset is added before rounding.

    Args:
        steps: Weights divided by their scale.
        offset: The code of zero, broadcastable to ``steps``.
        half: Whether it is a half-integer.
    """
    return steps.add_(offset).round_() if half else steps.round_().add_(offset)


def _offset(zero: Tensor | None, spec: QuantSpec) -> Tensor | float:
    """The code of zero, broadcastable to the weights of each group."""
    return float(spec.midpoint) if zero is None else zero.to(torch.float32).unsqueeze(-1)


def _grid_from_range(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale (fp32 with fp16 values) and zero (fp32 integers) that cover ``[low, high]``."""
    if spec.symmetric:
        scale = torch.maximum(-low, high) * (2.0 / (spec.levels - 1))
    else:
        scale = (high - low) / (spec.levels - 1)
    scale = _stored(scale, (low == 0) & (high == 0))
    if spec.symmetric:
        return scale, None
    return scale, (-low / scale).round_().clamp_(0, spec.levels - 1)


def _stored(scale: Tensor, empty: Tensor) -> Tensor:
    """Scales rounded to fp16 and back; 1 for groups of zeros."""
    rounded = scale.clamp(HALF_TINY, HALF_MAX).to(torch.float16).to(torch.float32)
    return torch.where(empty, torch.ones_like(rounded), rounded)


def _error(values: Tensor, scale: Tensor, offset: Tensor | float, levels: int, importance: Tensor | None) -> Tensor:
    """(Weighted) squared rounding error of each group; ``offset`` is the code of zero."""
    # in units of codes, so that few passes over the weights are needed
    exact = torch.div(values, scale.unsqueeze(-1)).add_(offset)
    error = exact.round().clamp_(0.0, float(levels - 1)).sub_(exact).square_()
    if importance is not None:
        error.mul_(importance)
    return error.sum(-1).mul_(scale.square())


def _try(
    values: Tensor, low: Tensor, high: Tensor, fraction: Tensor, spec: QuantSpec, importance: Tensor | None,
    best: tuple[Tensor, Tensor | None, Tensor, Tensor],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """Keep, per group, the better of ``best`` and the range shrunk to ``fraction``."""
    scale, zero = _grid_from_range(low * fraction, high * fraction, spec)
    error = _error(values, scale, _offset(zero, spec), spec.levels, importance)
    old_scale, old_zero, old_error, old_fraction = best
    better = error < old_error
    new_zero = None if zero is None or old_zero is None else torch.where(better, zero, old_zero)
    return (
        torch.where(better, scale, old_scale), new_zero, torch.where(better, error, old_error),
        torch.where(better, fraction, old_fraction),
    )  # fmt: skip
