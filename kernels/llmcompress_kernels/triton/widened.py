"""Many tokens: weights are widened to bfloat16 once, then torch multiplies.

With T tokens per weight a product takes 2 T operations per weight, and widening one costs the memory traffic of two to
three bytes whatever T is, so from some hundred tokens on nothing is lost by not fusing the two, and torch's own
products (cuBLAS, CUTLASS's grouped one) run at the full rate of the tensor cores. Experts share one call of
``torch._grouped_mm``, whose group ends stay on the GPU: nothing goes to the host, so graphs may capture it. Widened
weights live in a bounded piece of memory, a range of every expert's rows at a time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from llmcompress_kernels.triton.decode import code_at, codes_tile, weight_tile
from llmcompress_kernels.triton.group_gemm import BITS, TYPES, store_type
from llmcompress_kernels.triton.moe_group_gemm import ACTIVATIONS, gated
from llmcompress_kernels.triton.tuning import power_of_two

# bytes that widened weights may take at a time
WORKSPACE = 1 << 30
# tokens per weight from which widening pays, by width: reckoned from what Triton took on an H100, not yet measured
FROM = {2: 512, 3: 128, 4: 512, 8: 512}
FROM_ROUTED = {2: 256, 3: 64, 4: 256, 8: 256}
ROWS, COLUMNS = 32, 128


@triton.jit
def widen_kernel(
    weight,
    scale,
    zero,
    out,
    first,
    chunk,
    span,
    rows,
    columns,
    words,
    groups,
    zero_words,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ONE_GROUP: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
):
    """Program (tile of rows, tile of columns); ``out`` has ``chunk`` rows of every ``span``, from ``first`` on."""
    r = tl.program_id(0) * BN + tl.arange(0, BN)
    at = tl.program_id(1) * BK
    k = at + tl.arange(0, BK)
    valid = r < rows
    n = (r // chunk).to(tl.int64) * span + first + r % chunk
    if ONE_GROUP:
        group = tl.zeros_like(r) + at // GROUP
        known = valid & (group < groups)
        s = tl.load(scale + n * groups + group, mask=known, other=0.0).to(tl.float32)
        if HAS_ZERO:
            middle = code_at(zero + n * zero_words, group, known, zero_words, BITS)
        else:
            middle = tl.full((BN,), 1 << (BITS - 1), tl.int32)
        codes = codes_tile(weight + n * words, valid, at, words, BITS, False, BN, BK)
        w = ((codes - middle[:, None]).to(tl.float32) * s[:, None]).to(COMPUTE)
    else:
        w = weight_tile(
            weight,
            scale,
            zero,
            n,
            valid,
            at,
            columns,
            words,
            groups,
            zero_words,
            GROUP,
            BITS,
            HAS_ZERO,
            BN,
            BK,
            COMPUTE,
        )
    inside = valid[:, None] & (k < columns)[None, :]
    tl.store(out + r.to(tl.int64)[:, None] * columns + k[None, :], w.to(out.dtype.element_ty), mask=inside)


def widen(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
    first: int,
    chunk: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows ``first`` to ``first + chunk`` of every matrix of a bank, as numbers.

    Args:
        packed: ``[B, N, words(K, bits)]`` int32.
        scale: ``[B, N, G]`` fp16.
        zero: ``[B, N, words(G, bits)]`` int32, or None.
        bits: 2, 3, 4 or 8.
        group_size: Columns per scale.
        columns: K.
        first: First row.
        chunk: Rows.
        dtype: Type of the result.

    Returns:
        ``[B, chunk, K]``.
    """
    bank, span = packed.shape[:2]
    out = torch.empty((bank, chunk, columns), dtype=store_type(dtype), device=packed.device)
    tile, single = COLUMNS, group_size >= columns
    while not single and tile > 32 and group_size % tile != 0:
        tile //= 2
    packed, scale = packed.contiguous(), scale.contiguous()
    zero = None if zero is None else zero.contiguous()
    widen_kernel[(-(-bank * chunk // ROWS), -(-columns // tile))](
        packed, scale, packed if zero is None else zero, out, first, chunk, span, bank * chunk, columns,
        packed.shape[-1], scale.shape[-1], 0 if zero is None else zero.shape[-1],
        group_size, bits, zero is not None, single or group_size % tile == 0, ROWS, tile, TYPES[store_type(dtype)],
        num_warps=4,
    )  # fmt: skip
    return out.to(dtype)


def verify(x: Tensor, bits: int, tokens: int, least: dict[int, int]) -> str | None:
    """Why widening does not pay, or cannot be had, or None; ``tokens`` is per weight."""
    if bits not in BITS or x.dtype not in TYPES:
        return f"{bits} bits, activations of {x.dtype}"
    return None if tokens >= least[bits] else f"{tokens} tokens"


def group_gemm(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, in_features: int
) -> Tensor:
    """``x Wᵀ``; arguments as in :func:`llmcompress_kernels.ops.group_gemm`."""
    rows, parts = packed.shape[0], []
    chunk = _chunk(rows, 1, in_features)
    for first in range(0, rows, chunk):
        size = min(chunk, rows - first)
        lifted = (packed[None], scale[None], None if zero is None else zero[None])
        parts.append(functional.linear(x, widen(*lifted, bits, group_size, in_features, first, size, x.dtype)[0]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _chunk(rows: int, bank: int, columns: int) -> int:
    """Rows of every matrix that fit the workspace, as equal as can be, a multiple of 256 where there are that many."""
    most = max(256, WORKSPACE // (2 * bank * columns) // 256 * 256)
    pieces = -(-rows // most)
    return min(rows, -(-rows // pieces // 256) * 256)


@triton.jit
def gate_kernel(
    h,
    out,
    first,
    chunk,
    intermediate,
    ends,
    alpha,
    limit,
    ACTIVATION: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (place, tile): ``out[place, first + c]`` from gate ``h[place, c]`` and up ``h[place, chunk + c]``.

    Places behind the last expert's belong to skipped slots: nothing is read or written there.
    """
    place = tl.program_id(0).to(tl.int64)
    used = tl.load(ends + EXPERTS - 1)  # int
    width = tl.where(place < used, chunk, 0)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(h + place * 2 * chunk + c, mask=c < width, other=0.0).to(tl.float32)
    up = tl.load(h + place * 2 * chunk + chunk + c, mask=c < width, other=0.0).to(tl.float32)
    value = gated(gate, up, ACTIVATION, alpha, limit)
    tl.store(out + place * intermediate + first + c, value.to(out.dtype.element_ty), mask=c < width)


@triton.jit
def weigh_kernel(
    rows,
    places,
    weights,
    out,
    first,
    chunk,
    hidden,
    ends,
    SLOTS: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (token, tile) adds a token's rows of ``rows [places, chunk]`` into ``out[token, first + c]``."""
    token = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    used = tl.load(ends + EXPERTS - 1)  # int
    total = tl.zeros((BLOCK,), tl.float32)
    for j in range(0, SLOTS):
        place = tl.load(places + token * SLOTS + j)  # int
        # places behind the last expert's belong to skipped slots
        width = tl.where(place < used, chunk, 0)
        share = tl.load(weights + token * SLOTS + j).to(tl.float32)
        total += share * tl.load(rows + place * chunk + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(out + token * hidden + first + c, total.to(out.dtype.element_ty), mask=c < chunk)


def verify_routed(
    x: Tensor, index: Tensor, operands: tuple[Tensor | None, ...], bits: tuple[int, int], activation: str = "silu"
) -> str | None:
    """Why ``moe_group_gemm`` is not for widened weights, or None; ``operands``: scale and bias of both sides."""
    scale, bias, down_scale, down_bias = operands
    if x.dtype != torch.bfloat16 or not hasattr(torch, "_grouped_mm"):
        return f"activations of {x.dtype}"
    if activation not in ACTIVATIONS:
        return f"activation {activation}"
    if scale is None or down_scale is None or bias is not None or down_bias is not None:
        return "a weight without scales, or with a bias"
    if x.is_cuda and torch.cuda.get_device_capability(x.device)[0] < 9:
        return "torch's grouped product asks the host before compute capability 9.0"
    tokens = index.numel() // max(1, scale.shape[0])
    return next((why for b in bits if (why := verify(x, b, tokens, FROM_ROUTED)) is not None), None)


def moe_group_gemm(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: tuple[Tensor, Tensor, Tensor | None, int, int],
    down: tuple[Tensor, Tensor, Tensor | None, int, int],
    intermediate: int,
    activation: str,
    alpha: float,
    limit: float,
) -> Tensor:
    """Gated experts over routed tokens; arguments as in :func:`llmcompress_kernels.ops.moe_group_gemm`.

    ``gate_up`` and ``down`` are weight, scale, zero, bits and group.
    """
    assert activation in ACTIVATIONS
    (tokens, hidden), slots, experts = x.shape, index.shape[-1], gate_up[0].shape[0]
    ends, order, places = _sort(index, experts)
    rows = x[order // slots]
    inner = torch.empty((rows.shape[0], intermediate), dtype=store_type(x.dtype), device=x.device)
    # a bank of E matrices with 2 I rows is one of 2 E with I: gates and ups of the same channels come together
    halves = [t if t is None else t.unflatten(1, (2, intermediate)).flatten(0, 1) for t in gate_up[:3]]
    chunk = _chunk(intermediate, 2 * experts, hidden)
    for first in range(0, intermediate, chunk):
        size = min(chunk, intermediate - first)
        wide = widen(halves[0], halves[1], halves[2], *gate_up[3:], hidden, first, size, x.dtype)  # type: ignore[arg-type]
        h = torch._grouped_mm(rows, wide.view(experts, 2 * size, hidden).transpose(1, 2), offs=ends)
        block = min(1024, power_of_two(size))
        gate_kernel[(rows.shape[0], -(-size // block))](
            h, inner, first, size, intermediate, ends, alpha, limit, activation, experts, block
        )
        del wide, h
    inner = inner.to(x.dtype)
    out = torch.empty((tokens, hidden), dtype=store_type(x.dtype), device=x.device)
    chunk = _chunk(hidden, experts, intermediate)
    shares = weights.to(torch.float32).contiguous()
    for first in range(0, hidden, chunk):
        size = min(chunk, hidden - first)
        wide = widen(*down, intermediate, first, size, x.dtype)
        outer = torch._grouped_mm(inner, wide.transpose(1, 2), offs=ends)
        block = min(1024, power_of_two(size))
        weigh_kernel[(tokens, -(-size // block))](
            outer, places, shares, out, first, size, hidden, ends, slots, experts, block
        )
        del wide, outer
    return out.to(x.dtype)


def _sort(index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots sorted by expert: int32 ends of the experts ``[E]``, slot of each place, place of each slot.

    Skipped slots, those of expert E or of none, come last.
    """
    flat = index.reshape(-1)
    flat = torch.where((flat < 0) | (flat > experts), experts, flat)
    owner, order = torch.sort(flat, stable=True)
    ends = torch.searchsorted(owner, torch.arange(experts, device=index.device), right=True).to(torch.int32)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(order.numel(), device=index.device))
    return ends, order, places
