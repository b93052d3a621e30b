"""``moe_group_gemm`` in Triton: routed gated experts in four launches, whatever the number of experts.

1. Slots are sorted into blocks of one expert each (:mod:`llmcompress_kernels.triton.routing`).
2. Gate and up projections and the activation: a program owns a block of tokens and a tile of intermediate channels,
   reads the activations once for both projections, and writes ``[places, I]``.
3. Down projection: writes one row per slot, in parts where the columns are split.
4. Weighted sum over a token's slots and the parts, in fp32 and a fixed order.

All experts share a launch; blocks of one expert are neighbours, so its weights are read from memory once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.decode import activation_tile, tile_step
from llmcompress_kernels.triton.group_gemm import BITS, TYPES, plan_columns, prepare, store_type
from llmcompress_kernels.triton.routing import Blocks, route
from llmcompress_kernels.triton.tuning import INTERPRETED, Config, interpreted, pick, power_of_two

DENSE_BITS = 16
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gpt_oss")


@triton.jit
def gated(gate, up, ACTIVATION: tl.constexpr, alpha, limit):
    """Combine gate and up in fp32."""
    if ACTIVATION == "silu":
        return gate * tl.sigmoid(gate) * up
    elif ACTIVATION == "gelu":
        return 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "gelu_pytorch_tanh":
        # tanh(v) = 2 sigmoid(2 v) - 1
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        return gate * tl.sigmoid(2.0 * inner) * up
    else:
        gate = tl.minimum(gate, limit)
        up = tl.minimum(tl.maximum(up, -limit), limit)
        return (up + 1.0) * gate * tl.sigmoid(alpha * gate)


@triton.jit
def gate_up_kernel(
    x,
    slots,
    experts,
    weight,
    scale,
    zero,
    bias,
    out,
    alpha,
    limit,
    count,
    columns,
    intermediate,
    words,
    groups,
    zero_words,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    """Program (block, tile of channels) writes activated ``out[places, I]``."""
    block = tl.program_id(0)
    expert = tl.load(experts + block)  # int
    if expert >= EXPERTS:
        return
    place = block.to(tl.int64) * BM + tl.arange(0, BM)
    slot = tl.load(slots + place)  # int
    m = (slot // SLOTS).to(tl.int64)
    channel = tl.program_id(1) * BN + tl.arange(0, BN)
    valid = channel < intermediate
    first_row = expert.to(tl.int64) * 2 * intermediate
    gate_rows = first_row + channel
    up_rows = gate_rows + intermediate
    gate = tl.zeros((BN, BM), tl.float32)
    up = tl.zeros((BN, BM), tl.float32)
    for at in range(0, columns, BK):
        a, sums = activation_tile(
            x + m * columns, slot < count, at, columns, BITS, EVEN, ONE_GROUP, BM, BK, COMPUTE, REORDER, SCALED
        )
        gate = tile_step(
            gate, a, sums, weight, scale, zero, gate_rows, valid, at, columns, words, groups, zero_words, GROUP,
            BITS, HAS_ZERO, EVEN, ONE_GROUP, BN, BK, COMPUTE, PAIR_TYPE, SCALED,
        )  # fmt: skip
        up = tile_step(
            up, a, sums, weight, scale, zero, up_rows, valid, at, columns, words, groups, zero_words, GROUP,
            BITS, HAS_ZERO, EVEN, ONE_GROUP, BN, BK, COMPUTE, PAIR_TYPE, SCALED,
        )  # fmt: skip
    if HAS_BIAS:
        gate += tl.load(bias + gate_rows, mask=valid, other=0.0).to(tl.float32)[:, None]
        up += tl.load(bias + up_rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    value = gated(gate, up, ACTIVATION, alpha, limit)
    inside = valid[:, None] & (slot < count)[None, :]
    tl.store(out + place[None, :] * intermediate + channel[:, None], value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def down_kernel(
    x,
    slots,
    experts,
    weight,
    scale,
    zero,
    bias,
    out,
    count,
    columns,
    rows,
    words,
    groups,
    zero_words,
    steps,
    EXPERTS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
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
    """Program (block, tile of rows, split) writes ``out[split, slot, rows]``; ``steps`` tiles of columns per split."""
    block = tl.program_id(0)
    expert = tl.load(experts + block)  # int
    if expert >= EXPERTS:
        return
    place = block.to(tl.int64) * BM + tl.arange(0, BM)
    slot = tl.load(slots + place)  # int
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    valid = n < rows
    weight_rows = expert.to(tl.int64) * rows + n
    split = tl.program_id(2)
    first = split * steps * BK
    acc = tl.zeros((BN, BM), tl.float32)
    for at in range(first, tl.minimum(first + steps * BK, columns), BK):
        a, sums = activation_tile(
            x + place * columns, slot < count, at, columns, BITS, EVEN, ONE_GROUP, BM, BK, COMPUTE, REORDER, SCALED
        )
        acc = tile_step(
            acc, a, sums, weight, scale, zero, weight_rows, valid, at, columns, words, groups, zero_words, GROUP,
            BITS, HAS_ZERO, EVEN, ONE_GROUP, BN, BK, COMPUTE, PAIR_TYPE, SCALED,
        )  # fmt: skip
    if HAS_BIAS and split == 0:
        acc += tl.load(bias + weight_rows, mask=valid, other=0.0).to(tl.float32)[:, None]
    target = out + (split.to(tl.int64) * count + slot)[None, :] * rows + n[:, None]
    tl.store(target, acc.to(out.dtype.element_ty), mask=valid[:, None] & (slot < count)[None, :])


@triton.jit
def combine_kernel(
    parts,
    index,
    weights,
    out,
    count,
    hidden,
    SPLITS: tl.constexpr,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, tile) adds the parts ``[splits, T k, H]`` of the slots that were not skipped."""
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, SLOTS):
        slot = token * SLOTS + j
        expert = tl.load(index + slot)  # int
        # what a slot of no expert would add was never written
        width = tl.where((expert >= 0) & (expert < EXPERTS), hidden, 0)
        share = tl.load(weights + slot).to(tl.float32)
        for split in range(0, SPLITS):
            row = parts + (split * count + slot) * hidden
            total += share * tl.load(row + at, mask=at < width, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + at, total.to(out.dtype.element_ty), mask=at < hidden)


def verify(x: Tensor, gate_up_bits: int, down_bits: int, activation: str) -> str | None:
    """Why the kernels decline, or None."""
    for bits in (gate_up_bits, down_bits):
        if bits not in (*BITS, DENSE_BITS):
            return f"{bits} bits"
    if activation not in ACTIVATIONS:
        return f"activation {activation}"
    return None if x.dtype in TYPES else f"activations of {x.dtype}"


def moe_group_gemm(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    gate_up_zero: Tensor | None,
    gate_up_bias: Tensor | None,
    gate_up_bits: int,
    gate_up_group: int,
    down: Tensor,
    down_scale: Tensor | None,
    down_zero: Tensor | None,
    down_bias: Tensor | None,
    down_bits: int,
    down_group: int,
    intermediate: int,
    activation: str,
    alpha: float,
    limit: float,
    config: Config | None = None,
) -> Tensor:
    """Gated experts over routed tokens; arguments as in :func:`llmcompress_kernels.ops.moe_group_gemm`.

    ``config`` is the launch configuration of both projections; None looks it up.
    """
    tokens, hidden = x.shape
    experts, slots = gate_up.shape[0], index.shape[-1]
    count = tokens * slots
    if count == 0:
        return torch.zeros_like(x)
    share = -(-count // experts)
    bits = min(gate_up_bits, down_bits)
    chosen = config or pick("moe_group_gemm", bits, x.dtype, share, intermediate, hidden, x.device)
    chosen = INTERPRETED if interpreted() and config is None else chosen
    blocks = route(index, experts, chosen.tokens)
    inner = _gate_up(
        x.contiguous(), slots, blocks, (gate_up, gate_up_scale, gate_up_zero, gate_up_bias), gate_up_bits,
        gate_up_group, intermediate, activation, alpha, limit, chosen,
    )  # fmt: skip
    side = (down, down_scale, down_zero, down_bias)
    parts = _down(inner, count, blocks, side, down_bits, down_group, hidden, chosen)
    out = torch.empty((tokens, hidden), dtype=store_type(x.dtype), device=x.device)
    block = min(1024, power_of_two(hidden))
    combine_kernel[(tokens, -(-hidden // block))](
        parts, index.contiguous(), weights.to(torch.float32).contiguous(), out, count, hidden,
        parts.shape[0], slots, experts, block,
    )  # fmt: skip
    return out.to(x.dtype)


Side = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]


def _operands(side: Side) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Contiguous tensors, with stand-ins that are never read, and words, groups and zero words per row."""
    weight, scale, zero, bias = (None if t is None else t.contiguous() for t in side)
    assert weight is not None
    sizes = (weight.shape[-1], 0 if scale is None else scale.shape[-1], 0 if zero is None else zero.shape[-1])
    return (
        weight,
        weight if scale is None else scale,
        weight if zero is None else zero,
        weight if bias is None else bias,
        *sizes,
    )


def _gate_up(
    x: Tensor,
    slots: int,
    blocks: Blocks,
    side: Side,
    bits: int,
    group: int,
    intermediate: int,
    activation: str,
    alpha: float,
    limit: float,
    config: Config,
) -> Tensor:
    """Activated ``[places, I]``; places that no slot has stay unwritten."""
    tokens, hidden = x.shape
    plan = plan_columns(bits, x.dtype, group, hidden, config)
    x_ordered, plan = prepare(x, bits, plan)
    # two accumulators: half the rows of the other kernels keep the registers
    rows = max(32, config.rows // 2) if config.tokens >= 64 else config.rows
    even = intermediate % rows == 0 and hidden % plan.columns == 0
    weight, scale, zero, bias, words, groups, zero_words = _operands(side)
    out = torch.empty((blocks.slots.numel(), intermediate), dtype=store_type(x.dtype), device=x.device)
    gate_up_kernel[(blocks.experts.numel(), -(-intermediate // rows))](
        x_ordered, blocks.slots, blocks.experts, weight, scale, zero, bias, out, alpha, limit,
        tokens * slots, hidden, intermediate, words, groups, zero_words,
        slots, weight.shape[0], activation, side[3] is not None, group, bits, side[2] is not None,
        even, plan.one_group, config.tokens, rows, plan.columns, TYPES[store_type(x.dtype)], plan.pair_type,
        plan.reorder, plan.scaled, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out


def _down(
    inner: Tensor, count: int, blocks: Blocks, side: Side, bits: int, group: int, hidden: int, config: Config
) -> Tensor:
    """Parts ``[splits, T k, H]`` of every slot's output."""
    dtype, columns = inner.dtype, inner.shape[1]
    plan = plan_columns(bits, dtype, group, columns, config)
    inner, plan = prepare(inner, bits, plan)
    tiles = -(-columns // plan.columns)
    steps = -(-tiles // min(config.splits, tiles))
    splits = -(-tiles // steps)
    even = hidden % config.rows == 0 and columns % plan.columns == 0
    weight, scale, zero, bias, words, groups, zero_words = _operands(side)
    # parts stay in fp32: with one split and many tokens that is more to write, and one rounding less
    out = torch.empty((splits, count, hidden), dtype=torch.float32, device=inner.device)
    down_kernel[(blocks.experts.numel(), -(-hidden // config.rows), splits)](
        inner, blocks.slots, blocks.experts, weight, scale, zero, bias, out,
        count, columns, hidden, words, groups, zero_words, steps,
        weight.shape[0], side[3] is not None, group, bits, side[2] is not None,
        even, plan.one_group, config.tokens, config.rows, plan.columns, TYPES[dtype], plan.pair_type,
        plan.reorder, plan.scaled, num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip
    return out
