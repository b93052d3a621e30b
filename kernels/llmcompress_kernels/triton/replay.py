"""The DSQ state update within a replay window in Triton: most tokens only read, every R-th rounds.

Two kernels, each of which leaves the other's sequences alone, since a program that only reads needs few registers.
See :mod:`llmcompress_kernels.reference.state` for the window and :mod:`llmcompress_kernels.triton.state` for
``FIXED`` and how a state is rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.state import fixed_mode, load_codes, pointer_or, round_token, warps

# whose windows a program advances
SEQUENCES = 128


@triton.jit
def dsq_read_kernel(
    codes,
    channel,
    scale,
    fixed,
    recent,
    count,
    drive,
    decay,
    b,
    c,
    out,
    rows,
    BITS: tl.constexpr,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """Program (head, sequence): a token that does not fill its window of ``rows`` is read out and put into it.

    What is stored and every kept token's share are read out by themselves: a state takes its code and one product.
    """
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    filled = tl.load(count + sequence)  # int32
    if filled < rows:
        unit = sequence * HEADS + head
        p, n = tl.arange(0, P), tl.arange(0, N)
        WIDTH: tl.constexpr = HEADS * P + HEADS + HEADS // SHARE * N
        shared = (sequence * (HEADS // SHARE) + head // SHARE) * N + n
        # of a row of the window
        own, rate, group = head * P + p, HEADS * P + head, HEADS * P + HEADS + head // SHARE * N + n
        window = recent + sequence * rows * WIDTH
        if FIXED % 3 == 1:
            wide = tl.load(fixed + head * P + p).to(tl.float32)
        else:
            wide = tl.load(channel + unit * P + p).to(tl.float32)
        reader = tl.load(c + shared).to(tl.float32)
        largest = tl.zeros((N,), tl.float32) + ((1 << (BITS - 1)) - 1) * 1.0
        step = tl.div_rn(tl.load(scale + unit * N + n).to(tl.float32), largest) * reader
        held = tl.sum(load_codes(codes + unit * (P * N * BITS // 8), BITS, P, N) * step[None, :], 1)
        token, x = tl.load(b + shared).to(tl.float32), tl.load(drive + unit * P + p).to(tl.float32)
        keep = tl.load(decay + unit).to(tl.float32)
        value = x * tl.sum(token * reader, 0)
        at = window + filled * WIDTH
        tl.store(at + own, x)
        tl.store(at + rate, keep)
        if head % SHARE == 0:
            tl.store(at + group, token)
        for _ in range(0, filled):
            at -= WIDTH
            share = keep * tl.sum(tl.load(at + group).to(tl.float32) * reader, 0)
            value += tl.load(at + own).to(tl.float32) * share
            keep *= tl.load(at + rate).to(tl.float32)
        tl.store(out + unit * P + p, value + keep * (wide * held))


@triton.jit
def dsq_replay_kernel(
    codes,
    channel,
    scale,
    fixed,
    recent,
    count,
    drive,
    decay,
    b,
    c,
    out,
    rows,
    BITS: tl.constexpr,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
):
    """Program (head, sequence): a token that fills its window of ``rows``, all of it taken in and the state rounded."""
    sequence = tl.program_id(1).to(tl.int64)
    if tl.load(count + sequence) >= rows:  # int32
        window = recent + sequence * rows * (HEADS * P + HEADS + HEADS // SHARE * N)
        round_token(
            codes, channel, scale, fixed, window, rows, drive, decay, b, c, out, tl.program_id(0), sequence,
            BITS, FIXED, HEADS, SHARE, P, N, LOG, True,
        )  # fmt: skip


@triton.jit
def advance_window_kernel(count, sequences, rows, BLOCK: tl.constexpr):
    """Program (tile of sequences): a window has one row more, or none after it was full."""
    s = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    filled = tl.load(count + s, mask=s < sequences, other=0)
    tl.store(count + s, tl.where(filled < rows, filled + 1, 0), mask=s < sequences)


def dsq_replay_update(
    codes: Tensor,
    channel: Tensor | None,
    scale: Tensor,
    fixed: Tensor | None,
    recent: Tensor,
    count: Tensor,
    drive: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    bits: int,
    refit: bool = False,
    dither: bool = False,
) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.state.dsq_replay_update`; what is replaced must be contiguous."""
    sequences, heads, channels = drive.shape
    states, rows = scale.shape[-1], recent.shape[1]
    drive, decay, b, c = (t.contiguous() for t in (drive, decay, b, c))
    out = torch.empty_like(drive)
    if sequences == 0:
        return out
    held = (codes, pointer_or(channel, scale), scale, pointer_or(fixed, scale), recent, count)
    sizes = (bits, fixed_mode(fixed, refit, dither), heads, heads // b.shape[1], channels, states)
    options = {"num_warps": warps(channels, states), "enable_fp_fusion": False}
    dsq_replay_kernel[(heads, sequences)](
        *held, drive, decay, b, c, out, rows, *sizes, states.bit_length() - 1, **options
    )
    if rows == 0:
        return out
    dsq_read_kernel[(heads, sequences)](*held, drive, decay, b, c, out, rows, *sizes, **options)
    # by itself: other heads of the sequence may not have read it yet
    advance_window_kernel[(-(-sequences // SEQUENCES),)](count, sequences, rows, SEQUENCES, num_warps=1)
    return out
