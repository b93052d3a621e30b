"""``delta_decode`` in Triton: the models of one residual tree in one product, each node read and widened once.

A program owns a tile of rows, a tile of tokens and a part of the columns, and walks the nodes of one bit width. Tokens
are sorted so that those below a node are neighbours; the others' activations count as zero, and all nodes add to the
same registers, so there are no atomics and the order of sums is fixed. Widths follow each other in launches of their
own; parts and widths are summed at the end, in fp32.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.decode import code_at, codes_tile, pair_order, pair_tile
from llmcompress_kernels.triton.group_gemm import TYPES, store_type
from llmcompress_kernels.triton.tuning import Config, pick


@triton.jit
def delta_decode_kernel(
    x,
    packed,
    scales,
    multipliers,
    spans,
    out,
    nodes,
    tokens,
    rows,
    columns,
    words,
    groups,
    steps,
    GROUP: tl.constexpr,
    BITS: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    COMPUTE: tl.constexpr,
    PAIR_TYPE: tl.constexpr,
):
    """Program (tile of rows, tile of tokens, split) writes ``out[split, tokens, rows]``.

    ``packed`` and ``scales`` are tables of addresses, one per node; ``spans [nodes, 2]`` holds rows ``lo <= t < hi``.
    """
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    m = tl.program_id(1).to(tl.int64) * BM + tl.arange(0, BM)
    split = tl.program_id(2)
    first = split * steps * BK
    last = tl.minimum(first + steps * BK, columns)
    acc = tl.zeros((BN, BM), tl.float32)
    # 2^b + code in pair order, or the code itself, less the middle of the grid
    middle: tl.constexpr = ((1 << BITS) - 1) / 2.0
    offset: tl.constexpr = middle if PAIR_TYPE is None else middle + (1 << BITS)
    for node in range(0, nodes):
        low = tl.load(spans + 2 * node)  # int32
        high = tl.load(spans + 2 * node + 1)  # int32
        start, stop = tl.maximum(low, tl.program_id(1) * BM), tl.minimum(high, tl.program_id(1) * BM + BM)
        if start < stop:
            below = (m >= low) & (m < high)
            row = tl.load(packed + node).to(tl.pointer_type(tl.int32)) + n * words  # int64
            scale = tl.load(scales + node).to(tl.pointer_type(tl.float16)) + n * groups  # int64
            multiplier = tl.load(multipliers + node).to(tl.float32)
            for at in range(first, last, BK):
                k = at + tl.arange(0, BK)
                inside = below[:, None] & (k < columns)[None, :]
                a = tl.load(x + m[:, None] * columns + k[None, :], mask=inside, other=0.0).to(COMPUTE)
                sums = tl.sum(a.to(tl.float32), 1)
                if PAIR_TYPE is not None:
                    a = pair_order(a, BITS, BM, BK)
                    w = pair_tile(row, n < rows, at, words, BITS, False, BN, BK, PAIR_TYPE).to(COMPUTE)
                elif BITS == 5:
                    # no run of 5-bit codes shares few words: every code is fetched by itself
                    known = (n < rows)[:, None] & (k < columns)[None, :]
                    w = code_at(row[:, None], k[None, :], known, words, BITS).to(tl.float32).to(COMPUTE)
                else:
                    w = codes_tile(row, n < rows, at, words, BITS, False, BN, BK).to(tl.float32).to(COMPUTE)
                s = tl.load(scale + at // GROUP, mask=n < rows, other=0.0).to(tl.float32) * multiplier
                part = tl.dot(w, tl.trans(a), input_precision="ieee")
                acc += s[:, None] * (part - offset * sums[None, :])
    target = out + (split.to(tl.int64) * tokens + m)[None, :] * rows + n[:, None]
    tl.store(target, acc, mask=(m < tokens)[None, :] & (n < rows)[:, None])


def verify(x: Tensor, bits: list[int], group_size: int) -> str | None:
    """Why the kernel declines, or None."""
    if any(not 1 <= b <= 6 for b in bits):
        return f"bits of {sorted(set(bits))}"
    if group_size % 32 != 0 and group_size < x.shape[-1]:
        return f"groups of {group_size} columns"
    return None if x.dtype in TYPES else f"activations of {x.dtype}"


def _few_rows(config: Config) -> Config:
    """At most 64 rows per program: the activations of a node are summed beside the product, which costs registers."""
    return replace(config, rows=min(config.rows, 64))


@lru_cache(maxsize=4096)
def _on_device(values: tuple[int, ...] | tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A small table on the device. The same ones come back step after step, and a captured graph may not upload."""
    return torch.tensor(values, dtype=dtype, device=device)


def delta_decode(
    x: Tensor,
    packed: list[Tensor],
    scale: list[Tensor],
    spans: Tensor,
    bits: list[int],
    multiplier: list[float],
    group_size: int,
    config: Config | None = None,
) -> Tensor:
    """Sum of ``x[lo:hi] Wᵀ`` over the nodes of a tree.

    Args:
        x: ``[T, K]`` fp16, bf16 or fp32; rows sorted so that each node's are neighbours.
        packed: Per node ``[N, words(K, b)]`` int32, contiguous.
        scale: Per node ``[N, G]`` fp16, contiguous.
        spans: ``[V, 2]`` int64 on the CPU: rows ``lo <= t < hi`` of each node.
        bits: Per node, 1 to 6.
        multiplier: Per node, a power of two on top of its scales.
        group_size: Columns per scale.
        config: Launch configuration; None looks it up.

    Returns:
        ``[T, N]`` in the type of ``x``; rows below no node are zero.
    """
    (tokens, columns), rows = x.shape, packed[0].shape[0]
    used = [v for v, (low, high) in enumerate(spans.tolist()) if high > low]
    if not used or tokens == 0:
        return x.new_zeros((tokens, rows))
    x = x.contiguous()
    chosen = config
    if chosen is None:
        chosen = _few_rows(pick("delta_decode", min(bits), x.dtype, min(tokens, 32), rows, columns, x.device))
    step = chosen.columns
    while group_size < columns and group_size % step != 0:
        step //= 2
    tiles = -(-columns // step)
    steps = -(-tiles // min(chosen.splits, tiles))
    splits = -(-tiles // steps)
    widths = sorted({bits[v] for v in used})
    out = torch.empty((len(widths), splits, tokens, rows), dtype=torch.float32, device=x.device)
    compute = TYPES[store_type(x.dtype)]
    for place, width in enumerate(widths):
        members = [v for v in used if bits[v] == width]
        pairs = x.dtype != torch.float32 and width in (2, 3, 4)
        # codes that are fetched one by one are kept few: small tiles, no pipeline
        tile, width_step, stages = (32, min(step, 32), 1) if width == 5 else (chosen.rows, step, chosen.stages)
        delta_decode_kernel[(-(-rows // tile), -(-tokens // chosen.tokens), splits)](
            x,
            _on_device(tuple(packed[v].data_ptr() for v in members), torch.int64, x.device),
            _on_device(tuple(scale[v].data_ptr() for v in members), torch.int64, x.device),
            _on_device(tuple(multiplier[v] for v in members), torch.float32, x.device),
            _on_device(tuple(spans[members].flatten().tolist()), torch.int32, x.device),
            out[place], len(members), tokens, rows, columns, packed[members[0]].shape[1], scale[members[0]].shape[1],
            steps * step // width_step, group_size, width, chosen.tokens, tile, width_step, compute,
            TYPES[x.dtype] if pairs else None, num_warps=chosen.warps, num_stages=stages,
        )  # fmt: skip
    return out.sum((0, 1)).to(x.dtype)
