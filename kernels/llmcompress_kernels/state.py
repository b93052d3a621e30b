"""Operators on recurrent states: schemas, shape functions, façade and registration.

Definitions are in :mod:`llmcompress_kernels.reference.state`, with the legend of shapes; the C++ kernels are called by
:mod:`llmcompress_kernels.cpu_state`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import cpu_state, select
from llmcompress_kernels.reference import state as definition
from llmcompress_kernels.reference.state import FLOAT_BITS, SEGMENT

SCHEMAS = {
    "state_update": "(Tensor(a!) state, Tensor drive, Tensor decay, Tensor b, Tensor c) -> Tensor",
    "dsq_state_update": (
        "(Tensor(a!) codes, Tensor(b!)? channel, Tensor(c!) scale, Tensor? fixed, "
        "Tensor drive, Tensor decay, Tensor b, Tensor c, int bits, bool refit=False, bool dither=False) -> Tensor"
    ),
    "dsq_replay_update": (
        "(Tensor(a!) codes, Tensor(b!)? channel, Tensor(c!) scale, Tensor? fixed, Tensor(d!) recent, Tensor(e!) count, "
        "Tensor drive, Tensor decay, Tensor b, Tensor c, int bits, bool refit=False, bool dither=False) -> Tensor"
    ),
    "mamba2_decode": (
        "(Tensor projected, Tensor(a!) conv, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor a, "
        "Tensor d, Tensor gain, Tensor(b!)? codes, Tensor(c!)? channel, Tensor(d!)? scale, Tensor? fixed, "
        "Tensor(e!)? floats, "
        "int groups, int states, int bits, float epsilon, bool refit=False, bool dither=False, "
        "Tensor(f!)? recent=None, Tensor(g!)? count=None) -> Tensor"
    ),
    "mamba2_prefill": (
        "(Tensor projected, Tensor dt, Tensor? conv, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor a, "
        "Tensor d, Tensor gain, Tensor(a!) state, int groups, float low, float high, float epsilon) -> Tensor"
    ),
    "dsq_pack": (
        "(Tensor state, Tensor? fixed, int bits, bool refit=False, bool dither=False) -> (Tensor, Tensor, Tensor)"
    ),
    "selective_scan_q": (
        "(Tensor drive, Tensor decay, Tensor b, Tensor c, Tensor state, Tensor bits, Tensor? fixed, "
        "int first, int window, bool keep, bool refit=False, bool dither=False) -> (Tensor, Tensor, Tensor)"
    ),
    "selective_scan_q_backward": (
        "(Tensor grad, Tensor drive, Tensor decay, Tensor b, Tensor c, Tensor kept, Tensor bits, Tensor? fixed, "
        "int first, int window, bool refit=False, bool dither=False) -> (Tensor, Tensor, Tensor, Tensor)"
    ),
}


def state_update(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One token of every sequence with float states.

    Args:
        state: fp32 ``[S, H, P, N]``, replaced by the state after the token.
        drive: fp32 ``[S, H, P]``, ``dt x``.
        decay: fp32 ``[S, H]``, ``exp(dt A)``.
        b: fp32 ``[S, G, N]``; head h reads group ``h // (H / G)``.
        c: As ``b``.

    Returns:
        ``[S, H, P]``, read from the new state.
    """
    out: Tensor = torch.ops.llmcompress.state_update(state, drive, decay, b, c)
    return out


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
    """One token of every sequence with states packed by DSQ; codes and scales are replaced.

    Args:
        codes: uint8 ``[S, H, P, N * bits / 8]``.
        channel: fp16 ``[S, H, P]``; None when calibrated.
        scale: fp16 ``[S, H, N]``.
        fixed: fp16 ``[H, P]`` calibrated channel scale; None when there is ``channel``.
        drive: As in :func:`state_update`.
        decay: As there.
        b: As there.
        c: As there.
        bits: 4 or 8.
        refit: Refit the channel scale to the codes by least squares; no effect with ``fixed``.
        dither: Round after adding a dither that the state scale gives; not together with ``refit``.

    Returns:
        ``[S, H, P]``, read from the fresh state before it is rounded.
    """
    out: Tensor = torch.ops.llmcompress.dsq_state_update(
        codes, channel, scale, fixed, drive, decay, b, c, bits, refit, dither
    )
    return out


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
    """One token of every sequence with packed states that are rounded only every R tokens (replay window).

    A sequence whose window is full (``count`` is R - 1) is rounded and its window emptied; of every other one the
    token is added to the window and its codes stay. Sequences may be at different places of their windows.

    Args:
        codes: As in :func:`dsq_state_update`, like all arguments that are not named here.
        channel: As there.
        scale: As there.
        fixed: As there.
        recent: fp32 ``[S, R - 1, H P + H + G N]``, a row ``drive | decay | b`` per token since the last rounding.
        count: int32 ``[S]``, filled rows of each sequence.
        drive: As there.
        decay: As there.
        b: As there.
        c: As there.
        bits: As there.
        refit: As there.
        dither: As there.

    Returns:
        ``[S, H, P]``, read from the fresh state before it is rounded.
    """
    held = (codes, channel, scale, fixed, recent, count)
    out: Tensor = torch.ops.llmcompress.dsq_replay_update(*held, drive, decay, b, c, bits, refit, dither)
    return out


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
    """One token of a Mamba-2 mixer between its projections: convolution, state update, skip, gate, norm.

    All arithmetic is fp32; operands other than the state may be stored in bf16 or fp16, which the C++ kernels leave to
    the definition and Triton takes.

    Args:
        projected: fp32 ``[S, I + (I + 2GN) + H]``: gate, convolution inputs, time steps; ``I = H P``.
        conv: fp32 ``[S, I + 2GN, W]`` the last W inputs of the convolution, replaced.
        conv_weight: fp32 ``[I + 2GN, W]``.
        conv_bias: fp32 ``[I + 2GN]`` or None.
        dt_bias: fp32 ``[H]``.
        a: fp32 ``[H]``, negative.
        d: fp32 ``[H]``.
        gain: fp32 ``[I]``, the norm's weight; each of G groups is normed by itself.
        codes: Packed state as in :func:`dsq_state_update`, or None.
        channel: As there.
        scale: As there.
        fixed: As there.
        floats: fp32 ``[S, H, P, N]`` state, replaced, where ``codes`` is None.
        groups: G.
        states: N.
        bits: 4 or 8; ignored with ``floats``.
        epsilon: Epsilon of the norm.
        refit: As in :func:`dsq_state_update`.
        dither: As there.
        recent: Replay window of a packed state as in :func:`dsq_replay_update`, or None to round at every token.
        count: As there.

    Returns:
        ``[S, I]`` in the type of ``projected``, the input of the output projection.
    """
    held = (codes, channel, scale, fixed, floats)
    weights = (conv_weight, conv_bias, dt_bias, a, d, gain)
    sizes = (groups, states, bits, epsilon, refit, dither)
    out: Tensor = torch.ops.llmcompress.mamba2_decode(projected, conv, *weights, *held, *sizes, recent, count)
    return out


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
    limits: tuple[float, float],
    epsilon: float,
) -> Tensor:
    """A prompt through a Mamba-2 mixer between its projections, with a float state.

    All arithmetic of the definition is fp32; operands other than the state may be stored in bf16 or fp16, which the C++
    kernels leave to it. Triton takes them and rounds to their type what passes from kernel to kernel.

    Args:
        projected: fp32 ``[S, T, I + (I + 2GN)]``: gate, convolution inputs; ``I = H P``. Rows may lie apart, as
            in a part of a wider tensor.
        dt: fp32 ``[S, T, H]`` time steps before bias and softplus, likewise.
        conv: fp32 ``[S, I + 2GN, W]`` the last W inputs of the convolution before the prompt, or None for zeros.
        conv_weight: fp32 ``[I + 2GN, W]``.
        conv_bias: fp32 ``[I + 2GN]`` or None.
        dt_bias: fp32 ``[H]``.
        a: fp32 ``[H]``, negative.
        d: fp32 ``[H]``.
        gain: fp32 ``[I]``, the norm's weight; each of G groups is normed by itself.
        state: fp32 ``[S, H, P, N]``, replaced by the state after the prompt.
        groups: G.
        limits: Smallest and largest time step.
        epsilon: Epsilon of the norm.

    Returns:
        ``[S, T, I]`` in the type of ``projected``, the input of the output projection.
    """
    weights = (conv_weight, conv_bias, dt_bias, a, d, gain)
    out: Tensor = torch.ops.llmcompress.mamba2_prefill(projected, dt, conv, *weights, state, groups, *limits, epsilon)
    return out


def dsq_pack(
    state: Tensor, fixed: Tensor | None, bits: int, refit: bool = False, dither: bool = False
) -> tuple[Tensor, Tensor | None, Tensor]:
    """A float state to what :func:`dsq_state_update` keeps.

    Args:
        state: fp32 ``[S, H, P, N]``.
        fixed: fp16 ``[H, P]`` calibrated channel scale, or None.
        bits: 4 or 8.
        refit: As in :func:`dsq_state_update`.
        dither: As there.

    Returns:
        Codes uint8 ``[S, H, P, N * bits / 8]``; channel scale fp16 ``[S, H, P]``, None with ``fixed``; state scale
        fp16 ``[S, H, N]``.
    """
    codes, channel, scale = torch.ops.llmcompress.dsq_pack(state, fixed, bits, refit, dither)
    return codes, channel if fixed is None else None, scale


def selective_scan_q(
    drive: Tensor,
    decay: Tensor,
    b: Tensor,
    c: Tensor,
    state: Tensor,
    bits: Tensor,
    fixed: Tensor | None = None,
    first: int = 1,
    window: int = 1,
    refit: bool = False,
    dither: bool = False,
) -> tuple[Tensor, Tensor]:
    """A sequence token by token, with the state rounded between tokens as in decoding; differentiable.

    Gradients are straight-through (``dQ/du = 1``); the final state has none.

    Args:
        drive: fp32 ``[S, T, H, P]``.
        decay: fp32 ``[S, T, H]``.
        b: fp32 ``[S, T, G, N]``.
        c: As ``b``.
        state: fp32 ``[S, H, P, N]`` before the first token.
        bits: int32 ``[H]``, 4, 6, 8, or 16 for heads that stay in float.
        fixed: fp16 ``[H, P]`` calibrated channel scale, or None.
        first: The state is first rounded after this many tokens.
        window: And then again each time after this many more.
        refit: As in :func:`dsq_state_update`.
        dither: As there.

    Returns:
        ``[S, T, H, P]`` read-outs and the last state.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (drive, decay, b, c)):
        found: tuple[Tensor, Tensor] = _Scan.apply(drive, decay, b, c, state, bits, fixed, first, window, refit, dither)
        return found
    rest = (state, bits, fixed, first, window, False, refit, dither)
    out, last, _ = torch.ops.llmcompress.selective_scan_q(drive, decay, b, c, *rest)
    return out, last


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        state, bits, fixed, first, window, refit, dither = rest
        op = torch.ops.llmcompress.selective_scan_q
        out, last, kept = op(drive, decay, b, c, state, bits, fixed, first, window, True, refit, dither)
        ctx.save_for_backward(drive, decay, b, c, kept)
        ctx.rest = (bits, fixed, first, window, refit, dither)
        ctx.mark_non_differentiable(last)
        return out, last

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        found = torch.ops.llmcompress.selective_scan_q_backward(gradients[0], *ctx.saved_tensors, *ctx.rest)
        return (*found, *(None,) * 7)


def _like_drive(_first: Tensor, *rest: Any) -> Tensor:
    drive: Tensor = rest[0]
    return torch.empty_like(drive, memory_format=torch.contiguous_format)


def _like_packed_drive(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[4], memory_format=torch.contiguous_format)


def _like_replayed_drive(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[6], memory_format=torch.contiguous_format)


def _like_gated(projected: Tensor, *rest: Any) -> Tensor:
    gain: Tensor = rest[6]
    return projected.new_empty(projected.shape[0], gain.shape[0])


def _prefill_fake(projected: Tensor, *rest: Any) -> Tensor:
    gain: Tensor = rest[7]
    return projected.new_empty(*projected.shape[:2], gain.shape[0])


def _scan_fake(drive: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, state, keep = rest[1], rest[3], rest[8]
    shape = (*drive.shape[:1], drive.shape[2], -(-drive.shape[1] // SEGMENT), drive.shape[3], b.shape[-1])
    kept = drive.new_empty(shape if keep else (0,))
    return torch.empty_like(drive), torch.empty_like(state), kept


def _backward_fake(_grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in rest[:4])


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "state_update": (definition.state_update, _like_drive, cpu_state.state_update),
    "dsq_state_update": (definition.dsq_state_update, _like_packed_drive, cpu_state.dsq_state_update),
    "dsq_replay_update": (definition.dsq_replay_update, _like_replayed_drive, cpu_state.dsq_replay_update),
    "mamba2_decode": (definition.mamba2_decode, _like_gated, cpu_state.mamba2_decode),
    "mamba2_prefill": (definition.mamba2_prefill, _prefill_fake, cpu_state.mamba2_prefill),
    "dsq_pack": (definition.dsq_pack, cpu_state.empty_pack, cpu_state.dsq_pack),
    "selective_scan_q": (definition.selective_scan_q, _scan_fake, cpu_state.selective_scan_q),
    "selective_scan_q_backward": (
        definition.selective_scan_q_backward,
        _backward_fake,
        cpu_state.selective_scan_q_backward,
    ),
}
_LIBRARY = torch.library.Library("llmcompress", "FRAGMENT")

for _name, (_defined, _fake, _native) in _OPERATORS.items():
    _LIBRARY.define(f"{_name}{SCHEMAS[_name]}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _defined, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _native, "CPU")
    torch.library.register_fake(f"llmcompress::{_name}", _fake, lib=_LIBRARY)
    select.register(select.Implementation(_name, "reference", ("any",)))
    select.register(select.Implementation(_name, "cpu", ("cpu",), cpu_state.unavailable))

assert FLOAT_BITS == 16
