"""Scales fitted again once all codes are chosen. Ours; GPTQ keeps those it chose on reaching a group.

With the codes of a row fixed, its error in the layer's output is a quadratic form of its scales ``s``, one for each
group. Let ``d_g [K]`` be the row's centred codes (code minus zero point) in group g and zero elsewhere, ``w`` the row,
``δ = w − Σ_g s_g d_g`` its error and ``λ = damp · mean(diag H)``. The best change ``Δ`` of the scales solves::

    Σ_h (d_g (H + λ I) d_hᵀ) Δ_h = d_g (H + λ I) δᵀ          for every group g

(to the diagonal of the system's matrix 1e-4 of its mean are added, for its Cholesky factor), and the error ``δ H δᵀ``
becomes ``δ H δᵀ − 2 Σ_g Δ_g d_g H δᵀ + Σ_gh Δ_g Δ_h d_g H d_hᵀ``.

Legend: E experts, N rows (outputs), K columns (inputs), G groups per row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress.algorithms.grids import HALF_MAX
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec


def refit_scales(
    w: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, hessian: Tensor, spec: QuantSpec, damp: float
) -> Tensor:
    """Best scales for codes that are already chosen: least squares in the layer's output, row by row.

    With ``d_g`` the centred codes of group g, minimise ``(w - Σ s_g d_g) H (w - Σ s_g d_g)ᵀ`` over ``s``, a
    system of G equations per row. Rows where rounding the result to fp16 does not pay keep their scales.

    Args:
        w: ``[E, N, K]`` fp32.
        codes: ``[E, N, K]`` uint8.
        scale: ``[E, N, G]`` fp16.
        zero: ``[E, N, G]`` uint8, or None on a symmetric grid.
        hessian: ``[E, K, K]`` fp32.
        spec: Bits, group size, symmetry.
        damp: Relative damping.

    Returns:
        ``[E, N, G]`` fp16.
    """
    return refit(w - dequantize(codes, scale, zero, spec), codes, scale, zero, hessian, spec, damp)[0]


def refit(
    delta: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, hessian: Tensor, spec: QuantSpec, damp: float
) -> tuple[Tensor, Tensor]:
    """:func:`refit_scales` from the error ``delta = w - q`` ``[E, N, K]``, which is overwritten.

    The system is solved for the change of the scales: its right side is then made of errors, which are small, and
    the error that is left follows from it without another product with H.

    Returns:
        New scales and the diagonal of ``(W-Q) H (W-Q)ᵀ`` ``[E, N]`` that they leave.
    """
    size, groups = spec.group(delta.shape[-1]), spec.groups(delta.shape[-1])
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    pull = torch.bmm(delta, hessian)
    error = torch.mul(pull, delta).sum(-1)
    centred = dequantize(codes, torch.ones_like(scale), zero, spec)
    right = _by_group(pull.mul_(centred), size, groups)
    del pull
    ridge = (damp * mean)[:, None, None]
    residual = right + ridge * _by_group(delta.mul_(centred), size, groups)
    exact = _scale_products(centred, hessian, size, groups)
    left = exact.clone()
    diagonal = left.diagonal(dim1=-2, dim2=-1)
    diagonal += ridge * _by_group(centred.square_(), size, groups)
    diagonal += diagonal.mean(-1, keepdim=True) * 1e-4 + torch.finfo(torch.float32).tiny
    lower, info = torch.linalg.cholesky_ex(left)
    change = torch.cholesky_solve(residual.unsqueeze(-1), lower).squeeze(-1)
    old = scale.to(torch.float32)
    new = (old + change).clamp(max=HALF_MAX).to(torch.float16)
    step = new.to(torch.float32) - old
    gain = (step * residual).sum(-1) - 0.5 * _form(step, left)
    better = (info == 0) & (gain > 0) & (new > 0).all(-1) & torch.isfinite(new).all(-1)
    left_over = (error - 2 * (step * right).sum(-1) + _form(step, exact)).clamp_(min=0)
    return torch.where(better.unsqueeze(-1), new, scale), torch.where(better, left_over, error)


def _scale_products(centred: Tensor, hessian: Tensor, size: int, groups: int) -> Tensor:
    """``d_g H d_hᵀ`` of every row, ``[E, N, G, G]``, from its upper triangle."""
    products = centred.new_empty(*centred.shape[:2], groups, groups)
    for group in range(groups):
        start = group * size
        span = slice(start, min(start + size, centred.shape[-1]))
        part = torch.bmm(centred[:, :, span], hessian[:, span, start:]).mul_(centred[:, :, start:])
        sums = _by_group(part, size, groups - group)
        products[:, :, group, group:] = sums
        products[:, :, group:, group] = sums
    return products


def _form(step: Tensor, matrix: Tensor) -> Tensor:
    """``s M sᵀ`` of every row, ``[E, N]``."""
    return torch.einsum("eng,engh,enh->en", step, matrix, step)


def _by_group(values: Tensor, size: int, groups: int) -> Tensor:
    """Sums over groups of columns, ``[..., K]`` to ``[..., G]``."""
    missing = size * groups - values.shape[-1]
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return values.unflatten(-1, (groups, size)).sum(-1)
