"""Rounding to the nearest point of the grid, without data, a cache's worth of weights at a time.

Legend: N rows, K columns, G groups per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress.algorithms.grids import Search, round_to_nearest
from llmcompress.quant.codecs import int_group
from llmcompress.quant.spec import QuantSpec

# values of a piece, per thread: every fp32 intermediate of it takes 512 KiB, which a second-level cache holds a few of,
# and which the heap hands out again without asking the kernel for pages
PIECE = 1 << 17


@dataclass(frozen=True, slots=True)
class Rounded:
    """Weights that have got their codes, to nearest or otherwise, and what that costs.

    Attributes:
        codes: ``[..., N, K]`` uint8.
        scale: ``[..., N, G]`` fp16.
        zero: ``[..., N, G]`` uint8, None on a symmetric grid.
        quantized: ``[..., N, K]`` what the codes stand for, None where it was not asked for.
        error: ``[..., N]`` fp32, sum of squared errors of each row; by GPTQ that in the layer's output.
        energy: ``[..., N]`` fp32, sum of squared weights, not finite where a weight is not; by GPTQ that of outputs.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    quantized: Tensor | None
    error: Tensor
    energy: Tensor


def round_weights(w: Tensor, spec: QuantSpec, grid: Search, dtype: torch.dtype | None = None) -> Rounded:
    """Round every weight, and sum up what that costs.

    Rows do not depend on each other, so what comes out is what :func:`~llmcompress.algorithms.grids.round_to_nearest`
    makes of all of them at once. At once, a CPU passes over memory more than fifteen times; in pieces it does once.

    Args:
        w: ``[..., N, K]``, any floating type; rounded as fp32.
        spec: Bits, group size, symmetry.
        grid: How grids are chosen.
        dtype: Type of the quantized values; None leaves them out.
    """
    *leading, columns = w.shape
    rows = w.reshape(-1, columns)
    count, groups = len(rows), spec.groups(columns)
    codes = rows.new_empty((count, columns), dtype=torch.uint8)
    scale = rows.new_empty((count, groups), dtype=torch.float16)
    zero = None if spec.symmetric else rows.new_empty((count, groups), dtype=torch.uint8)
    quantized = None if dtype is None else rows.new_empty((count, columns), dtype=dtype)
    error, energy = (rows.new_empty(count, dtype=torch.float32) for _ in range(2))
    size = PIECE * torch.get_num_threads() if w.device.type == "cpu" else rows.numel()
    step = max(1, size // max(columns, 1))
    for start in range(0, count, step):
        at = slice(start, start + step)
        piece = rows[at].to(torch.float32)
        codes[at], scale[at], offset = round_to_nearest(piece, spec, grid)
        if zero is not None and offset is not None:
            zero[at] = offset
        values = int_group.dequantize(codes[at], scale[at], offset, spec)
        if quantized is not None:
            quantized[at] = values
        error[at] = values.sub_(piece).square_().sum(-1)
        energy[at] = piece.square().sum(-1)

    def whole(tensor: Tensor) -> Tensor:
        return tensor.view(*leading, *tensor.shape[1:])

    return Rounded(
        whole(codes), whole(scale), None if zero is None else whole(zero),
        None if quantized is None else whole(quantized), whole(error), whole(energy),
    )  # fmt: skip
