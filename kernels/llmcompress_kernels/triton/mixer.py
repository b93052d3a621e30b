"""What surrounds the state update of a Mamba-2 mixer for one token, and that update with a state in floats, in Triton.

``mixer_inputs_kernel`` is the convolution with its state, SiLU, and time steps to drive and decay;
``mixer_output_kernel`` is the skip, the gate and the norm. With the update between them a mixer takes three launches
between its projections, where PyTorch takes some thirty. All arithmetic is fp32 whatever the operands are stored in.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.tuning import power_of_two

# channels and warps of a program of the convolution
BLOCK, WARPS = 256, 4
# rows of a float state per program
ROWS = 16
# widest group that a program normalizes at once
WIDEST = 16384
FLOATS = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def silu(v):
    """``v / (1 + exp(-v))`` in fp32."""
    return v / (1.0 + tl.exp(-v))


@triton.jit
def mixer_inputs_kernel(
    projected,
    conv,
    conv_weight,
    conv_bias,
    dt_bias,
    a,
    x,
    drive,
    decay,
    b,
    c,
    row,
    inner,
    both,
    heads,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (tile of the convolution's channels, sequence); a row of ``projected`` is gate, channels, time steps."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    s = tl.program_id(1).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    channels = inner + 2 * both
    inside = r < channels
    new = tl.load(projected + s * row + inner + r, mask=inside, other=0.0).to(tl.float32)
    total = new * tl.load(conv_weight + r * WIDTH + WIDTH - 1, mask=inside, other=0.0).to(tl.float32)
    w = tl.arange(0, WIDTH)
    # the oldest input falls out, every other one moves up a place
    kept = inside[:, None] & (w > 0)[None, :]
    place = (s * channels + r)[:, None] * WIDTH + w[None, :]
    taps = tl.load(conv + place, mask=kept, other=0.0).to(tl.float32)
    weights = tl.load(conv_weight + r[:, None] * WIDTH + w[None, :] - 1, mask=kept, other=0.0).to(tl.float32)
    total += tl.sum(taps * weights, 1)
    tl.debug_barrier()  # what one thread reads another may store
    tl.store(conv + place - 1, taps.to(conv.dtype.element_ty), mask=kept)
    tl.store(conv + (s * channels + r) * WIDTH + WIDTH - 1, new.to(conv.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        total += tl.load(conv_bias + r, mask=inside, other=0.0).to(tl.float32)
    mixed = silu(total)
    own = r < inner
    head = r // CHANNELS
    step = tl.load(projected + s * row + inner + channels + head, mask=own, other=0.0).to(tl.float32)
    step += tl.load(dt_bias + head, mask=own, other=0.0).to(tl.float32)
    step = softplus(step)
    tl.store(x + s * inner + r, mixed, mask=own)
    tl.store(drive + s * inner + r, step * mixed, mask=own)
    rate = tl.load(a + head, mask=own, other=0.0).to(tl.float32)
    tl.store(decay + s * heads + head, tl.exp(step * rate), mask=own & (r % CHANNELS == 0))
    tl.store(b + s * both + r - inner, mixed, mask=(r >= inner) & (r < inner + both))
    tl.store(c + s * both + r - inner - both, mixed, mask=(r >= inner + both) & inside)


@triton.jit
def softplus(v):
    """As PyTorch's, which is the identity above 20; ``log(1 + exp(v))`` loses what lies below 2^-24."""
    return tl.where(v > 20.0, v, tl.maximum(v, 0.0) + log1p(tl.exp(-tl.abs(v))))


@triton.jit
def log1p(v):
    """``log(1 + v)`` for 0 <= v <= 1, as exact where v is small: the rounding of ``1 + v`` is taken back."""
    u = 1.0 + v
    return tl.where(u == 1.0, v, tl.log(u) * (v / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def mixer_output_kernel(
    y,
    x,
    projected,
    d,
    gain,
    out,
    row,
    inner,
    width,
    epsilon,
    CHANNELS: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    """Program (token, group): ``RMSNorm((y + d x) silu(gate)) gain`` over ``width`` channels; ``d x`` with ``SKIP``."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    s = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    r = tl.program_id(1) * width + i
    value = tl.load(y + s * inner + r, mask=inside, other=0.0).to(tl.float32)
    if SKIP:
        skip = tl.load(d + r // CHANNELS, mask=inside, other=0.0).to(tl.float32)
        value += skip * tl.load(x + s * inner + r, mask=inside, other=0.0).to(tl.float32)
    value *= silu(tl.load(projected + s * row + r, mask=inside, other=0.0).to(tl.float32))
    value *= tl.rsqrt(tl.sum(value * value, 0) / width + epsilon)
    value *= tl.load(gain + r, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + s * inner + r, value.to(out.dtype.element_ty), mask=inside)


@triton.jit
def state_update_kernel(
    state,
    drive,
    decay,
    b,
    c,
    out,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program (tile of channels, head, sequence): one token with a float state, read and written once."""
    s = tl.program_id(2).to(tl.int64)
    unit = s * HEADS + tl.program_id(1)
    p, n = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, N)
    place = state + unit * (P * N) + p[:, None] * N + n[None, :]
    shared = (s * (HEADS // SHARE) + tl.program_id(1) // SHARE) * N + n
    driven = tl.load(drive + unit * P + p).to(tl.float32)[:, None] * tl.load(b + shared).to(tl.float32)[None, :]
    u = tl.load(decay + unit).to(tl.float32) * tl.load(place).to(tl.float32) + driven
    tl.store(out + unit * P + p, tl.sum(u * tl.load(c + shared).to(tl.float32)[None, :], 1))
    tl.store(place, u.to(state.dtype.element_ty))


def verify_update(state: Tensor, *operands: Tensor) -> str | None:
    """Why :func:`state_update` declines, or None."""
    channels, states = state.shape[-2:]
    if channels % ROWS or states & (states - 1) or not 8 <= states <= 256:
        return f"a state of {channels} x {states}"
    if state.dtype not in FLOATS or any(t.dtype != torch.float32 for t in operands):
        return f"a state of {state.dtype}, or operands that are not float32"
    return None if state.is_contiguous() else "a state that is not contiguous"


def state_update(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.state.state_update`; the state may be fp16 or bf16 as well."""
    sequences, heads, channels, states = state.shape
    drive, decay, b, c = (t.contiguous() for t in (drive, decay, b, c))
    out = torch.empty_like(drive)
    if sequences > 0:
        state_update_kernel[(channels // ROWS, heads, sequences)](
            state, drive, decay, b, c, out, heads, heads // b.shape[1], channels, states, ROWS
        )
    return out


def verify(projected: Tensor, conv: Tensor, weights: tuple[Tensor | None, ...], groups: int) -> str | None:
    """Why :func:`mamba2_decode` declines, or None; ``weights`` as its arguments from ``conv_weight`` to ``gain``."""
    gain = weights[-1]
    assert gain is not None
    if gain.shape[0] // groups > WIDEST or power_of_two(conv.shape[-1]) != conv.shape[-1]:
        return f"groups of {gain.shape[0] // groups} channels, a convolution of width {conv.shape[-1]}"
    if any(t.dtype not in FLOATS for t in (projected, conv, *weights) if t is not None):
        return "operands that are not floats"
    plain = all(t.is_contiguous() for t in (conv, *weights) if t is not None)
    return None if plain and projected.stride(-1) == 1 else "operands that are not contiguous"


def mamba2_decode(
    projected: Tensor,
    conv: Tensor,
    weights: tuple[Any, ...],
    groups: int,
    states: int,
    epsilon: float,
    update: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    early: bool = False,
) -> Tensor:
    """One token of a mixer; arguments as in :func:`llmcompress_kernels.state.mamba2_decode`.

    Args:
        projected: There.
        conv: There; replaced.
        weights: ``conv_weight``, ``conv_bias``, ``dt_bias``, ``a``, ``d``, ``gain``.
        groups: There.
        states: There.
        epsilon: There.
        update: drive ``[S, H, P]``, decay ``[S, H]``, B and C ``[S, G, N]``, all fp32, to what is read out; it
            replaces the state.
        early: Start both launches while the one in front still runs (compute capability 9.0); for benches.

    Returns:
        ``[S, I]`` in the type of ``projected``.
    """
    conv_weight, conv_bias, dt_bias, a, d, gain = weights
    sequences, heads, inner, both = projected.shape[0], d.shape[0], gain.shape[0], groups * states
    out = projected.new_empty(sequences, inner)
    if sequences == 0:
        return out
    channels, row = inner // heads, projected.stride(0)
    launch = {"launch_pdl": True} if early else {}
    fresh = lambda *shape: torch.empty(shape, dtype=torch.float32, device=projected.device)  # noqa: E731
    x, drive = fresh(sequences, heads, channels), fresh(sequences, heads, channels)
    decay, b, c = fresh(sequences, heads), fresh(sequences, groups, states), fresh(sequences, groups, states)
    mixer_inputs_kernel[(-(-(inner + 2 * both) // BLOCK), sequences)](
        projected, conv, conv_weight, conv_weight if conv_bias is None else conv_bias, dt_bias, a,
        x, drive, decay, b, c, row, inner, both, heads,
        channels, conv.shape[-1], conv_bias is not None, BLOCK, early, num_warps=WARPS, **launch,
    )  # fmt: skip
    y = update(drive, decay, b, c)
    width = inner // groups
    mixer_output_kernel[(sequences, groups)](
        y, x, projected, d, gain, out, row, inner, width, epsilon, channels, True, power_of_two(width), early,
        num_warps=min(16, power_of_two(max(1, width // 512))), **launch,
    )  # fmt: skip
    return out
