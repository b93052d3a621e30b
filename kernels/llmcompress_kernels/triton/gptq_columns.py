"""GPTQ's steps through some columns of one group, in one launch: quantize a column, pass its error on to the next.

The definition is the column loop of ``llmcompress/algorithms/gptq.py``, which takes about eleven launches a column,
each a few microseconds whatever its size. Here one warp holds a tile of ``[COLUMNS, ROWS]`` in registers for all steps;
rows do not depend on each other, so nothing has to wait. What lies behind these columns is updated by a matrix product
afterwards, as between the blocks of the definition. Sums are fused with products: a weight near a rounding boundary may
get another code than the definition's. The steps of ``llmcompress/algorithms/coordinate_descent.py`` go the same way.

Legend: E experts, N rows (outputs), K columns (inputs); tensors are ``[E, K, N]``, so that a column is contiguous.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.columns import FUSED_COLUMNS

# columns of one launch, and rows of one program: 32 values a lane leave room for what a step needs beside them
COLUMNS, ROWS = FUSED_COLUMNS, 16
# adding and taking off 1.5 · 2^23 rounds to nearest even, as torch does
ROUNDER = 12582912.0


@triton.jit
def nearest_code(exact, middle, top, HALF: tl.constexpr, ROUNDER: tl.constexpr):
    """Code nearest to ``exact`` steps from ``middle``, the code of zero, which is a half-integer with ``HALF``."""
    exact = tl.minimum(tl.maximum(exact, -4096.0), 4096.0)
    if HALF:
        code = (exact + middle + ROUNDER) - ROUNDER
    else:
        code = ((exact + ROUNDER) - ROUNDER) + middle
    return tl.minimum(tl.maximum(code, 0.0), top)


@triton.jit
def gptq_columns_kernel(
    weights,
    factor,
    scale,
    zero,
    codes,
    values,
    errors,
    columns,
    rows,
    first,
    count,
    top,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDER: tl.constexpr,
):
    """Columns ``first`` to ``first + count`` of ``ROWS`` rows of one expert."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    column = tl.arange(0, COLUMNS)
    start = expert * columns + first
    place = (start + column)[:, None] * rows + row[None, :]
    inside = (column < count)[:, None] & live[None, :]
    tile = tl.load(weights + place, mask=inside, other=0.0)  # fp32
    step = tl.load(scale + expert * rows + row, mask=live, other=1.0)  # fp32
    middle = tl.load(zero + expert * rows + row, mask=live, other=0.0)  # fp32
    for i in range(count):
        own = tl.sum(tl.where((column == i)[:, None], tile, 0.0), 0)
        code = nearest_code(tl.div_rn(own, step), middle, top, HALF, ROUNDER)
        value = (code - middle) * step
        line = (start + i) * columns + first
        diagonal = tl.load(factor + line + i)  # fp32
        error = (own - value) / diagonal
        later = (column > i) & (column < count)
        ahead = tl.load(factor + line + column, mask=later, other=0.0)  # fp32
        tile -= ahead[:, None] * error[None, :]
        at = (start + i) * rows + row
        tl.store(codes + at, code.to(tl.uint8), mask=live)
        tl.store(values + at, value, mask=live)
        tl.store(errors + (expert * count + i) * rows + row, error, mask=live)


@triton.jit
def descent_columns_kernel(
    pull,
    hessian,
    scale,
    zero,
    codes,
    values,
    changes,
    columns,
    rows,
    first,
    count,
    top,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    ROUNDER: tl.constexpr,
):
    """Columns ``first`` to ``first + count`` of ``ROWS`` rows of one expert move to their best codes, one by one."""
    expert = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < rows
    column = tl.arange(0, COLUMNS)
    start = expert * columns + first
    place = (start + column)[:, None] * rows + row[None, :]
    inside = (column < count)[:, None] & live[None, :]
    tile = tl.load(pull + place, mask=inside, other=0.0)  # fp32
    step = tl.load(scale + expert * rows + row, mask=live, other=1.0)  # fp32
    middle = tl.load(zero + expert * rows + row, mask=live, other=0.0)  # fp32
    for i in range(count):
        own = tl.sum(tl.where((column == i)[:, None], tile, 0.0), 0)
        line = (start + i) * columns + first
        at = (start + i) * rows + row
        old = tl.load(values + at, mask=live, other=0.0)  # fp32
        diagonal = tl.load(hessian + line + i)  # fp32
        code = nearest_code(tl.div_rn(old + tl.div_rn(own, diagonal), step), middle, top, HALF, ROUNDER)
        value = (code - middle) * step
        change = old - value
        later = (column > i) & (column < count)
        ahead = tl.load(hessian + line + column, mask=later, other=0.0)  # fp32
        tile += ahead[:, None] * change[None, :]
        tl.store(codes + at, code.to(tl.uint8), mask=live)
        tl.store(values + at, value, mask=live)
        tl.store(changes + (expert * count + i) * rows + row, change, mask=live)


def descend(
    pull: Tensor,
    hessian: Tensor,
    scale: Tensor,
    zero: Tensor,
    codes: Tensor,
    values: Tensor,
    span: tuple[int, int],
    levels: int,
    half: bool,
) -> Tensor:
    """Move each column of ``span``, which share a grid, to the code with the least error given all other columns.

    Args:
        pull: ``[E, K, N]`` fp32, ``H (W - Q)ᵀ`` as it is when the span is reached; left as it is.
        hessian: ``[E, K, K]`` fp32, symmetric, positive on the diagonal.
        scale: ``[E, N]`` fp32.
        zero: ``[E, N]`` fp32, the code of zero.
        codes: ``[E, K, N]`` uint8, written.
        values: ``[E, K, N]`` fp32, what the codes stand for; read and written.
        span: First column and the one after the last, at most :data:`COLUMNS` of them.
        levels: Number of codes.
        half: Whether ``zero`` is a half-integer.

    Returns:
        ``[E, span, N]`` fp32, old values less new ones, for the update of ``pull`` after the span.
    """
    return _launch(descent_columns_kernel, pull, hessian, scale, zero, codes, values, span, levels, half)


def quantize(
    weights: Tensor,
    factor: Tensor,
    scale: Tensor,
    zero: Tensor,
    codes: Tensor,
    values: Tensor,
    span: tuple[int, int],
    levels: int,
    half: bool,
) -> Tensor:
    """Quantize the columns of ``span``, which share a grid, and make up for each one's error in those after it.

    ``weights`` of the span are used up but not written; what comes after the span is left as it is.

    Args:
        weights: ``[E, K, N]`` fp32.
        factor: ``[E, K, K]`` fp32, upper triangular.
        scale: ``[E, N]`` fp32.
        zero: ``[E, N]`` fp32, the code of zero.
        codes: ``[E, K, N]`` uint8, written.
        values: ``[E, K, N]`` fp32, written.
        span: First column and the one after the last, at most :data:`COLUMNS` of them.
        levels: Number of codes.
        half: Whether ``zero`` is a half-integer.

    Returns:
        ``[E, span, N]`` fp32: errors in units of the factor's diagonal, for the update of the columns after the span.
    """
    return _launch(gptq_columns_kernel, weights, factor, scale, zero, codes, values, span, levels, half)


def _launch(
    kernel: Any,
    tile: Tensor,
    matrix: Tensor,
    scale: Tensor,
    zero: Tensor,
    codes: Tensor,
    values: Tensor,
    span: tuple[int, int],
    levels: int,
    half: bool,
) -> Tensor:
    """Arguments as the callers'; ``tile`` holds the columns, ``matrix`` what a step does to those after it."""
    experts, columns, rows = tile.shape
    first, last = span
    assert 0 < last - first <= COLUMNS
    assert all(t.is_contiguous() for t in (tile, matrix, scale, zero, codes, values))
    steps = torch.empty(experts, last - first, rows, dtype=torch.float32, device=tile.device)
    kernel[(triton.cdiv(rows, ROWS), experts)](
        tile, matrix, scale, zero, codes, values, steps, columns, rows, first, last - first, float(levels - 1),
        HALF=half, COLUMNS=COLUMNS, ROWS=ROWS, ROUNDER=ROUNDER, num_warps=1,
    )  # fmt: skip
    return steps
