"""Coordinate descent over codes that are already chosen: each in turn moves to the best place given all others.

GPTQ decides every column once and never comes back: an error is passed on to columns that follow, and the last ones
keep what is left. On grids of one or two bits the columns that should make up for it are clipped, and much of it stays.
A sweep goes through the columns again. With the error ``D = W - Q`` of a row and its pull ``P = D H``, the output error
``D H Dᵀ`` is least in coordinate j at ``q_j + P_j / H_jj``; the nearest code to that never makes it larger. QuantEase
(Behdin et al., arXiv 2309.01885) and CDQuant (Nair and Suggala, arXiv 2406.17542) start or end with the same step.

The loop has two forms: PyTorch, which defines it, and the steps inside a group in one Triton kernel, on GPUs.

Legend: E experts, N rows (outputs), K columns (inputs), G groups per row.
"""

from __future__ import annotations

import torch
from llmcompress_kernels import columns as native
from torch import Tensor

from llmcompress.algorithms.grids import nearest
from llmcompress.algorithms.hessian import damped_diagonal
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec


def sweep(
    w: Tensor, hessian: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, damp: float
) -> Tensor:
    """Visit every column once, in the stored order.

    Args:
        w: ``[E, N, K]`` fp32, what the codes should stand for.
        hessian: ``[E, K, K]`` fp32; where it is zero the codes stay.
        codes: ``[E, N, K]`` uint8.
        scale: ``[E, N, G]`` fp16.
        zero: ``[E, N, G]`` uint8, or None on a symmetric grid.
        spec: Bits, group size, symmetry.
        damp: Relative damping of the Hessian; the damped error is what never grows.

    Returns:
        ``[E, N, K]`` uint8.
    """
    columns = w.shape[-1]
    damped = _damped(hessian, damp)
    values = dequantize(codes, scale, zero, spec)
    pull = torch.bmm(damped, (w - values).transpose(1, 2)).contiguous()
    # by columns, as the kernel wants them
    codes, values = codes.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    steps = scale.to(torch.float32).permute(2, 0, 1).contiguous()
    middle = (
        torch.full_like(steps, float(spec.midpoint)) if zero is None else zero.permute(2, 0, 1).float().contiguous()
    )
    size = spec.group(columns)
    fused = native.fuses(w.device.type)
    for start, stop in native.spans(columns, size):
        group = start // size
        grid = (steps[group], middle[group])
        if fused:
            span = (start, stop)
            changes = native.descend_span(pull, damped, *grid, codes, values, span, spec.levels, spec.half)
        else:
            changes = _span(pull, damped, *grid, codes, values, (start, stop), spec)
        if stop < columns:
            pull[:, stop:].baddbmm_(damped[:, stop:, start:stop], changes)
    return codes.transpose(1, 2).contiguous()


def _damped(hessian: Tensor, damp: float) -> Tensor:
    """Damped copies; the identity in the place of zeros, so that their codes are the nearest ones."""
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    damped = hessian.clone()
    damped.diagonal(dim1=-2, dim2=-1).copy_(damped_diagonal(diagonal, damp))
    empty = diagonal.sum(-1) <= 0
    return torch.where(empty[:, None, None], torch.eye(hessian.shape[-1]).to(damped), damped)


def _span(
    pull: Tensor, damped: Tensor, scale: Tensor, zero: Tensor, codes: Tensor, values: Tensor, span: tuple[int, int],
    spec: QuantSpec,
) -> Tensor:  # fmt: skip
    """Columns of one group: the definition of :func:`llmcompress_kernels.columns.descend_span`, arguments as there."""
    start, stop = span
    own, changes = pull[:, start:stop].clone(), torch.empty_like(pull[:, start:stop])
    for column in range(start, stop):
        here = column - start
        goal = values[:, column] + own[:, here] / damped[:, column, column, None]
        found = nearest(goal / scale, zero, spec.half).clamp_(0.0, float(spec.levels - 1))
        codes[:, column] = found.to(torch.uint8)
        value = (found - zero) * scale
        # what the error loses; the pull on the columns that follow changes with it
        change = torch.sub(values[:, column], value, out=changes[:, here])
        values[:, column] = value
        own[:, here + 1 :] += damped[:, column, column + 1 : stop, None] * change[:, None]
    return changes
