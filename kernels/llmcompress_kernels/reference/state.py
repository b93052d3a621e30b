"""Definitions of the operators on recurrent states: Mamba-2's update with Decoupled Scale Quantization (DSQ).

Per head with fresh state ``u [P, N]``, ``drive = dt x``, ``decay = exp(dt A)``::

    u = decay h + drive ⊗ B        y = u C        h = Q(u)
    channel = fp16(sqrt(mean_n |u|))    state = fp16(max_p |u| / channel)    step = channel (state / qmax)
    code = clamp(round_half_even(u / step), ±qmax)      Q(u) = code step

With ``refit`` the channel scale, once the codes are known, is fitted to them by least squares in units of a step:
``channel' = fp16(channel Σ_n code v / Σ_n code²)`` with ``v = (u (1 / channel)) (1 / (state / qmax))``. With ``dither``
the code is ``clamp(round_half_even(v + e_n), ±qmax)``; the bits of the state scale give ``e_n`` (:func:`dither_of`).
The last product of ``v`` and that sum are rounded once (fused).

Scales are clamped to ``[2^-24, 65504]``; one of NaN is NaN, so that a state that has met NaN shows it. Every
implementation has to give the same codes and scales to the last bit, so the order of operations is part of the
definition: nothing is fused, and the mean is summed in halves (:func:`folded_mean`). The read-out ``y`` may be summed
in any order.

A *replay window* of R rounds only every R-th token. The tokens since the last rounding are kept as rows
``drive | decay | B`` of ``recent`` and taken in again, one after the other, before the next one (:func:`replayed`);
R = 1 keeps none. All states are those of :func:`selective_scan_q` with that window.

Legend: S sequences, T tokens, H heads, G groups that share B and C, P channels of a head, N states, R tokens of a
window.
"""

from __future__ import annotations

import torch
from torch import Tensor

SMALLEST, LARGEST = 2.0**-24, 65504.0
# bits that leave the state in floats
FLOAT_BITS = 16
# tokens between two states that are kept for the adjoint
SEGMENT = 32


def to_scale(value: Tensor) -> Tensor:
    """Positive fp32 to a stored scale."""
    return value.clamp(SMALLEST, LARGEST).to(torch.float16)


def folded_mean(values: Tensor) -> Tensor:
    """Mean along the last axis, summed in the order of :func:`folded_sum`."""
    return folded_sum(values) / values.shape[-1]


def folded_sum(values: Tensor) -> Tensor:
    """Sum along the last axis: its second half is added to its first until one value is left."""
    count = values.shape[-1]
    width = 1 << (count - 1).bit_length()
    total = torch.nn.functional.pad(values, (0, width - count))
    while width > 1:
        width //= 2
        total = total[..., :width] + total[..., width:]
    return total[..., 0]


def refitted(fresh: Tensor, codes: Tensor, channel: Tensor, per_state: Tensor) -> Tensor:
    """Channel scale that fits codes best, in units of a step.

    Args:
        fresh: fp32 ``[..., P, N]``.
        codes: fp32, as ``fresh``.
        channel: fp16 ``[..., P]`` with which the codes were made.
        per_state: fp32 ``[..., N]``, ``state / qmax``.

    Returns:
        fp16 ``[..., P]``; ``channel`` where all codes are zero.
    """
    wide = channel.to(torch.float32)
    value = (fresh * (1 / wide).unsqueeze(-1)) * (1 / per_state).unsqueeze(-2)
    top, below = folded_sum(codes * value), folded_sum(codes * codes)
    ratio = torch.where((top > 0) & (below > 0), top / below, 1.0)
    return to_scale(wide * ratio)


def dither_of(state: Tensor) -> Tensor:
    """What is added before rounding, in units of a step: one of sixteen values between -1/2 and 1/2, by state.

    The scale is a new number at every token, so its bits take the place of a generator and of a counter of tokens: the
    error then depends on the state no more, on average, as with noise. The factor is 2^16 over the golden ratio, which
    spreads scales that follow each other most evenly.

    Args:
        state: fp16 state scale, any shape.

    Returns:
        fp32, ``(level - 7.5) / 16``; ``level`` is bits 12 to 15 of ``bits(state) 40503``.
    """
    bits = state.view(torch.int16).to(torch.int32) & 0xFFFF
    return (((bits * 40503 & 0xFFFF) >> 12).to(torch.float32) - 7.5) / 16


def dsq_quantize(
    fresh: Tensor, qmax: Tensor, fixed: Tensor | None, refit: bool = False, dither: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes, channel scale, state scale and step.

    Args:
        fresh: fp32 ``[S, H, P, N]``.
        qmax: fp32 ``[H, 1, 1]``.
        fixed: fp16 ``[H, P]`` channel scale instead of a computed one.
        refit: Fit the channel scale to the codes; no effect with ``fixed``.
        dither: Add a dither before rounding; not together with ``refit``.

    Returns:
        Codes as fp32 ``[S, H, P, N]``; fp16 ``[S, H, P]``; fp16 ``[S, H, N]``; fp32 ``[S, H, P, N]``.
    """
    size = fresh.abs()
    # through float64, because torch's fp32 square root may be off by its last bit and hardware's is not
    root = folded_mean(size).double().sqrt().to(torch.float32)
    channel = to_scale(root) if fixed is None else fixed.expand(fresh.shape[:-1])
    wide = channel.to(torch.float32).unsqueeze(-1)
    state = to_scale((size / wide).amax(-2))
    per_state = state.to(torch.float32).unsqueeze(-2) / qmax
    step = wide * per_state
    value = fresh / step
    if dither:
        # fused by way of float64: exact wherever a value is not far below half a step, where the code is zero anyway
        product = (fresh * (1 / wide)).double() * (1 / per_state).double()
        value = (product + dither_of(state).double().unsqueeze(-2)).to(torch.float32)
    codes = torch.maximum(torch.minimum(value.round(), qmax), -qmax)
    if refit and fixed is None:
        channel = refitted(fresh, codes, channel, per_state.squeeze(-2))
        step = channel.to(torch.float32).unsqueeze(-1) * per_state
    return codes, channel, state, step


def fresh_state(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor) -> Tensor:
    """``decay h + drive ⊗ B``.

    Args:
        state: fp32 ``[S, H, P, N]``.
        drive: fp32 ``[S, H, P]``.
        decay: fp32 ``[S, H]``.
        b: fp32 ``[S, G, N]``.
    """
    wide = b.repeat_interleave(state.shape[1] // b.shape[1], 1)
    return decay[..., None, None] * state + drive[..., None] * wide[:, :, None, :]


def read_out(fresh: Tensor, c: Tensor) -> Tensor:
    """``u C``: ``[S, H, P, N]`` and ``[S, G, N]`` to ``[S, H, P]``."""
    wide = c.repeat_interleave(fresh.shape[1] // c.shape[1], 1)
    return (fresh @ wide.unsqueeze(-1)).squeeze(-1)


def state_update(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One token with a float state, which is replaced; returns the read-out ``[S, H, P]``."""
    state.copy_(fresh_state(state, drive, decay, b))
    return read_out(state, c)


def stored_state(
    codes: Tensor, channel: Tensor | None, scale: Tensor, fixed: Tensor | None, bits: int
) -> tuple[Tensor, Tensor]:
    """The state that codes and scales stand for, fp32 ``[S, H, P, N]``, and ``qmax``, fp32 ``[1, 1, 1]``."""
    qmax = torch.full((1, 1, 1), float((1 << (bits - 1)) - 1), device=codes.device)
    wide = (fixed if channel is None else channel).to(torch.float32).unsqueeze(-1)  # type: ignore[union-attr]
    step = wide * (scale.to(torch.float32).unsqueeze(-2) / qmax)
    return unpack(codes, bits, scale.shape[-1]).to(torch.float32) * step, qmax


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
    """One token with a packed state, which is replaced; returns the read-out ``[S, H, P]``."""
    stored, qmax = stored_state(codes, channel, scale, fixed, bits)
    fresh = fresh_state(stored, drive, decay, b)
    found, new_channel, new_scale, _ = dsq_quantize(fresh, qmax, fixed, refit, dither)
    codes.copy_(pack(found.to(torch.int8), bits))
    scale.copy_(new_scale)
    if channel is not None:
        channel.copy_(new_channel)
    return read_out(fresh, c)


def window_row(drive: Tensor, decay: Tensor, b: Tensor) -> Tensor:
    """What a window keeps of a token: ``[S, H, P]``, ``[S, H]`` and ``[S, G, N]`` to ``[S, H P + H + G N]``."""
    return torch.cat((drive.flatten(1), decay, b.flatten(1)), 1)


def replayed(state: Tensor, recent: Tensor, count: Tensor, groups: int) -> Tensor:
    """A state after the tokens that its window keeps.

    Args:
        state: fp32 ``[S, H, P, N]`` as it was stored.
        recent: fp32 ``[S, R - 1, H P + H + G N]``, rows of :func:`window_row`.
        count: int32 ``[S]``, how many rows of each sequence are filled.
        groups: G.
    """
    _, heads, channels, states = state.shape
    for k in range(recent.shape[1]):
        drive, decay, b = recent[:, k].split([heads * channels, heads, groups * states], 1)
        fresh = fresh_state(state, drive.unflatten(1, (heads, channels)), decay, b.unflatten(1, (groups, states)))
        state = torch.where((count > k)[:, None, None, None], fresh, state)
    return state


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
    """One token within a replay window; what is kept is replaced. Returns the read-out ``[S, H, P]``."""
    stored, qmax = stored_state(codes, channel, scale, fixed, bits)
    fresh = fresh_state(replayed(stored, recent, count, b.shape[1]), drive, decay, b)
    due = count == recent.shape[1]
    found, new_channel, new_scale, _ = dsq_quantize(fresh, qmax, fixed, refit, dither)
    codes[due] = pack(found.to(torch.int8), bits)[due]
    scale[due] = new_scale[due]
    if channel is not None:
        channel[due] = new_channel[due]
    rows = (~due).nonzero()[:, 0]
    recent[rows, count[rows].long()] = window_row(drive, decay, b)[rows]
    count.copy_(torch.where(due, 0, count + 1))
    return read_out(fresh, c)


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
    """A whole sequence with the state stored between tokens: the recurrence at the head of this file, token by token.

    Token t is followed by a rounding where ``t + 1 - first`` is a multiple of ``window`` and not negative. Arguments as
    in :func:`llmcompress_kernels.state.selective_scan_q`.

    Returns:
        ``y [S, T, H, P]``, the last state ``[S, H, P, N]``, and where ``keep`` the states before every
        :data:`SEGMENT`-th token ``[S, H, segments, P, N]``.
    """
    qmax = (2.0 ** (bits.to(torch.float32) - 1) - 1)[:, None, None]
    rounded = (bits < FLOAT_BITS)[:, None, None]
    kept, held = [], state
    out = torch.empty_like(drive, memory_format=torch.contiguous_format)
    for t in range(drive.shape[1]):
        if keep and t % SEGMENT == 0:
            kept.append(held)
        fresh = fresh_state(held, drive[:, t], decay[:, t], b[:, t])
        out[:, t] = read_out(fresh, c[:, t])
        since = t + 1 - first
        held = fresh
        if since >= 0 and since % window == 0:
            codes, _, _, step = dsq_quantize(fresh, qmax, fixed, refit, dither)
            held = torch.where(rounded, codes * step, fresh)
    none = drive.new_empty(0)
    return out, held if held is not state else state.clone(), torch.stack(kept, 2) if keep else none


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
    """Straight-through gradients by drive, decay, b and c; ``kept [S, H, segments, P, N]`` from the forward pass.

    ``l_t = dy_t ⊗ C_t + decay_{t+1} l_{t+1}`` is the gradient by ``u_t``.
    """
    share, groups = drive.shape[2] // b.shape[2], b.shape[2]
    wide_b, wide_c = b.repeat_interleave(share, 2), c.repeat_interleave(share, 2)
    d_drive, d_decay = torch.empty_like(drive), torch.empty_like(decay)
    d_b, d_c = torch.empty_like(wide_b), torch.empty_like(wide_c)
    adjoint = torch.zeros_like(kept[:, :, 0])
    for index in reversed(range(kept.shape[2])):
        start, stop = index * SEGMENT, min((index + 1) * SEGMENT, drive.shape[1])
        states = [kept[:, :, index]]
        for t in range(start, stop - 1):
            one = slice(t, t + 1)
            arguments = (drive[:, one], decay[:, one], b[:, one], c[:, one], states[-1], bits, fixed)
            states.append(selective_scan_q(*arguments, first - t, window, False, refit, dither)[1])
        for t in reversed(range(start, stop)):
            before = states[t - start]
            fresh = fresh_state(before, drive[:, t], decay[:, t], b[:, t])
            adjoint = adjoint + grad[:, t, :, :, None] * wide_c[:, t, :, None, :]
            d_c[:, t] = (grad[:, t, :, :, None] * fresh).sum(-2)
            d_drive[:, t] = (adjoint * wide_b[:, t, :, None, :]).sum(-1)
            d_b[:, t] = (adjoint * drive[:, t, :, :, None]).sum(-2)
            d_decay[:, t] = (adjoint * before).sum((-2, -1))
            adjoint = decay[:, t, :, None, None] * adjoint
    return d_drive, d_decay, d_b.unflatten(2, (groups, share)).sum(3), d_c.unflatten(2, (groups, share)).sum(3)


def pack(codes: Tensor, bits: int) -> Tensor:
    """int8 ``[..., N]`` to uint8 ``[..., N * bits / 8]``, little end first; 4 or 8 bits, N even."""
    raw = codes.view(torch.uint8)
    return raw if bits == 8 else (raw[..., ::2] & 15) | raw[..., 1::2] << 4


def unpack(packed: Tensor, bits: int, states: int) -> Tensor:
    """Inverse of :func:`pack`."""
    if bits == 8:
        return packed.view(torch.int8)
    return (torch.stack((packed << 4, packed & 0xF0), -1).flatten(-2)[..., :states]).view(torch.int8) >> 4


def gated_norm(y: Tensor, gate: Tensor, gain: Tensor, groups: int, epsilon: float) -> Tensor:
    """RMS norm of ``y`` ``[..., H, P]`` times SiLU of ``gate`` ``[..., H P]``, over each of ``groups`` parts."""
    normed = (y.flatten(-2) * torch.nn.functional.silu(gate)).unflatten(-1, (groups, -1))
    normed = normed * (normed.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return normed.flatten(-2) * gain


def mamba2_decode(
    projected: Tensor,
    conv: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    a: Tensor,
    d: Tensor,
    gain: Tensor,
    codes: Tensor | None,
    channel: Tensor | None,
    scale: Tensor | None,
    fixed: Tensor | None,
    floats: Tensor | None,
    groups: int,
    states: int,
    bits: int,
    epsilon: float,
    refit: bool = False,
    dither: bool = False,
    recent: Tensor | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """One token of a mixer between its projections; see :func:`llmcompress_kernels.state.mamba2_decode`."""
    heads, inner, both = d.shape[0], gain.shape[0], groups * states
    given = projected.dtype
    conv_weight, dt_bias, a, d, gain = (t.float() for t in (conv_weight, dt_bias, a, d, gain))
    conv_bias = None if conv_bias is None else conv_bias.float()
    gate, mixed, dt = projected.float().split([inner, inner + 2 * both, heads], -1)
    taps = torch.cat((conv[..., 1:].float(), mixed.unsqueeze(-1)), -1)
    conv.copy_(taps)
    mixed = (taps * conv_weight).sum(-1)
    mixed = torch.nn.functional.silu(mixed if conv_bias is None else mixed + conv_bias)
    x, b, c = mixed.split([inner, both, both], -1)
    dt = torch.nn.functional.softplus(dt + dt_bias)
    x, b, c = x.unflatten(-1, (heads, -1)), b.unflatten(-1, (groups, -1)), c.unflatten(-1, (groups, -1))
    drive, decay = dt.unsqueeze(-1) * x, (dt * a).exp()
    if codes is None:
        assert floats is not None
        y = state_update(floats, drive, decay, b, c)
    else:
        assert scale is not None
        held, token, how = (codes, channel, scale, fixed), (drive, decay, b, c), (bits, refit, dither)
        if recent is None:
            y = dsq_state_update(*held, *token, *how)
        else:
            assert count is not None
            y = dsq_replay_update(*held, recent, count, *token, *how)
    return gated_norm(y + d[:, None] * x, gate, gain, groups, epsilon).to(given)


def mamba2_prefill(
    projected: Tensor,
    dt: Tensor,
    conv: Tensor | None,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    a: Tensor,
    d: Tensor,
    gain: Tensor,
    state: Tensor,
    groups: int,
    low: float,
    high: float,
    epsilon: float,
) -> Tensor:
    """A prompt through a mixer between its projections; see :func:`llmcompress_kernels.state.mamba2_prefill`."""
    sequences, heads, channels, states = state.shape
    inner, both, width = heads * channels, groups * states, conv_weight.shape[-1]
    given = projected.dtype
    conv_weight, dt_bias, a, d, gain, dt = (t.float() for t in (conv_weight, dt_bias, a, d, gain, dt))
    conv_bias = None if conv_bias is None else conv_bias.float()
    gate, mixed = projected.float().split([inner, inner + 2 * both], -1)
    mixed = mixed.transpose(1, 2)
    before = mixed.new_zeros(sequences, mixed.shape[1], width - 1) if conv is None else conv[..., 1:].float()
    mixed = torch.nn.functional.conv1d(
        torch.cat((before, mixed), -1), conv_weight.unsqueeze(1), conv_bias, groups=mixed.shape[1]
    )
    mixed = torch.nn.functional.silu(mixed).transpose(1, 2)
    x, b, c = mixed.split([inner, both, both], -1)
    dt = torch.nn.functional.softplus(dt + dt_bias).clamp(low, high)
    x, b, c = x.unflatten(-1, (heads, channels)), b.unflatten(-1, (groups, states)), c.unflatten(-1, (groups, states))
    bits = torch.full((heads,), FLOAT_BITS, device=state.device)
    y, last, _ = selective_scan_q(dt.unsqueeze(-1) * x, (dt * a).exp(), b, c, state, bits, None, 1, 1, False)
    state.copy_(last)
    return gated_norm(y + d[:, None] * x, gate, gain, groups, epsilon).to(given)


def dsq_pack(
    state: Tensor, fixed: Tensor | None, bits: int, refit: bool = False, dither: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A float state to codes, channel scale (empty with ``fixed``) and state scale."""
    qmax = torch.full((1, 1, 1), float((1 << (bits - 1)) - 1), device=state.device)
    found, channel, scale, _ = dsq_quantize(state, qmax, fixed, refit, dither)
    return pack(found.to(torch.int8), bits), channel if fixed is None else channel.new_empty(0), scale
