"""Operators on recurrent states: schemas, shape functions, façade, and the C++ kernels of ``csrc/cpu/state``.

Definitions are in :mod:`llmcompress_kernels.reference.state`, with the legend of shapes. The C++ kernels need AVX-512,
N of 32, 64, 128 or 256 and P a multiple of 16 up to 256, fp32 and contiguous memory; all else runs by the definition.
"""

from __future__ import annotations

import ctypes
import struct
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build, select
from llmcompress_kernels.reference import state as definition
from llmcompress_kernels.reference.state import FLOAT_BITS, SEGMENT

FAMILY = "state"
# taps of the convolution that the kernels know
CONV_WIDTH = 4
build.register(
    build.Family(FAMILY, ("cpu/state/*.cpp",), ("cpu/state/*.h", "cpu/decode/decode.h", "cpu/include/llmcompress/*.h"))
)

SCHEMAS = {
    "state_update": "(Tensor(a!) state, Tensor drive, Tensor decay, Tensor b, Tensor c) -> Tensor",
    "dsq_state_update": (
        "(Tensor(a!) codes, Tensor(b!)? channel, Tensor(c!) scale, Tensor? fixed, "
        "Tensor drive, Tensor decay, Tensor b, Tensor c, int bits, bool refit=False, bool dither=False) -> Tensor"
    ),
    "mamba2_decode": (
        "(Tensor projected, Tensor(a!) conv, Tensor conv_weight, Tensor? conv_bias, Tensor dt_bias, Tensor a, "
        "Tensor d, Tensor gain, Tensor(b!)? codes, Tensor(c!)? channel, Tensor(d!)? scale, Tensor? fixed, "
        "Tensor(e!)? floats, "
        "int groups, int states, int bits, float epsilon, bool refit=False, bool dither=False) -> Tensor"
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
        epsilon: Of the norm.
        refit: As in :func:`dsq_state_update`.
        dither: As there.

    Returns:
        ``[S, I]`` in the type of ``projected``, the input of the output projection.
    """
    held = (codes, channel, scale, fixed, floats)
    weights = (conv_weight, conv_bias, dt_bias, a, d, gain)
    sizes = (groups, states, bits, epsilon, refit, dither)
    out: Tensor = torch.ops.llmcompress.mamba2_decode(projected, conv, *weights, *held, *sizes)
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
        epsilon: Of the norm.

    Returns:
        ``[S, T, I]``, the input of the output projection.
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
        window: And then after each so many more.
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


# ------------------------------------------------------------------ C++


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None; starts no build."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        return "needs AVX-512"
    return build.unavailable(FAMILY)


_library: ctypes.CDLL | None = None
_tried = False


def _kernels() -> ctypes.CDLL | None:
    """The library, built at first use; None where the definitions have to do."""
    global _library, _tried  # noqa: PLW0603 - one library per process
    if not _tried:
        _tried = True
        if select.requested() in ("auto", "cpu") and unavailable() is None:
            try:
                _library = build.load(FAMILY)
            except build.BuildError as error:
                sys.stderr.write(f"llmcompress: no native state kernels: {error}\n")
    return _library


def _runs(channels: int, states: int, *tensors: Tensor | None) -> bool:
    """Whether the kernels take these sizes and tensors."""
    return (
        states in (32, 64, 128, 256)
        and channels % 16 == 0
        and channels <= 256
        and all(t is None or t.is_contiguous() for t in tensors)
        and _kernels() is not None
    )


def _call(name: str, *arguments: Tensor | int | None) -> None:
    assert _library is not None
    plain = [
        ctypes.c_void_p(None if a is None else a.data_ptr())
        if a is None or isinstance(a, Tensor)
        else ctypes.c_int64(a)
        for a in arguments
    ]
    code = getattr(_library, name)(*plain)
    assert code == 0, f"{name}: no kernel for these sizes"


def _state_update(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    drive, decay, b, c = (t.contiguous() for t in (drive, decay, b, c))
    sequences, heads, channels, states = state.shape
    if not _runs(channels, states, state) or not _all_float(state, drive, decay, b, c):
        return definition.state_update(state, drive, decay, b, c)
    out = torch.empty_like(drive)
    _call("llmc_state_update", state, drive, decay, b, c, out, sequences, heads, b.shape[1], channels, states)
    return out


def _dsq_state_update(
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
    drive, decay, b, c = (t.contiguous() for t in (drive, decay, b, c))
    sequences, heads, channels = drive.shape
    states = scale.shape[-1]
    held = (codes, channel, scale, fixed)
    if bits not in (4, 8) or not _runs(channels, states, *held) or not _all_float(drive, decay, b, c):
        return definition.dsq_state_update(codes, channel, scale, fixed, drive, decay, b, c, bits, refit, dither)
    out = torch.empty_like(drive)
    sizes = (sequences, heads, b.shape[1], channels, states)
    _call("llmc_dsq_update", *held, drive, decay, b, c, out, *sizes, bits, int(refit), int(dither))
    return out


def _mamba2_decode(projected: Tensor, conv: Tensor, *rest: Any) -> Tensor:
    conv_weight, conv_bias, dt_bias, a, d, gain, codes, channel, scale, fixed, floats, groups, states, bits = rest[:14]
    epsilon, refit, dither = rest[14], *(*rest[15:], False, False)[:2]
    heads, inner = d.shape[0], gain.shape[0]
    channels, width = inner // heads, inner + 2 * groups * states
    held = (conv, conv_weight, conv_bias, dt_bias, a, d, gain, codes, channel, scale, fixed, floats)
    projected = projected.contiguous()
    sizes = conv.shape[-1] == CONV_WIDTH and inner // groups % 16 == 0 and (codes is None or bits in (4, 8))
    numbers = [t for t in (projected, conv, conv_weight, conv_bias, dt_bias, a, d, gain, floats) if t is not None]
    if not sizes or not _runs(channels, states, *held) or not _all_float(*numbers):
        return definition.mamba2_decode(projected, conv, *rest)
    sequences = projected.shape[0]
    out = projected.new_empty(sequences, inner)
    scratch = projected.new_empty(sequences * (width + heads + 2 * inner))
    raw = struct.unpack("<i", struct.pack("<f", epsilon))[0]
    shape = (sequences, heads, groups, channels, states, bits, raw, int(refit), int(dither))
    _call("llmc_mamba2_decode", projected, *held, scratch, out, *shape)
    return out


def _mamba2_prefill(projected: Tensor, dt: Tensor, conv: Tensor | None, *rest: Any) -> Tensor:
    conv_weight, conv_bias, dt_bias, a, d, gain, state, groups, low, high, epsilon = rest
    sequences, heads, channels, states = state.shape
    inner, tokens = heads * channels, projected.shape[1]
    projected, dt = _rows(projected), _rows(dt)
    held = (conv, conv_weight, conv_bias, dt_bias, a, d, gain, state)
    fits = conv_weight.shape[-1] == CONV_WIDTH and inner // groups % 16 == 0 and tokens > 0
    numbers = [t for t in (projected, dt, *held) if t is not None]
    if not fits or not _runs(channels, states, *held) or not _all_float(*numbers):
        return definition.mamba2_prefill(projected, dt, conv, *rest)
    out = projected.new_empty(sequences, tokens, inner)
    shape = (sequences, tokens, heads, groups, channels, states)
    limits = torch.tensor([low, high, epsilon], dtype=torch.float32)
    _call("llmc_mamba2_prefill", projected, dt, *held, out, *shape, projected.stride(1), dt.stride(1), limits)
    return out


def _rows(values: Tensor) -> Tensor:
    """``[S, T, R]`` whose rows are contiguous and equally far apart; a copy where they are not."""
    sequences, tokens, _ = values.shape
    spaced = sequences == 1 or values.stride(0) == tokens * values.stride(1)
    return values if values.stride(2) == 1 and spaced else values.contiguous()


def _dsq_pack(
    state: Tensor, fixed: Tensor | None, bits: int, refit: bool = False, dither: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    sequences, heads, channels, states = state.shape
    state = state.contiguous()
    if bits not in (4, 8) or not _runs(channels, states, fixed) or not _all_float(state):
        return definition.dsq_pack(state, fixed, bits, refit, dither)
    codes, channel, scale = _pack_fake(state, fixed, bits)
    held = (codes, channel if fixed is None else None, scale, fixed)
    _call("llmc_dsq_pack", state, *held, sequences, heads, channels, states, bits, int(refit), int(dither))
    return codes, channel, scale


def _selective_scan_q(
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
    drive, decay, b, c = (t.contiguous() for t in (drive, decay, b, c))
    sequences, tokens, heads, channels = drive.shape
    states = b.shape[-1]
    if tokens == 0 or not _runs(channels, states, fixed) or not _all_float(drive, decay, b, c, state):
        return definition.selective_scan_q(drive, decay, b, c, state, bits, fixed, first, window, keep, refit, dither)
    widths = bits.to(torch.int32).contiguous()
    out, last = torch.empty_like(drive), state.clone(memory_format=torch.contiguous_format)
    kept = drive.new_empty((sequences, heads, -(-tokens // SEGMENT), channels, states) if keep else 0)
    sizes = (sequences, tokens, heads, b.shape[2], channels, states)
    held = kept if keep else None
    inputs = (drive, decay, b, c, out, last, widths, fixed, held)
    _call("llmc_dsq_scan", *inputs, SEGMENT, first, window, *sizes, int(refit), int(dither))
    return out, last, kept


def _selective_scan_q_backward(
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
    grad, drive, decay, b, c = (t.contiguous() for t in (grad, drive, decay, b, c))
    sequences, tokens, heads, channels = drive.shape
    states, groups = b.shape[-1], b.shape[2]
    if tokens == 0 or not _runs(channels, states, fixed, kept) or not _all_float(grad, drive, decay, b, c, kept):
        rest = (bits, fixed, first, window, refit, dither)
        return definition.selective_scan_q_backward(grad, drive, decay, b, c, kept, *rest)
    widths = bits.to(torch.int32).contiguous()
    d_drive, d_decay = torch.empty_like(drive), torch.empty_like(decay)
    d_b = drive.new_empty(sequences, tokens, heads, states)
    d_c = torch.empty_like(d_b)
    sizes = (sequences, tokens, heads, groups, channels, states)
    gradients = (d_drive, d_decay, d_b, d_c)
    inputs = (grad, drive, decay, b, c, kept, widths, fixed)
    _call("llmc_dsq_scan_backward", *inputs, *gradients, SEGMENT, first, window, *sizes, int(refit), int(dither))
    share = (groups, heads // groups)
    return d_drive, d_decay, d_b.unflatten(2, share).sum(3), d_c.unflatten(2, share).sum(3)


def _all_float(*tensors: Tensor) -> bool:
    return all(t.dtype == torch.float32 for t in tensors)


# ------------------------------------------------------------------ registration


def _like_drive(_first: Tensor, *rest: Any) -> Tensor:
    drive: Tensor = rest[0]
    return torch.empty_like(drive, memory_format=torch.contiguous_format)


def _like_packed_drive(*arguments: Any) -> Tensor:
    return torch.empty_like(arguments[4], memory_format=torch.contiguous_format)


def _like_gated(projected: Tensor, *rest: Any) -> Tensor:
    gain: Tensor = rest[6]
    return projected.new_empty(projected.shape[0], gain.shape[0])


def _prefill_fake(projected: Tensor, *rest: Any) -> Tensor:
    gain: Tensor = rest[7]
    return projected.new_empty(*projected.shape[:2], gain.shape[0])


def _pack_fake(
    state: Tensor, fixed: Tensor | None, bits: int, _refit: bool = False, _dither: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    sequences, heads, channels, states = state.shape
    codes = state.new_empty((sequences, heads, channels, states * bits // 8), dtype=torch.uint8)
    channel = state.new_empty((sequences, heads, channels) if fixed is None else (0,), dtype=torch.float16)
    return codes, channel, state.new_empty((sequences, heads, states), dtype=torch.float16)


def _scan_fake(drive: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    b, state, keep = rest[1], rest[3], rest[8]
    shape = (*drive.shape[:1], drive.shape[2], -(-drive.shape[1] // SEGMENT), drive.shape[3], b.shape[-1])
    kept = drive.new_empty(shape if keep else (0,))
    return torch.empty_like(drive), torch.empty_like(state), kept


def _backward_fake(_grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t) for t in rest[:4])


_OPERATORS: dict[str, tuple[Callable[..., Any], Callable[..., Any], Callable[..., Any]]] = {
    "state_update": (definition.state_update, _like_drive, _state_update),
    "dsq_state_update": (definition.dsq_state_update, _like_packed_drive, _dsq_state_update),
    "mamba2_decode": (definition.mamba2_decode, _like_gated, _mamba2_decode),
    "mamba2_prefill": (definition.mamba2_prefill, _prefill_fake, _mamba2_prefill),
    "dsq_pack": (definition.dsq_pack, _pack_fake, _dsq_pack),
    "selective_scan_q": (definition.selective_scan_q, _scan_fake, _selective_scan_q),
    "selective_scan_q_backward": (definition.selective_scan_q_backward, _backward_fake, _selective_scan_q_backward),
}
_LIBRARY = torch.library.Library("llmcompress", "FRAGMENT")

for _name, (_defined, _fake, _native) in _OPERATORS.items():
    _LIBRARY.define(f"{_name}{SCHEMAS[_name]}", tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(_name, _defined, "CompositeExplicitAutograd")
    _LIBRARY.impl(_name, _native, "CPU")
    torch.library.register_fake(f"llmcompress::{_name}", _fake, lib=_LIBRARY)
    select.register(select.Implementation(_name, "reference", ("any",)))
    select.register(select.Implementation(_name, "cpu", ("cpu",), unavailable))

assert FLOAT_BITS == 16
