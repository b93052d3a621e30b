"""Operators on recurrent states in Triton: DSQ update, scan with rounding between tokens, and its adjoint.

A program owns one head of one sequence and its whole ``[P, N]`` state, because the state scale is a maximum over P.
Per token an update reads and writes ``bits / 8`` bytes per value where a float state costs 4 + 4. Codes and scales are
the definition's to the last bit (:mod:`llmcompress_kernels.reference.state`): divisions and roots are correctly
rounded, the mean is summed in halves, and kernels are compiled without fused multiply-add.

``FIXED`` says where the channel scale comes from: 0 the state, 1 calibration, 2 the state and then a fit to the codes;
3 and 4 are 0 and 1 with a dither before rounding.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.reference.state import SEGMENT


@triton.jit
def folded_sum(values, P: tl.constexpr, N: tl.constexpr, LOG: tl.constexpr):
    """Sum over the last axis, its second half added to its first until one value is left."""
    for i in tl.static_range(LOG):
        # a sum of two has one order
        values = tl.sum(tl.reshape(values, (P, 2, N >> (i + 1))), 1)
    return tl.reshape(values, (P,))


@triton.jit
def folded_mean(values, P: tl.constexpr, N: tl.constexpr, LOG: tl.constexpr):
    """Mean over the last axis, summed in that order."""
    return folded_sum(values, P, N, LOG) * (1.0 / N)


@triton.jit
def to_scale(value):
    """Positive fp32 to a stored scale; NaN stays NaN."""
    value = tl.maximum(value, 5.9604644775390625e-08, propagate_nan=tl.PropagateNan.ALL)
    return tl.minimum(value, 65504.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)


@triton.jit
def largest(values):
    """Over the first axis, of numbers that are not negative: the order of their bits, in which NaN comes last."""
    return tl.max(values.to(tl.int32, bitcast=True), 0).to(tl.float32, bitcast=True)


@triton.jit
def quantize(u, fixed, qmax, FIXED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LOG: tl.constexpr):
    """Codes (fp32), channel and state scales (fp16) and step of ``u [P, N]``."""
    size = tl.abs(u)
    if FIXED % 3 == 1:
        channel = fixed
    else:
        channel = to_scale(tl.sqrt_rn(folded_mean(size, P, N, LOG)))
    wide = channel.to(tl.float32)
    state = to_scale(largest(tl.div_rn(size, tl.broadcast_to(wide[:, None], (P, N)))))
    step = step_size(wide, state, qmax, P, N)
    if FIXED >= 3:
        inverse, unstep = reciprocals(wide, state, qmax, P, N)
        dither = tl.broadcast_to(dither_of(state)[None, :], (P, N))
        ratio = tl.fma(u * inverse, tl.broadcast_to(unstep, (P, N)), dither)
    else:
        ratio = tl.div_rn(u, step)
    ratio = tl.minimum(tl.maximum(ratio, -qmax), qmax)
    # adding and taking away 1.5 * 2^23 rounds to the nearest integer, ties to even
    codes = (ratio + 12582912.0) - 12582912.0
    if FIXED == 2:
        inverse, unstep = reciprocals(wide, state, qmax, P, N)
        value = (u * inverse) * unstep
        top, below = folded_sum(codes * value, P, N, LOG), folded_sum(codes * codes, P, N, LOG)
        fits = (top > 0) & (below > 0)
        channel = to_scale(wide * tl.where(fits, tl.div_rn(top, tl.where(fits, below, 1.0)), 1.0))
        step = step_size(channel.to(tl.float32), state, qmax, P, N)
    return codes, channel, state, step


@triton.jit
def reciprocals(wide, state, qmax, P: tl.constexpr, N: tl.constexpr):
    """Of the channel scales ``[P, 1]`` and of the state scales over ``qmax`` ``[1, N]``."""
    per_state = tl.div_rn(state.to(tl.float32), tl.zeros((N,), tl.float32) + qmax)
    inverse = tl.div_rn(tl.zeros((P,), tl.float32) + 1.0, wide)
    return inverse[:, None], tl.div_rn(tl.zeros((N,), tl.float32) + 1.0, per_state)[None, :]


@triton.jit
def dither_of(state):
    """What is added before rounding: fp16 state scales to fp32 between -1/2 and 1/2."""
    bits = state.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    return ((((bits * 40503) & 0xFFFF) >> 12).to(tl.float32) - 7.5) * 0.0625


@triton.jit
def step_size(wide, state, qmax, P: tl.constexpr, N: tl.constexpr):
    """Distance of neighbouring codes, ``[P, N]``."""
    per_state = tl.div_rn(state.to(tl.float32), tl.zeros((N,), tl.float32) + qmax)
    return wide[:, None] * per_state[None, :]


@triton.jit
def load_codes(pointer, BITS: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Codes ``[P, N]`` in fp32 from bytes, little end first."""
    p = tl.arange(0, P)[:, None]
    if BITS == 8:
        return tl.load(pointer + p * N + tl.arange(0, N)[None, :]).to(tl.int8, bitcast=True).to(tl.float32)
    else:
        byte = tl.load(pointer + p * (N // 2) + tl.arange(0, N // 2)[None, :]).to(tl.int32)
        low, high = ((byte & 15) ^ 8) - 8, ((byte >> 4) ^ 8) - 8
        return tl.reshape(tl.join(low, high), (P, N)).to(tl.float32)


@triton.jit
def store_codes(pointer, codes, BITS: tl.constexpr, P: tl.constexpr, N: tl.constexpr):
    """Inverse of :func:`load_codes`."""
    p = tl.arange(0, P)[:, None]
    whole = codes.to(tl.int32)
    if BITS == 8:
        tl.store(pointer + p * N + tl.arange(0, N)[None, :], (whole & 255).to(tl.uint8))
    else:
        low, high = tl.split(tl.reshape(whole, (P, N // 2, 2)))
        byte = (low & 15) | ((high & 15) << 4)
        tl.store(pointer + p * (N // 2) + tl.arange(0, N // 2)[None, :], byte.to(tl.uint8))


@triton.jit
def round_token(
    codes,
    channel,
    scale,
    fixed,
    window,
    rows,
    drive,
    decay,
    b,
    c,
    out,
    head,
    sequence,
    BITS: tl.constexpr,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
    KEPT: tl.constexpr,
):
    """One token of a head, rounded; with ``KEPT`` after the ``rows`` of its window, as the definition takes them in."""
    unit = sequence * HEADS + head
    p, n = tl.arange(0, P), tl.arange(0, N)
    shared = (sequence * (HEADS // SHARE) + head // SHARE) * N + n
    qmax = ((1 << (BITS - 1)) - 1) * 1.0
    calibrated = tl.zeros((P,), tl.float16)
    if FIXED % 3 == 1:
        calibrated = tl.load(fixed + head * P + p)  # fp16
        wide = calibrated.to(tl.float32)
    else:
        wide = tl.load(channel + unit * P + p).to(tl.float32)
    step = step_size(wide, tl.load(scale + unit * N + n), qmax, P, N)  # fp16
    place = codes + unit * (P * N * BITS // 8)
    u = load_codes(place, BITS, P, N) * step
    if KEPT:
        for _ in range(0, rows):
            x = tl.load(window + head * P + p).to(tl.float32)
            kept = window + HEADS * P + HEADS + head // SHARE * N + n
            driven = x[:, None] * tl.load(kept).to(tl.float32)[None, :]
            u = tl.load(window + HEADS * P + head).to(tl.float32) * u + driven
            window += HEADS * P + HEADS + HEADS // SHARE * N
    driven = tl.load(drive + unit * P + p).to(tl.float32)[:, None] * tl.load(b + shared).to(tl.float32)[None, :]
    u = tl.load(decay + unit).to(tl.float32) * u + driven
    tl.store(out + unit * P + p, tl.sum(u * tl.load(c + shared).to(tl.float32)[None, :], 1))
    found, new_channel, new_state, _ = quantize(u, calibrated, qmax, FIXED, P, N, LOG)
    store_codes(place, found, BITS, P, N)
    tl.store(scale + unit * N + n, new_state)
    if FIXED % 3 != 1:
        tl.store(channel + unit * P + p, new_channel)


@triton.jit
def dsq_update_kernel(
    codes,
    channel,
    scale,
    fixed,
    drive,
    decay,
    b,
    c,
    out,
    BITS: tl.constexpr,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
):
    """Program (head, sequence): one token; ``codes``, ``channel`` and ``scale`` are replaced."""
    sequence = tl.program_id(1).to(tl.int64)
    round_token(
        codes, channel, scale, fixed, scale, 0, drive, decay, b, c, out, tl.program_id(0), sequence,
        BITS, FIXED, HEADS, SHARE, P, N, LOG, False,
    )  # fmt: skip


@triton.jit
def dsq_pack_kernel(
    state,
    codes,
    channel,
    scale,
    fixed,
    BITS: tl.constexpr,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
):
    """Program (head, sequence): a float state, as prefill leaves it, to codes and scales."""
    unit = tl.program_id(1).to(tl.int64) * HEADS + tl.program_id(0)
    p, n = tl.arange(0, P), tl.arange(0, N)
    u = tl.load(state + unit * (P * N) + p[:, None] * N + n[None, :]).to(tl.float32)
    calibrated = tl.zeros((P,), tl.float16)
    if FIXED % 3 == 1:
        calibrated = tl.load(fixed + tl.program_id(0) * P + p)  # fp16
    qmax = ((1 << (BITS - 1)) - 1) * 1.0
    found, new_channel, new_state, _ = quantize(u, calibrated, qmax, FIXED, P, N, LOG)
    store_codes(codes + unit * (P * N * BITS // 8), found, BITS, P, N)
    tl.store(scale + unit * N + n, new_state)
    if FIXED % 3 != 1:
        tl.store(channel + unit * P + p, new_channel)


@triton.jit
def stored(
    u, calibrated, width, since, window, FIXED: tl.constexpr, P: tl.constexpr, N: tl.constexpr, LOG: tl.constexpr
):
    """What ``u`` becomes between two tokens: rounded where it is this token's turn and the head is not in float."""
    held = u
    if (since >= 0) & (since % window == 0) & (width < 16):
        qmax = ((1 << (width - 1)) - 1).to(tl.float32)
        found, _, _, step = quantize(u, calibrated, qmax, FIXED, P, N, LOG)
        held = found * step
    return held


@triton.jit
def dsq_scan_kernel(
    drive,
    decay,
    b,
    c,
    state,
    bits,
    fixed,
    out,
    last,
    kept,
    tokens,
    segments,
    first,
    window,
    KEEP: tl.constexpr,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Program (head, sequence) walks the tokens with its state in registers; keeps it every ``LENGTH`` tokens."""
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    unit = sequence * HEADS + head
    p, n = tl.arange(0, P), tl.arange(0, N)
    tile = p[:, None] * N + n[None, :]
    width = tl.load(bits + head)  # int32
    calibrated = tl.zeros((P,), tl.float16)
    if FIXED % 3 == 1:
        calibrated = tl.load(fixed + head * P + p)  # fp16
    held = tl.load(state + unit * (P * N) + tile).to(tl.float32)
    for t in range(0, tokens):
        if KEEP:
            if t % LENGTH == 0:
                tl.store(kept + (unit * segments + t // LENGTH) * (P * N) + tile, held)
        token = sequence * tokens + t
        shared = (token * GROUPS + head // (HEADS // GROUPS)) * N + n
        row = (token * HEADS + head) * P + p
        driven = tl.load(drive + row).to(tl.float32)[:, None] * tl.load(b + shared).to(tl.float32)[None, :]
        u = tl.load(decay + token * HEADS + head).to(tl.float32) * held + driven
        tl.store(out + row, tl.sum(u * tl.load(c + shared).to(tl.float32)[None, :], 1))
        held = stored(u, calibrated, width, t + 1 - first, window, FIXED, P, N, LOG)
    tl.store(last + unit * (P * N) + tile, held)


@triton.jit
def dsq_scan_backward_kernel(
    grad,
    drive,
    decay,
    b,
    c,
    kept,
    bits,
    fixed,
    scratch,
    d_drive,
    d_decay,
    d_b,
    d_c,
    tokens,
    segments,
    first,
    window,
    FIXED: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    LOG: tl.constexpr,
    LENGTH: tl.constexpr,
):
    """Program (head, sequence): per segment, from the last, recompute its states into ``scratch``, then walk back."""
    head = tl.program_id(0)
    sequence = tl.program_id(1).to(tl.int64)
    unit = sequence * HEADS + head
    p, n = tl.arange(0, P), tl.arange(0, N)
    tile = p[:, None] * N + n[None, :]
    width = tl.load(bits + head)  # int32
    calibrated = tl.zeros((P,), tl.float16)
    if FIXED % 3 == 1:
        calibrated = tl.load(fixed + head * P + p)  # fp16
    adjoint = tl.zeros((P, N), tl.float32)
    own = scratch + unit * (LENGTH * P * N) + tile
    for i in range(0, segments):
        start = (segments - 1 - i) * LENGTH
        stop = tl.minimum(start + LENGTH, tokens)
        held = tl.load(kept + (unit * segments + segments - 1 - i) * (P * N) + tile).to(tl.float32)
        for t in range(start, stop):
            tl.store(own + (t - start) * (P * N), held)
            token = sequence * tokens + t
            shared = (token * GROUPS + head // (HEADS // GROUPS)) * N + n
            row = (token * HEADS + head) * P + p
            driven = tl.load(drive + row).to(tl.float32)[:, None] * tl.load(b + shared).to(tl.float32)[None, :]
            u = tl.load(decay + token * HEADS + head).to(tl.float32) * held + driven
            held = stored(u, calibrated, width, t + 1 - first, window, FIXED, P, N, LOG)
        tl.debug_barrier()
        for back in range(0, stop - start):
            t = stop - 1 - back
            token = sequence * tokens + t
            shared = (token * GROUPS + head // (HEADS // GROUPS)) * N + n
            row = (token * HEADS + head) * P + p
            before = tl.load(own + (t - start) * (P * N)).to(tl.float32)
            x = tl.load(drive + row).to(tl.float32)
            shared_b = tl.load(b + shared).to(tl.float32)
            slope = tl.load(grad + row).to(tl.float32)
            keep = tl.load(decay + token * HEADS + head).to(tl.float32)
            u = keep * before + x[:, None] * shared_b[None, :]
            adjoint += slope[:, None] * tl.load(c + shared).to(tl.float32)[None, :]
            wide = (token * HEADS + head) * N + n
            tl.store(d_c + wide, tl.sum(slope[:, None] * u, 0))
            tl.store(d_drive + row, tl.sum(adjoint * shared_b[None, :], 1))
            tl.store(d_b + wide, tl.sum(adjoint * x[:, None], 0))
            tl.store(d_decay + token * HEADS + head, tl.sum(adjoint * before))
            adjoint *= keep
        tl.debug_barrier()


def verify(channels: int, states: int, bits: int | None = None) -> str | None:
    """Why the kernels decline, or None."""
    if bits not in (None, 4, 8):
        return f"{bits} bits"
    for size, name in ((channels, "P"), (states, "N")):
        if size & (size - 1) or not 8 <= size <= 256:
            return f"{name} = {size} is no power of two from 8 to 256"
    return None if channels * states <= 1 << 15 else f"a state of {channels} x {states} does not fit the registers"


def warps(channels: int, states: int) -> int:
    """Warps of a program, with 32 values per thread."""
    return max(1, min(16, channels * states // 1024))


def fixed_mode(fixed: Tensor | None, refit: bool, dither: bool) -> int:
    """The kernels' ``FIXED``."""
    if dither:
        return 3 if fixed is None else 4
    return 1 if fixed is not None else 2 if refit else 0


def pointer_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A pointer that is never followed where there is no tensor."""
    return other if tensor is None else tensor


def dsq_state_update(
    codes: Tensor,
    channel: Tensor | None,
    scale: Tensor,
    fixed: Tensor | None,
    drive: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    bits: int,
    refit: bool = False,
    dither: bool = False,
) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.state.dsq_state_update`; what is replaced must be contiguous."""
    sequences, heads, channels = drive.shape
    states = scale.shape[-1]
    drive, decay, b, c = (t.contiguous() for t in (drive, decay, b, c))
    out = torch.empty_like(drive)
    if sequences == 0:
        return out
    dsq_update_kernel[(heads, sequences)](
        codes, pointer_or(channel, scale), scale, pointer_or(fixed, scale), drive, decay, b, c, out,
        bits, fixed_mode(fixed, refit, dither), heads, heads // b.shape[1], channels, states, states.bit_length() - 1,
        num_warps=warps(channels, states), enable_fp_fusion=False,
    )  # fmt: skip
    return out


def dsq_pack(
    state: Tensor, fixed: Tensor | None, bits: int, refit: bool = False, dither: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Pack float states after prefill.

    Args:
        state: fp32, fp16 or bf16 ``[S, H, P, N]``.
        fixed: fp16 ``[H, P]`` calibrated channel scale, or None.
        bits: 4 or 8.
        refit: Fit the channel scale to the codes; no effect with ``fixed``.
        dither: Round after adding a dither; not together with ``refit``.

    Returns:
        uint8 codes ``[S, H, P, N * bits / 8]``; fp16 channel scale ``[S, H, P]``, None if calibrated; fp16 state scale
        ``[S, H, N]``.
    """
    sequences, heads, channels, states = state.shape
    codes = torch.empty((sequences, heads, channels, states * bits // 8), dtype=torch.uint8, device=state.device)
    scale = torch.empty((sequences, heads, states), dtype=torch.float16, device=state.device)
    channel = None if fixed is not None else scale.new_empty((sequences, heads, channels))
    if sequences > 0:
        dsq_pack_kernel[(heads, sequences)](
            state.contiguous(), codes, pointer_or(channel, scale), scale, pointer_or(fixed, scale),
            bits, fixed_mode(fixed, refit, dither), heads, channels, states, states.bit_length() - 1,
            num_warps=warps(channels, states), enable_fp_fusion=False,
        )  # fmt: skip
    return codes, channel, scale


def selective_scan_q(
    drive: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    bits: Tensor,
    fixed: Tensor | None,
    first: int,
    window: int,
    keep: bool,
    refit: bool = False,
    dither: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments and results as of the operator, :func:`llmcompress_kernels.reference.state.selective_scan_q`."""
    sequences, tokens, heads, channels = drive.shape
    states, segments = b.shape[-1], -(-tokens // SEGMENT)
    drive, decay, b, c, state = (t.contiguous() for t in (drive, decay, b, c, state))
    out, last = torch.empty_like(drive), torch.empty_like(state)
    kept = drive.new_empty((sequences, heads, segments, channels, states) if keep else (0,))
    dsq_scan_kernel[(heads, sequences)](
        drive, decay, b, c, state, bits.to(torch.int32).contiguous(), pointer_or(fixed, drive), out, last,
        kept if keep else last, tokens, segments, first, window,
        keep, fixed_mode(fixed, refit, dither), heads, b.shape[2], channels, states, states.bit_length() - 1, SEGMENT,
        num_warps=warps(channels, states), enable_fp_fusion=False,
    )  # fmt: skip
    return out, last, kept


def selective_scan_q_backward(
    grad: Tensor,
    drive: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    kept: Tensor,
    bits: Tensor,
    fixed: Tensor | None,
    first: int,
    window: int,
    refit: bool = False,
    dither: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Arguments and results as of :func:`llmcompress_kernels.reference.state.selective_scan_q_backward`."""
    sequences, tokens, heads, channels = drive.shape
    states, groups, segments = b.shape[-1], b.shape[2], kept.shape[2]
    grad, drive, decay, b, c, kept = (t.contiguous() for t in (grad, drive, decay, b, c, kept))
    scratch = drive.new_empty((sequences, heads, SEGMENT, channels, states))
    d_drive, d_decay = torch.empty_like(drive), torch.empty_like(decay)
    d_b = drive.new_empty((sequences, tokens, heads, states))
    d_c = torch.empty_like(d_b)
    dsq_scan_backward_kernel[(heads, sequences)](
        grad, drive, decay, b, c, kept, bits.to(torch.int32).contiguous(), pointer_or(fixed, drive), scratch,
        d_drive, d_decay, d_b, d_c, tokens, segments, first, window,
        fixed_mode(fixed, refit, dither), heads, groups, channels, states, states.bit_length() - 1, SEGMENT,
        num_warps=warps(channels, states), enable_fp_fusion=False,
    )  # fmt: skip
    share = (groups, heads // groups)
    return d_drive, d_decay, d_b.unflatten(2, share).sum(3), d_c.unflatten(2, share).sum(3)
