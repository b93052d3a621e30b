"""A prompt through a Mamba-2 mixer between its projections, in Triton: the chunked form of the state-space duality.

Within a chunk of L tokens the recurrence is a product of matrices (Dao and Gu, "Transformers are SSMs", section 6):
``Y = (C Bᵀ ∘ M) X + exp(cum) C hᵀ`` with ``M[i, j] = dt_j exp(cum_i - cum_j)`` for ``i >= j``, where ``cum`` sums
``dt A`` and ``h`` is the state before the chunk; then ``h = exp(cum_L) h + (dt exp(cum_L - cum) B)ᵀ X``. One kernel
walks the chunks of a head with the state in registers and leaves each chunk what it begins with; chunks then read side
by side. Both in one, a state that stays in registers while its chunk is read, takes more registers than there are.

Decays stay logarithms until they are needed. ``cum`` is summed in fp64, L values, and kept as a multiple of 1/256,
which fp32 holds exactly, and a rest: differences within a chunk then lose nothing, whether a token forgets everything
or a head remembers a hundred thousand of them. Sums and states are fp32. The tensor cores take bf16 for bf16
activations, tf32 for fp16, which holds all its bits without its range, and three tf32 products for fp32. What a chunk
begins with is kept in bf16 for bf16 activations, H P N values a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.group_gemm import TYPES, store_type
from llmcompress_kernels.triton.mixer import WIDEST, mixer_output_kernel, silu, softplus
from llmcompress_kernels.triton.tuning import interpreted, power_of_two

# channels and tokens of a program of the convolution
BLOCK, TOKENS = 128, 16
# logarithm of a decay that is nothing in fp32, and still exact as a multiple of 1/256 after 256 tokens
LEAST = tl.constexpr(-256.0)


@triton.jit
def prompt_inputs_kernel(
    projected,
    history,
    conv_weight,
    conv_bias,
    mixed,
    row,
    tokens,
    inner,
    channels,
    WIDTH: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
):
    """Program (tile of channels, tile of tokens, sequence): causal convolution and SiLU into ``mixed [S, T, C]``."""
    s = tl.program_id(2).to(tl.int64)
    r = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    t = tl.program_id(1) * STEP + tl.arange(0, STEP)
    inside = (r < channels)[None, :]
    total = tl.zeros((STEP, BLOCK), tl.float32)
    for k in tl.static_range(WIDTH):
        at = t + (k - WIDTH + 1)
        there = ((at >= 0) & (at < tokens))[:, None] & inside
        place = projected + (s * tokens + at)[:, None] * row + inner + r[None, :]
        tap = tl.load(place, mask=there, other=0.0).to(tl.float32)
        if HAS_HISTORY:
            before = history + (s * channels + r)[None, :] * WIDTH + (at + WIDTH)[:, None]
            tap += tl.load(before, mask=(at < 0)[:, None] & inside, other=0.0).to(tl.float32)
        total += tap * tl.load(conv_weight + r * WIDTH + k, mask=r < channels, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        total += tl.load(conv_bias + r, mask=r < channels, other=0.0).to(tl.float32)[None, :]
    target = mixed + (s * tokens + t)[:, None] * channels + r[None, :]
    tl.store(target, silu(total).to(mixed.dtype.element_ty), mask=(t < tokens)[:, None] & inside)


@triton.jit
def time_steps(dt, dt_bias, row, inside, dt_row, low, high, head):
    """Time steps ``[L]`` in fp32, 0 for tokens that are not there."""
    step = tl.load(dt + row * dt_row + head, mask=inside, other=0.0).to(tl.float32)
    step = softplus(step + tl.load(dt_bias + head).to(tl.float32))
    return tl.where(inside, tl.minimum(tl.maximum(step, low), high), 0.0)


@triton.jit
def in_two(v):
    """fp64 to a multiple of 1/256 and a rest, both fp32."""
    coarse = tl.floor(v * 256.0) * 0.00390625
    return coarse.to(tl.float32), (v - coarse).to(tl.float32)


@triton.jit
def prompt_states_kernel(
    mixed,
    dt,
    dt_bias,
    a,
    state,
    states,
    dt_row,
    tokens,
    channels,
    chunks,
    low,
    high,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    L: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of a head's channels, sequence) walks the chunks with the state in registers.

    ``states [S, chunks, H, N, P]`` gets what each chunk of ``L`` tokens begins with, ``state [S, H, P, N]`` its end.
    """
    TILES: tl.constexpr = P // ROWS
    head, s = tl.program_id(0) // TILES, tl.program_id(1).to(tl.int64)
    p = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS)
    n, i = tl.arange(0, N), tl.arange(0, L)
    place = state + (s * HEADS + head) * (P * N) + p[None, :] * N + n[:, None]
    held = tl.load(place)  # fp32
    rate = tl.load(a + head).to(tl.float32)
    for chunk in range(0, chunks):
        target = states + ((s * chunks + chunk) * HEADS + head) * (P * N) + n[:, None] * P + p[None, :]
        tl.store(target, held.to(states.dtype.element_ty))
        t = chunk * L + i
        inside, row = t < tokens, s * tokens + t
        step = time_steps(dt, dt_bias, row, inside, dt_row, low, high, head)
        tokens_of = mixed + row[:, None] * channels
        x = tl.load(tokens_of + head * P + p[None, :], mask=inside[:, None], other=0.0).to(COMPUTE)
        shared = HEADS * P + head // SHARE * N + n[None, :]
        b = tl.load(tokens_of + shared, mask=inside[:, None], other=0.0).to(tl.float32)
        logs = tl.maximum(step * rate, LEAST).to(tl.float64)
        coarse, fine = in_two(tl.cumsum(logs, 0))
        end_coarse, end_fine = in_two(tl.sum(logs, 0))
        left = step * tl.exp((end_coarse - coarse) + (end_fine - fine))
        driving = tl.trans((b * left[:, None]).to(COMPUTE))
        held = tl.dot(driving, x, held * tl.exp(end_coarse + end_fine), input_precision=PRECISION)
    tl.store(place, held)


@triton.jit
def prompt_read_kernel(
    mixed,
    dt,
    dt_bias,
    a,
    d,
    states,
    y,
    dt_row,
    tokens,
    channels,
    chunks,
    low,
    high,
    HEADS: tl.constexpr,
    SHARE: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    ROWS: tl.constexpr,
    L: tl.constexpr,
    PART: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile of a head's channels, chunk, sequence): ``y [S, T, I]`` of a chunk's tokens, with the skip.

    ``PART`` states are multiplied at a time.
    """
    TILES: tl.constexpr = P // ROWS
    head, chunk, s = tl.program_id(0) // TILES, tl.program_id(1), tl.program_id(2).to(tl.int64)
    p, i = tl.program_id(0) % TILES * ROWS + tl.arange(0, ROWS), tl.arange(0, L)
    t = chunk * L + i
    inside, row = t < tokens, s * tokens + t
    tokens_of = mixed + row[:, None] * channels
    unit = ((s * chunks + chunk) * HEADS + head) * (P * N)
    weights, out = tl.zeros((L, L), tl.float32), tl.zeros((L, ROWS), tl.float32)
    for first in range(0, N, PART):
        n = first + tl.arange(0, PART)
        shared = tokens_of + HEADS * P + head // SHARE * N + n[None, :]
        c = tl.load(shared + HEADS // SHARE * N, mask=inside[:, None], other=0.0).to(COMPUTE)
        b = tl.load(shared, mask=inside[:, None], other=0.0).to(COMPUTE)
        weights = tl.dot(c, tl.trans(b), weights, input_precision=PRECISION)
        begin = tl.load(states + unit + n[:, None] * P + p[None, :]).to(COMPUTE)
        out = tl.dot(c, begin, out, input_precision=PRECISION)
    step = time_steps(dt, dt_bias, row, inside, dt_row, low, high, head)
    logs = tl.maximum(step * tl.load(a + head).to(tl.float32), LEAST).to(tl.float64)
    coarse, fine = in_two(tl.cumsum(logs, 0))
    # the later token's logarithm is the lower one; what is above the diagonal is left out
    between = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
    weights *= tl.exp(tl.minimum(between, 0.0)) * step[None, :]
    weights = tl.where(i[:, None] >= i[None, :], weights, 0.0)
    out *= tl.exp(coarse + fine)[:, None]
    x = tl.load(tokens_of + head * P + p[None, :], mask=inside[:, None], other=0.0).to(COMPUTE)
    out = tl.dot(weights.to(COMPUTE), x, out, input_precision=PRECISION)
    out += tl.load(d + head).to(tl.float32) * x.to(tl.float32)
    target = y + row[:, None] * (HEADS * P) + head * P + p[None, :]
    tl.store(target, out.to(y.dtype.element_ty), mask=inside[:, None])


def declines(heads: int, channels: int, states: int, groups: int, dtype: torch.dtype) -> str | None:
    """Why a mixer of these sizes is not taken, or None."""
    if channels % 16 or states & (states - 1) or not 16 <= states <= 256:
        return f"a state of {channels} x {states}"
    if heads % groups or heads * channels // groups > WIDEST:
        return f"{heads} heads of {channels} channels in {groups} groups"
    return None if dtype in TYPES else f"activations of {dtype}"


def verify(
    projected: Tensor, dt: Tensor, conv: Tensor | None, weights: tuple[Tensor | None, ...], state: Tensor, groups: int
) -> str | None:
    """Why :func:`mamba2_prefill` declines, or None; ``weights`` as its arguments from ``conv_weight`` to ``gain``."""
    operands = [t for t in (projected, dt, conv, *weights) if t is not None]
    if any(t.dtype not in TYPES for t in operands) or state.dtype != torch.float32:
        return "operands that are not floats, or a state that is not float32"
    if not state.is_contiguous() or not all(t.is_contiguous() for t in weights if t is not None):
        return "a state or weights that are not contiguous"
    width = operands[3 if conv is not None else 2].shape[-1]
    if power_of_two(width) != width:
        return f"a convolution of width {width}"
    return declines(*state.shape[1:], groups, projected.dtype)  # type: ignore[call-arg]


@dataclass(frozen=True, slots=True)
class Launch:
    """How a prompt's two kernels are launched.

    Attributes:
        tokens: L, of a chunk.
        channels: Channels of a head, per program that reads.
        part: States that it multiplies at a time.
        warps: Warps of such a program.
        walked: Channels of a head per program that walks.
        walking: Its warps.
    """

    tokens: int
    channels: int
    part: int
    warps: int
    walked: int
    walking: int


def launch(channels: int, states: int, dtype: torch.dtype) -> Launch:
    """Chunks that fill an instruction of the tensor cores; smaller ones where splitting fp32 takes the registers."""
    if interpreted():
        return Launch(16, 16, 16, 1, 16, 1)
    widest = lambda most: next(r for r in (64, 32, 16) if channels % r == 0 and r <= most)  # noqa: E731
    if dtype == torch.bfloat16:
        return Launch(64, widest(64), 128, 4, widest(32 if states <= 128 else 16), 4)
    return Launch(32, widest(32), 32, 4, widest(16), 4)


def mamba2_prefill(
    projected: Tensor,
    dt: Tensor,
    conv: Tensor | None,
    weights: tuple[Any, ...],
    state: Tensor,
    groups: int,
    limits: tuple[float, float],
    epsilon: float,
    chosen: Launch | None = None,
) -> Tensor:
    """A prompt through a mixer; arguments as in :func:`llmcompress_kernels.state.mamba2_prefill`.

    Args:
        projected: There; fp32, bf16 or fp16.
        dt: There.
        conv: There.
        weights: ``conv_weight``, ``conv_bias``, ``dt_bias``, ``a``, ``d``, ``gain``.
        state: There; replaced.
        groups: There.
        limits: There.
        epsilon: There.
        chosen: See :func:`launch`.

    Returns:
        ``[S, T, I]`` in the type of ``projected``. Between the kernels values have that type as well.
    """
    conv_weight, conv_bias, dt_bias, a, d, gain = weights
    sequences, heads, channels, states = state.shape
    tokens, inner, width = projected.shape[1], heads * channels, heads * channels + 2 * groups * states
    out = projected.new_empty(sequences, tokens, inner)
    if out.numel() == 0:
        return out
    # sequences follow each other as tokens do
    projected, dt = (t if _even(t) else t.contiguous() for t in (projected, dt))
    kind = store_type(projected.dtype)
    mixed = torch.empty((sequences, tokens, width), dtype=kind, device=state.device)
    prompt_inputs_kernel[(-(-width // BLOCK), -(-tokens // TOKENS), sequences)](
        projected, projected if conv is None else conv.contiguous(), conv_weight,
        conv_weight if conv_bias is None else conv_bias, mixed, projected.stride(1), tokens, inner, width,
        conv_weight.shape[-1], conv is not None, conv_bias is not None, BLOCK, TOKENS,
    )  # fmt: skip
    chosen = chosen or launch(channels, states, projected.dtype)
    y = _scan(mixed, dt, (dt_bias, a, d), state, groups, limits, chosen)
    size = inner // groups
    mixer_output_kernel[(sequences * tokens, groups)](
        y, y, projected, d, gain, out, projected.stride(1), inner, size, epsilon, channels, False, power_of_two(size),
        False, num_warps=min(16, power_of_two(max(1, size // 512))),
    )  # fmt: skip
    return out


def _even(t: Tensor) -> bool:
    return t.stride(-1) == 1 and (t.shape[0] == 1 or t.stride(0) == t.shape[1] * t.stride(1))


def _scan(
    mixed: Tensor,
    dt: Tensor,
    weights: tuple[Tensor, Tensor, Tensor],
    state: Tensor,
    groups: int,
    limits: tuple[float, float],
    chosen: Launch,
) -> Tensor:
    """``y [S, T, I]`` with the skip; the state is replaced."""
    sequences, heads, channels, states = state.shape
    tokens, width = mixed.shape[1:]
    chunks = -(-tokens // chosen.tokens)
    half = mixed.dtype == torch.bfloat16
    begins = torch.empty(
        (sequences, chunks, heads, states, channels), dtype=mixed.dtype if half else torch.float32, device=mixed.device
    )
    y = mixed.new_empty(sequences, tokens, heads * channels)
    dt_bias, a, d = weights
    sizes = (dt.stride(1), tokens, width, chunks, *limits, heads, heads // groups, channels, states)
    compute = (tl.bfloat16 if half else tl.float32, "tf32x3" if mixed.dtype == torch.float32 else "tf32")
    prompt_states_kernel[(heads * (channels // chosen.walked), sequences)](
        mixed, dt, dt_bias, a, state, begins, *sizes, chosen.walked, chosen.tokens, *compute, num_warps=chosen.walking
    )
    prompt_read_kernel[(heads * (channels // chosen.channels), chunks, sequences)](
        mixed,
        dt,
        dt_bias,
        a,
        d,
        begins,
        y,
        *sizes,
        chosen.channels,
        chosen.tokens,
        min(chosen.part, states),
        *compute,
        num_warps=chosen.warps,
    )
    return y
