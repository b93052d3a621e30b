"""Decoupled Scale Quantization (DSQ) of recurrent states, its variants and the baselines to judge it by.

Q-Mamba (Chen et al., Findings of ACL 2025): the state of a selective state-space model has outliers along both of its
axes, so it gets one scale per channel and one per state. The paper's text was not at hand; the equations are those
of two public re-implementations that agree. Per sequence, layer and head, for the fresh state ``u [P, N]``:

    s_p = fp16(max((mean_n |u[p, n]|)^alpha, 2^-24))              channel scale, alpha = 1/2
    s_n = fp16(max(max_p |u[p, n]| / s_p, 2^-24))                 state scale
    q   = clamp(round_half_even(u / (s_p * (s_n / qmax))), -qmax, qmax),   qmax = 2^(bits-1) - 1
    û   = q * (s_p * (s_n / qmax))

With ``rounding: dither`` (ours) ``q = clamp(round_half_even(v + e_n))`` with ``v = (u (1 / s_p)) (1 / (s_n / qmax))``;
the bits of ``s_n`` give ``e_n`` (:func:`dither_of`); last product and sum are fused. On average an error then depends
on the state no more, so that a recurrence adds errors up as noise and not as a gain.

All arithmetic is fp32 in the order the parentheses give and the mean is summed in halves (:func:`folded_mean`), so that
kernels can be held to equal codes whatever their tiling. Ours:
``s_n`` is stored before the division by ``qmax``, because ``2^-24 / qmax`` is not an fp16 number; scales are
clamped to at most 65504; of the two dynamic scales nothing needs a guard against nearly dead channels, because
``|u| / s_p`` falls with ``|u|`` for every ``alpha < 1``. Calibrated scales do: see :func:`static_channel_scale`.

Legend: P channels (head dim), N states, H heads, ``...`` any leading axes (batch, heads). The state is ``[..., P, N]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from llmcompress_kernels.reference.state import LARGEST, SMALLEST, dither_of
from torch import Tensor

from llmcompress.quant.states import GROUP, StateSpec

# a calibrated channel scale is at least this share of the head's median
DEAD_CHANNEL = 1e-3


@dataclass(frozen=True, slots=True)
class QuantizedState:
    """Codes and scales of a state.

    Attributes:
        codes: int8 ``[..., P, N]`` in ``-qmax … qmax``.
        channel: fp16 ``[..., P]``; None where the codec has none or a calibrated one that is stored once.
        state: fp16 ``[..., N]`` before division by qmax; ``[..., P, N/32]`` for ``group32``, ``[..., 1]`` for
            ``per_head`` and ``rotate``; None where the codec has none or a calibrated one.
    """

    codes: Tensor
    channel: Tensor | None
    state: Tensor | None


def to_scale(value: Tensor) -> Tensor:
    """Round positive fp32 scales to fp16 within its range, kept away from zero."""
    return value.clamp(SMALLEST, LARGEST).to(torch.float16)


def qmax_of(bits: int | Tensor) -> float | Tensor:
    """Largest code; a tensor of widths per head gives fp32 ``[H, 1, 1]``."""
    if isinstance(bits, Tensor):
        return (2.0 ** (bits.to(torch.float32) - 1) - 1)[:, None, None]
    return float((1 << (bits - 1)) - 1)


def quantize(
    u: Tensor,
    spec: StateSpec,
    static: Tensor | None = None,
    noise: Tensor | None = None,
    head_bits: Tensor | None = None,
) -> QuantizedState:
    """Quantize a state.

    Args:
        u: ``[..., P, N]``; computed with in fp32.
        spec: How states are stored.
        static: fp16 calibrated scale, broadcast over leading axes: ``[H, P]`` for ``dsq_static_p``, ``[H, N]`` for
            ``dsq_t``.
        noise: fp32 in ``[0, 1)``, broadcast to ``u``; needed for stochastic rounding.
        head_bits: int ``[H]`` widths per head (the axis before P), instead of ``spec.bits``.

    Returns:
        Codes and the scales that are stored per state.
    """
    u = u.to(torch.float32)
    if spec.codec == "rotate":
        u = rotate(u)
    qmax = qmax_of(spec.bits if head_bits is None else head_bits)
    channel, state = _scales(u, spec, static)
    if spec.codec == "dsq_als":
        channel, state = _refitted(u, channel, state, spec.refits, qmax)
    if spec.rounding == "dither":
        codes = _dithered(u, channel, state, qmax)
    else:
        codes = _rounded(u, step_size(channel, state, qmax, u.shape[-1]), qmax, noise, spec.rounding)
    if spec.codec == "dsq_refit":
        assert channel is not None
        assert state is not None
        channel = refitted(u, codes.to(torch.float32), channel, _per_state(state, qmax))
    if spec.codec == "dsq_static_p":
        channel = None
    if spec.codec == "dsq_t":
        state = None
    return QuantizedState(codes, channel, state)


def dequantize(
    quantized: QuantizedState, spec: StateSpec, static: Tensor | None = None, head_bits: Tensor | None = None
) -> Tensor:
    """Inverse of :func:`quantize`, fp32 ``[..., P, N]``."""
    qmax = qmax_of(spec.bits if head_bits is None else head_bits)
    channel, state = quantized.channel, quantized.state
    if spec.codec == "dsq_static_p":
        channel = static
    if spec.codec == "dsq_t":
        state = static
    value = quantized.codes.to(torch.float32) * step_size(channel, state, qmax, quantized.codes.shape[-1])
    return rotate(value) if spec.codec == "rotate" else value


def fake_quantize(
    u: Tensor,
    spec: StateSpec,
    static: Tensor | None = None,
    noise: Tensor | None = None,
    head_bits: Tensor | None = None,
) -> Tensor:
    """What a state becomes by being stored: fp32 ``[..., P, N]``; ``u`` itself when the spec is inactive."""
    if not spec.active:
        return u
    return dequantize(quantize(u, spec, static, noise, head_bits), spec, static, head_bits)


def step_size(channel: Tensor | None, state: Tensor | None, qmax: float | Tensor, states: int) -> Tensor:
    """Distance of neighbouring codes, fp32, broadcastable to ``[..., P, N]``.

    Args:
        channel: fp16 ``[..., P]`` or None.
        state: fp16 ``[..., N]``, ``[..., 1]``, ``[..., P, N/32]`` or None.
        qmax: Largest code.
        states: N, to tell groups from single states.
    """
    if state is None:
        assert channel is not None
        return channel.to(torch.float32).unsqueeze(-1) / qmax
    if channel is None and state.shape[-1] not in (1, states):
        return (state.to(torch.float32) / qmax).repeat_interleave(GROUP, -1)[..., :states]
    step = state.to(torch.float32).unsqueeze(-2) / qmax
    return step if channel is None else channel.to(torch.float32).unsqueeze(-1) * step


def _scales(u: Tensor, spec: StateSpec, static: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Channel and state scales in fp16 before refits."""
    size = u.abs()
    if spec.codec in ("per_head", "rotate"):
        return None, to_scale(size.amax((-2, -1))).unsqueeze(-1)
    if spec.codec == "per_channel":
        return to_scale(size.amax(-1)), None
    if spec.codec == "per_state":
        return None, to_scale(size.amax(-2))
    if spec.codec == "group32":
        padded = torch.nn.functional.pad(size, (0, -u.shape[-1] % GROUP))
        groups = to_scale(padded.unflatten(-1, (-1, GROUP)).amax(-1))
        # one group per channel is a scale per channel
        return (groups[..., 0], None) if groups.shape[-1] == 1 else (None, groups)
    if spec.codec == "dsq_static_p":
        assert static is not None, "dsq_static_p needs a calibrated channel scale"
        return static, to_scale((size / static.to(torch.float32).unsqueeze(-1)).amax(-2))
    if spec.codec == "dsq_t":
        assert static is not None, "dsq_t needs a calibrated state scale"
        return to_scale((size / static.to(torch.float32).unsqueeze(-2)).amax(-1)), static
    if spec.sqrt_axis == "state":
        state = to_scale(_power(folded_mean(size, -2), spec.alpha))
        return to_scale((size / state.to(torch.float32).unsqueeze(-2)).amax(-1)), state
    # s_p and then s_n of the head of this file
    channel = to_scale(_power(folded_mean(size, -1), spec.alpha))
    return channel, to_scale((size / channel.to(torch.float32).unsqueeze(-1)).amax(-2))


def folded_mean(values: Tensor, axis: int) -> Tensor:
    """Mean along an axis, summed in a fixed order: the second half is added to the first until one value is left.

    SIMD registers and ``tl.reshape`` with sums of two elements can follow that order exactly.

    Args:
        values: fp32; the axis is padded with zeros to a power of two.
        axis: -1 or -2.
    """
    count = values.shape[axis]
    return _folded_sum(values if axis == -1 else values.transpose(-1, -2)) / count


def _folded_sum(total: Tensor) -> Tensor:
    """Sum along the last axis in the order of :func:`folded_mean`."""
    count = total.shape[-1]
    width = 1 << (count - 1).bit_length()
    if width != count:
        total = torch.nn.functional.pad(total, (0, width - count))
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total[..., 0]


def _power(mean: Tensor, alpha: float) -> Tensor:
    # through float64 the square root is exactly rounded; torch's in fp32 may be off by its last bit, as pow always may
    return mean.double().sqrt().to(mean.dtype) if alpha == 0.5 else mean.pow(alpha)


def _rounded(u: Tensor, step: Tensor, qmax: float | Tensor, noise: Tensor | None, rounding: str) -> Tensor:
    value = u / step
    if rounding == "stochastic":
        assert noise is not None, "stochastic rounding needs noise"
        value = (value + noise).floor()
    else:
        value = value.round()
    return _codes(value, qmax)


def _dithered(u: Tensor, channel: Tensor | None, state: Tensor | None, qmax: float | Tensor) -> Tensor:
    """Codes after adding the dither, of products with reciprocals: a kernel needs no division then."""
    assert channel is not None
    assert state is not None
    per_state = _per_state(state, qmax)
    part = u * (1 / channel.to(torch.float32)).unsqueeze(-1)
    # fused by way of float64: exact wherever a value is not far below half a step, where the code is zero anyway
    value = part.double() * (1 / per_state).double().unsqueeze(-2) + dither_of(state).double().unsqueeze(-2)
    return _codes(value.to(torch.float32).round(), qmax)


def _codes(value: Tensor, qmax: float | Tensor) -> Tensor:
    """Whole numbers within range, int8."""
    if isinstance(qmax, Tensor):
        return torch.minimum(torch.maximum(value, -qmax), qmax).to(torch.int8)
    return value.clamp(-qmax, qmax).to(torch.int8)


def _refitted(
    u: Tensor, channel: Tensor | None, state: Tensor | None, passes: int, qmax: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Alternating least squares: with codes fixed, the best state scale, then the best channel scale."""
    assert channel is not None
    assert state is not None
    for _ in range(passes):
        codes = _rounded(u, step_size(channel, state, qmax, u.shape[-1]), qmax, None, "rtn").to(torch.float32)
        basis = codes * channel.to(torch.float32).unsqueeze(-1) / qmax
        state = _least_squares(basis, u, -2, state)
        codes = _rounded(u, step_size(channel, state, qmax, u.shape[-1]), qmax, None, "rtn").to(torch.float32)
        basis = codes * (state.to(torch.float32).unsqueeze(-2) / qmax)
        channel = _least_squares(basis, u, -1, channel)
    return channel, state


def refitted(u: Tensor, codes: Tensor, channel: Tensor, per_state: Tensor) -> Tensor:
    """Channel scale of ``dsq_refit``: the least-squares fit to the codes of a row, in units of a step.

    ``channel' = fp16(channel Σ_n code v / Σ_n code²)``, ``v = (u (1 / channel)) (1 / (s_n / qmax))``. Rounding to
    nearest leaves a state a little longer than it was, and a recurrence multiplies that by itself at every token; the
    fit takes most of it out of each row (``scripts/measure_state_rounding.py``).

    Args:
        u: fp32 ``[..., P, N]``.
        codes: fp32, as ``u``.
        channel: fp16 ``[..., P]`` with which the codes were made.
        per_state: fp32 ``[..., N]``, ``s_n / qmax``.
    """
    wide = channel.to(torch.float32)
    value = (u * (1 / wide).unsqueeze(-1)) * (1 / per_state).unsqueeze(-2)
    top, below = _folded_sum(codes * value), _folded_sum(codes * codes)
    return to_scale(wide * torch.where((top > 0) & (below > 0), top / below, 1.0))


def _per_state(state: Tensor, qmax: float | Tensor) -> Tensor:
    """``s_n / qmax``, fp32 ``[..., N]``."""
    return (state.to(torch.float32).unsqueeze(-2) / qmax).squeeze(-2)


def _least_squares(basis: Tensor, target: Tensor, axis: int, before: Tensor) -> Tensor:
    energy = basis.square().sum(axis)
    fitted = (basis * target).sum(axis) / energy.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where((energy > 0) & (fitted > 0), to_scale(fitted), before)


def rotate(u: Tensor) -> Tensor:
    """Orthonormal Hadamard transform of both axes, its own inverse. Axes that are no powers of two stay as they are."""
    for axis in (-1, -2):
        size = u.shape[axis]
        if size & (size - 1) == 0:
            matrix = hadamard(size, u.device)
            u = u @ matrix if axis == -1 else matrix @ u
    return u


def hadamard(size: int, device: torch.device | None = None) -> Tensor:
    """Symmetric orthonormal Hadamard matrix (Sylvester), fp32 ``[size, size]``."""
    matrix = torch.ones(1, 1, device=device)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(size)


def static_channel_scale(mean_abs: Tensor, alpha: float = 0.5) -> Tensor:
    """Calibrated scale of ``dsq_static_p``.

    A channel that was silent in calibration and is not later would blow up every state scale, hence the floor.

    Args:
        mean_abs: fp32 ``[H, P]`` mean of ``|u|`` over tokens and states.
        alpha: Exponent.

    Returns:
        fp16 ``[H, P]``.
    """
    scale = _power(mean_abs.to(torch.float32), alpha)
    return to_scale(torch.maximum(scale, DEAD_CHANNEL * scale.median(-1, keepdim=True).values))


def static_state_scale(log_max: Tensor) -> Tensor:
    """Calibrated scale of ``dsq_t``: the geometric-mean fit of the state axis.

    Args:
        log_max: fp32 ``[H, P, N]`` logarithm of the largest ``|u|`` over tokens.

    Returns:
        fp16 ``[H, N]``, relative: the mean of its logarithm is zero.
    """
    centred = log_max - log_max.mean(-1, keepdim=True)
    return to_scale(centred.mean(-2).exp())


def rounding_noise(shape: tuple[int, ...], seed: int, layer: int, step: int) -> Tensor:
    """Noise of stochastic rounding: equal for equal arguments, whatever was rounded before.

    Args:
        shape: ``(H, P, N)``: sequences of a batch share it, so that batching changes nothing.
        seed: Seed of the run.
        layer: Index of the layer.
        step: Tokens seen so far.
    """
    mixed = (seed * 1_000_003 + layer) * 2_147_483_647 + step
    return torch.rand(shape, generator=torch.Generator().manual_seed(mixed % (1 << 63)))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes along the last axis, little end first, as two's complement.

    4 bits: two per byte; 6 bits: four in three bytes; 8 bits: one per byte. The axis is padded with zeros.

    Args:
        codes: int8 ``[..., N]``.
        bits: 4, 6 or 8.

    Returns:
        uint8 ``[..., packed_length(N, bits)]``.
    """
    raw = codes.view(torch.uint8)
    if bits == 8:
        return raw.contiguous()
    per = 2 if bits == 4 else 4
    raw = torch.nn.functional.pad(raw & ((1 << bits) - 1), (0, -codes.shape[-1] % per)).unflatten(-1, (-1, per))
    if bits == 4:
        return raw[..., 0] | raw[..., 1] << 4
    first, second, third, fourth = raw.unbind(-1)
    packed = (first | second << 6, second >> 2 | third << 4, third >> 4 | fourth << 2)
    return torch.stack(packed, -1).flatten(-2)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """Inverse of :func:`pack_codes`: int8 ``[..., count]``."""
    if bits == 8:
        return packed.view(torch.int8)
    if bits == 4:
        raw = torch.stack((packed << 4, packed & 0xF0), -1).flatten(-2)[..., :count]
        return raw.view(torch.int8) >> 4
    first, second, third = packed.unflatten(-1, (-1, 3)).unbind(-1)
    # the six bits go to the top of the byte, so that the shift back carries the sign
    parts = (first << 2, (first >> 6 | second << 2) << 2, (second >> 4 | third << 4) << 2, third & 0xFC)
    return torch.stack(parts, -1).flatten(-2)[..., :count].contiguous().view(torch.int8) >> 2
