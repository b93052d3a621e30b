"""``group_gemm`` in Triton: one kernel from one token (split columns) to prefill (tensor-core tiles).

The weight is the left operand of the dot, ``[rows, columns] x [columns, tokens]``: its 64 or more rows fill the tensor
core's long side even where there are only 16 tokens, and on sm_90 it may stay in registers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.decode import activation_tile, tile_step
from llmcompress_kernels.triton.tuning import Config, interpreted, pick

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
BITS = (2, 3, 4, 8)
# above this many tokens pair order is made once by a copy instead of by every program
REORDERED_ONCE = 32
# results per program where parts are added
ADDED = 1024
# from this many tokens per program on, scaling the weights is cheaper than scaling sums
SCALED_FROM = 64


@triton.jit
def group_gemm_kernel(
    x,
    weight,
    scale,
    zero,
    out,
    tokens,
    rows,
    columns,
    words,
    groups,
    zero_words,
    steps,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    EVEN: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PAIR_TYPE: tl.constexpr,
    REORDER: tl.constexpr,
    SCALED: tl.constexpr,
):
    """Program (tile of rows, tile of tokens, split) writes ``out[split, tokens, rows]``.

    ``steps`` is the number of column tiles per split; ``out`` is fp32 when there are several splits.
    """
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(2).to(tl.int64)
    acc = tl.zeros((BN, BM), tl.float32)
    first = split.to(tl.int32) * steps * BK
    for at in range(first, tl.minimum(first + steps * BK, columns), BK):
        a, added = activation_tile(
            x + m * columns, m < tokens, at, columns,
            BITS, EVEN, ONE_GROUP, BM, BK, COMPUTE, REORDER, SCALED,
        )  # fmt: skip
        acc = tile_step(
            acc, a, added, weight, scale, zero, n, n < rows, at, columns, words, groups, zero_words, GROUP,
            BITS, HAS_ZERO, EVEN, ONE_GROUP, BN, BK, COMPUTE, PAIR_TYPE, SCALED,
        )  # fmt: skip
    target = out + (split * tokens + m)[None, :] * rows + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=(m < tokens)[None, :] & (n < rows)[:, None])


@triton.jit
def add_parts_kernel(parts, out, count, size, BLOCK: tl.constexpr):
    """Program (tile of results): sum of ``count`` parts of ``size`` fp32 numbers each, the first one first."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(parts + at, mask=inside, other=0.0).to(tl.float32)
    for part in range(1, count):
        total += tl.load(parts + part * size.to(tl.int64) + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


def verify(x: Tensor, bits: int) -> str | None:
    """Why the kernel declines, or None."""
    if bits not in BITS:
        return f"{bits} bits"
    return None if x.dtype in TYPES else f"activations of {x.dtype}"


def store_type(dtype: torch.dtype) -> torch.dtype:
    """Type a kernel computes and stores in: that of the activation, except bfloat16 under the interpreter.

    There dots on bfloat16 are wrong and the conversion to it truncates, so kernels work in fp32 and torch rounds.
    """
    return torch.float32 if interpreted() and dtype == torch.bfloat16 else dtype


@dataclass(frozen=True, slots=True)
class ColumnPlan:
    """How a kernel walks the columns.

    Attributes:
        columns: Columns per step.
        one_group: A step lies in one group, so scale and zero point act on sums.
        pair_type: See :func:`llmcompress_kernels.triton.decode.tile_step`.
        reorder: The kernel brings activations into pair order; False if they are, or need not be.
        scaled: The weights are scaled, not the sums.
    """

    columns: int
    one_group: bool
    pair_type: tl.dtype | None
    reorder: bool
    scaled: bool


def plan_columns(bits: int, dtype: torch.dtype, group_size: int, in_features: int, config: Config) -> ColumnPlan:
    """Decide how to walk the columns of a weight.

    A group that is no multiple of 32 takes the general way: scales per column, weights rounded to the compute type.

    Args:
        bits: Code width, or 16 for a dense weight.
        dtype: Type of the activation.
        group_size: Columns per scale.
        in_features: K.
        config: Launch configuration; the group may force fewer columns per step.
    """
    # a row of one group may be of any length: what lies beyond it multiplies zeros
    single = group_size >= in_features
    if bits == 16 or (group_size % 32 != 0 and not single):
        return ColumnPlan(config.columns, False, None, False, True)
    columns = config.columns
    while not single and group_size % columns != 0:
        columns //= 2
    # bfloat16 has no room for 8 bits under a leading one; its integers up to 256 are exact all the same
    pairs = dtype == torch.float16 or (dtype == torch.bfloat16 and bits < 8)
    return ColumnPlan(columns, True, TYPES[dtype] if pairs else None, pairs, config.tokens >= SCALED_FROM)


def prepare(x: Tensor, bits: int, plan: ColumnPlan) -> tuple[Tensor, ColumnPlan]:
    """With many tokens, bring ``[T, K]`` into pair order once, not in every program; the plan says what is left."""
    if not plan.reorder or x.shape[0] <= REORDERED_ONCE or x.shape[1] % 16 != 0:
        return x, plan
    return in_pair_order(x, bits), replace(plan, reorder=False)


def in_pair_order(x: Tensor, bits: int) -> Tensor:
    """Columns of ``[..., K]``, K a multiple of 16, in the order of ``decode.pair_tile``."""
    distance = {2: 8, 3: 4, 4: 4, 8: 2}[bits]
    return x.unflatten(-1, (-1, 2, distance)).transpose(-1, -2).reshape(x.shape)


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    config: Config | None = None,
) -> Tensor:
    """``x Wᵀ``; arguments as in :func:`llmcompress_kernels.ops.group_gemm`.

    Sums in fp32. With several splits the partial sums are added in a fixed order, so results are reproducible.

    Args:
        x: ``[..., K]`` fp16, bf16 or fp32.
        packed: ``[N, words(K, bits)]`` int32.
        scale: ``[N, G]`` fp16.
        zero: ``[N, words(G, bits)]`` int32, or None.
        bits: 2, 3, 4 or 8.
        group_size: Columns per scale.
        in_features: K.
        config: Launch configuration; None looks it up.

    Returns:
        ``[..., N]``.
    """
    rows = packed.shape[0]
    flat = x.reshape(-1, in_features).contiguous()
    tokens = flat.shape[0]
    if tokens == 0 or rows == 0:
        return x.new_zeros((*x.shape[:-1], rows))
    chosen = config or pick("group_gemm", bits, x.dtype, tokens, rows, in_features, x.device)
    plan = plan_columns(bits, x.dtype, group_size, in_features, chosen)
    flat, plan = prepare(flat, bits, plan)
    tiles = -(-in_features // plan.columns)
    steps = -(-tiles // min(chosen.splits, tiles))
    splits = -(-tiles // steps)
    dtype = store_type(x.dtype) if splits == 1 else torch.float32
    out = torch.empty((splits, tokens, rows), dtype=dtype, device=x.device)
    grid = (-(-rows // chosen.rows), -(-tokens // chosen.tokens), splits)
    even = rows % chosen.rows == 0 and in_features % plan.columns == 0
    packed, scale = packed.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    group_gemm_kernel[grid](
        flat, packed, scale, packed if zero is None else zero, out,
        tokens, rows, in_features, packed.shape[1], scale.shape[1], 0 if zero is None else zero.shape[1],
        steps, group_size, bits, zero is not None, even, plan.one_group, chosen.tokens, chosen.rows, plan.columns,
        TYPES[store_type(x.dtype)], plan.pair_type, plan.reorder, plan.scaled,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    if splits > 1 and chosen.joined:
        summed = out.new_empty((tokens, rows), dtype=store_type(x.dtype))
        add_parts_kernel[(-(-summed.numel() // ADDED),)](out, summed, splits, summed.numel(), ADDED)
    else:
        summed = out[0] if splits == 1 else out.sum(0)
    return summed.to(x.dtype).view(*x.shape[:-1], rows)
