"""``group_gemm`` with activations rounded to int8, on the tensor cores' int8 products, for any number of tokens.

Codes and activations are multiplied as bytes and summed in int32, which is exact; the definition's two scales are
applied once per chunk of columns that share an activation's scale, 64 or 32, in fp32. A chunk of 64 columns costs a
conversion and a multiply-add per sum, by count half again as long as its products on an H100. With one scale a token
and one a row of the weight (:func:`token_gemm`) that happens once at the end, and the loop is the tensor cores' alone.

8-bit codes are read where they are stored, as bytes; their top bit is turned, which takes 128 off. Narrower ones are
laid out as bytes first, which moves two to three bytes a weight and is worth it for prompts, less so for a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.decode import code_at, codes_tile
from llmcompress_kernels.triton.group_gemm import BITS, TYPES, store_type
from llmcompress_kernels.triton.tuning import interpreted, power_of_two

# columns of an activation that share a scale, by the definition
CHUNK = 64
# values of a program that rounds activations, at least a row where a row has one scale
ROUNDED = 1024
# rows and columns of a program that lays codes out
ROWS, COLUMNS = 32, 128


@triton.jit
def round_activations_kernel(
    x, codes, scales, sums, tokens, columns, chunks, CHUNK: tl.constexpr, COUNT: tl.constexpr, SUMS: tl.constexpr
):
    """Program (token, ``COUNT`` chunks): int8 ``[T, K]``, fp32 scales and int32 sums of codes, both ``[chunks, T]``."""
    t = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1) * COUNT + tl.arange(0, COUNT)
    k = chunk[:, None] * CHUNK + tl.arange(0, CHUNK)[None, :]
    value = tl.load(x + t * columns + k, mask=k < columns, other=0.0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(value), 1), tl.zeros((COUNT,), tl.float32) + 127.0)
    found = tl.div_rn(value, tl.broadcast_to(tl.where(scale > 0.0, scale, 1.0)[:, None], (COUNT, CHUNK)))
    # adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even
    found = (found + 12582912.0) - 12582912.0
    tl.store(codes + t * columns + k, found.to(tl.int8), mask=k < columns)
    tl.store(scales + chunk * tokens + t, scale, mask=chunk < chunks)
    if SUMS:
        tl.store(sums + chunk * tokens + t, tl.sum(found, 1).to(tl.int32), mask=chunk < chunks)


@triton.jit
def lay_out_codes_kernel(weight, out, rows, columns, words, BITS: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """Program (tile of rows, tile of columns): ``code - 2^(BITS - 1)`` as int8 ``[N, K]``."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    at = tl.program_id(1) * BK
    k = at + tl.arange(0, BK)
    codes = codes_tile(weight + n * words, n < rows, at, words, BITS, False, BN, BK) - (1 << (BITS - 1))
    tl.store(
        out + n[:, None] * columns + k[None, :], codes.to(tl.int8), mask=(n < rows)[:, None] & (k < columns)[None, :]
    )


@triton.jit
def int8_gemm_kernel(
    x,
    scales,
    sums,
    weight,
    scale,
    zero,
    out,
    tokens,
    rows,
    columns,
    pitch,
    groups,
    zero_words,
    steps,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    TURN: tl.constexpr,
    EVEN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """Program (tile of rows, tile of tokens, split) writes ``out[split, tokens, rows]``.

    ``BK`` is a chunk of the activations or, with ``PER_TOKEN``, any step; ``GROUP`` columns share a weight's scale, 0
    for all of them; ``pitch`` bytes lie between rows of ``weight``; ``TURN`` where its bytes are unsigned.
    """
    split = tl.program_id(2)
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(1) * BM + tl.arange(0, BM)
    # what lies beyond the matrices is the last row again, and is not stored
    row, token = tl.minimum(n, rows - 1).to(tl.int64), tl.minimum(m, tokens - 1).to(tl.int64)
    acc = tl.zeros((BN, BM), tl.int32 if PER_TOKEN else tl.float32)
    first = split * steps * BK
    place = token + split.to(tl.int64) * steps * tokens
    for at in range(first, tl.minimum(first + steps * BK, columns), BK):
        k = at + tl.arange(0, BK)
        left, right = weight + row[:, None] * pitch + k[None, :], x + token[:, None] * columns + k[None, :]
        if EVEN:
            w = tl.load(left)  # int8
            a = tl.load(right)  # int8
        else:
            w = tl.load(left, mask=(k < columns)[None, :], other=0)
            a = tl.load(right, mask=(k < columns)[None, :], other=0)
        if TURN:
            w = w ^ -128
        if PER_TOKEN:
            # Triton 3.6 takes fp32 for the type of the sums unless it is named
            acc = tl.dot(w, tl.trans(a), acc, out_dtype=tl.int32)
        else:
            factor = tl.load(scales + place)  # fp32
            found = tl.dot(w, tl.trans(a))
            group = at // GROUP if GROUP > 0 else 0
            if HAS_ZERO:
                middle = code_at(zero + row * zero_words, tl.zeros_like(n) + group, n < rows, zero_words, BITS)
                total = tl.load(sums + place)  # int32
                found += ((1 << (BITS - 1)) - middle)[:, None] * total[None, :]
            part = found.to(tl.float32) * factor[None, :]
            if GROUP > 0:
                part *= tl.load(scale + row * groups + group).to(tl.float32)[:, None]
            acc += part
            place += tokens
    result = acc.to(tl.float32)
    if PER_TOKEN:
        result *= tl.load(scales + token).to(tl.float32)[None, :]
    if GROUP == 0:
        result *= tl.load(scale + row).to(tl.float32)[:, None]
    target = out + (split.to(tl.int64) * tokens + m)[None, :] * rows + n[:, None]
    tl.store(target, result.to(out.dtype.element_ty), mask=(m < tokens)[None, :] & (n < rows)[:, None])


@dataclass(frozen=True, slots=True)
class Launch:
    """How the product is launched.

    Attributes:
        tokens: Per program, 16 or more.
        rows: Rows of the weight per program.
        splits: Parts that columns are divided into.
        warps: Warps of a program.
        stages: Depth of the software pipeline.
    """

    tokens: int
    rows: int
    splits: int
    warps: int
    stages: int


def launch(tokens: int, rows: int, columns: int, per_token: bool = False, processors: int = 132) -> Launch:
    """Tiles that leave room for int32 and fp32 sums side by side; few tokens are split like ``group_gemm``'s."""
    if interpreted():
        return Launch(16, 32, 2, 1, 1)
    if tokens <= 64:
        tile = max(16, power_of_two(tokens))
        splits = max(1, min(16, 4 * processors // -(-rows // 64), columns // 512))
        return Launch(tile, 64, splits, 4, 4)
    return Launch(256 if per_token and tokens >= 1024 else 128, 128, 1, 8, 4)


def chunk_of(group_size: int, columns: int) -> int | None:
    """Columns that share an activation's scale, None where they are not the same everywhere."""
    if group_size >= columns or group_size % CHUNK == 0:
        return CHUNK
    return 32 if group_size == 32 else None


def verify(x: Tensor, packed: Tensor, bits: int, group_size: int, columns: int) -> str | None:
    """Why the kernels decline, or None."""
    if bits not in BITS or x.dtype not in TYPES:
        return f"{bits} bits, activations of {x.dtype}"
    if packed.dim() != 2:
        return "interleaved weights"
    return f"groups of {group_size} columns" if chunk_of(group_size, columns) is None else None


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    chosen: Launch | None = None,
) -> Tensor:
    """``x Wᵀ`` with ``int8``; arguments as in :func:`llmcompress_kernels.ops.group_gemm`, ``chosen`` of :func:`launch`.

    Activations round to the definition's codes; sums of chunks are added in fp32.
    """
    chunk = chunk_of(group_size, in_features)
    assert chunk is not None
    group = 0 if group_size >= in_features else group_size
    return _product(x, (packed, scale, zero), bits, group, in_features, chunk, False, chosen)


def token_gemm(
    x: Tensor, packed: Tensor, scale: Tensor, bits: int, in_features: int, chosen: Launch | None = None
) -> Tensor:
    """``x Wᵀ`` with one scale per token and row, symmetric.

    Args:
        x: ``[..., K]``; each token rounds to int8 with one scale, its largest absolute value divided by 127.
        packed: ``[N, words(K, bits)]`` int32.
        scale: fp16 ``[N, 1]``.
        bits: 2, 3, 4 or 8.
        in_features: K, at most 65536: sums of products of bytes fit int32.
        chosen: See :func:`launch`.

    Returns:
        ``[..., N]`` in the type of ``x``.
    """
    return _product(x, (packed, scale, None), bits, 0, in_features, power_of_two(in_features), True, chosen)


def rounded(x: Tensor, chunk: int, sums: bool) -> tuple[Tensor, Tensor, Tensor]:
    """int8 codes ``[T, K]``, fp32 scales ``[chunks, T]`` and, if wanted, int32 sums of codes ``[chunks, T]``."""
    tokens, columns = x.shape
    chunks, count = -(-columns // chunk), max(1, ROUNDED // chunk)
    codes = torch.empty((tokens, columns), dtype=torch.int8, device=x.device)
    scales = torch.empty((chunks, tokens), dtype=torch.float32, device=x.device)
    totals = torch.empty((chunks, tokens) if sums else (1,), dtype=torch.int32, device=x.device)
    round_activations_kernel[(tokens, -(-chunks // count))](
        x, codes, scales, totals, tokens, columns, chunks, chunk, count, sums,
        num_warps=max(1, min(8, chunk * count // 256)),
    )  # fmt: skip
    return codes, scales, totals


def bytes_of(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Codes as int8 ``[N, K or more]``: of 8 bits as they are stored, unsigned; narrower ones less their middle."""
    packed = packed.contiguous()
    if bits == 8:
        return packed.view(torch.int8)
    out = torch.empty((packed.shape[0], columns), dtype=torch.int8, device=packed.device)
    lay_out_codes_kernel[(-(-packed.shape[0] // ROWS), -(-columns // COLUMNS))](
        packed, out, packed.shape[0], columns, packed.shape[1], bits, ROWS, COLUMNS
    )
    return out


def _product(
    x: Tensor,
    matrix: tuple[Tensor, Tensor, Tensor | None],
    bits: int,
    group: int,
    columns: int,
    chunk: int,
    per_token: bool,
    chosen: Launch | None,
) -> Tensor:
    packed, scale, zero = matrix
    flat, rows = x.reshape(-1, columns).contiguous(), packed.shape[0]
    tokens = flat.shape[0]
    if tokens == 0 or rows == 0:
        return x.new_zeros((*x.shape[:-1], rows))
    how = chosen or launch(tokens, rows, columns, per_token, _processors(x.device))
    codes, scales, sums = rounded(flat, chunk, zero is not None)
    weight = bytes_of(packed, bits, columns)
    step = 128 if per_token else chunk
    tiles = -(-columns // step)
    steps = -(-tiles // min(how.splits, tiles))
    splits = -(-tiles // steps)
    kind = store_type(x.dtype) if splits == 1 else torch.float32
    out = torch.empty((splits, tokens, rows), dtype=kind, device=x.device)
    int8_gemm_kernel[(-(-rows // how.rows), -(-tokens // how.tokens), splits)](
        codes, scales, sums, weight, scale.contiguous(), packed if zero is None else zero.contiguous(), out,
        tokens, rows, columns, weight.shape[1], scale.shape[1], 0 if zero is None else zero.shape[1], steps,
        group, bits, zero is not None, per_token, bits == 8, columns % step == 0, how.tokens, how.rows, step,
        num_warps=how.warps, num_stages=how.stages,
    )  # fmt: skip
    summed = out[0] if splits == 1 else out.sum(0)
    return summed.to(x.dtype).view(*x.shape[:-1], rows)


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
