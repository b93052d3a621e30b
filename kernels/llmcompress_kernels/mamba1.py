"""Mamba-1's states natively: a token of several sequences, or a prompt, between the projections of a mixer.

The C++ of ``csrc/cpu/state/channels.cpp``, which whole models run (:mod:`~llmcompress_kernels.mamba2`); definitions and
legend are in :mod:`llmcompress_kernels.reference.mamba1`.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import cpu_state, state_shapes
from llmcompress_kernels.mamba2 import library
from llmcompress_kernels.reference.group_gemm import LANES

# N that there are kernels for, and channels of a head at most
STATES, MOST_CHANNELS = 16, 64


def blocked(state: Tensor) -> Tensor:
    """A float state ``[..., I, N]`` as the kernels keep it, ``[..., I / 16, N, 16]``."""
    return state.unflatten(-2, (-1, LANES)).transpose(-1, -2).contiguous()


def unblocked(state: Tensor) -> Tensor:
    """Inverse of :func:`blocked`."""
    return state.transpose(-1, -2).flatten(-3, -2)


def update(
    codes: Tensor | None, channel: Tensor | None, scale: Tensor | None, fixed: Tensor | None, floats: Tensor | None,
    x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, channels: int, bits: int = 0, refit: bool = False,
    dither: bool = False, recent: Tensor | None = None, count: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """One token of every sequence; what is kept of it is replaced.

    Args:
        codes: uint8 ``[S, H, P, N bits / 8]``, or None with ``floats``.
        channel: fp16 ``[S, H, P]``; None when calibrated.
        scale: fp16 ``[S, H, N]``.
        fixed: fp16 ``[H, P]`` calibrated channel scale, or None.
        floats: fp32 of :func:`blocked`, where there are no codes.
        x: fp32 ``[S, I]``.
        dt: fp32 ``[S, I]``, positive.
        a: fp32 ``[I, N]``, negative.
        b: fp32 ``[S, N]``.
        c: As ``b``.
        channels: P.
        bits: 4 or 8; of no effect with ``floats``.
        refit: As in :func:`llmcompress_kernels.state.dsq_state_update`.
        dither: As there.
        recent: fp32 ``[S, W - 1, 2 I + N]`` of a replay window, or None to round at every token.
        count: int32 ``[S]``, filled rows of each sequence.

    Returns:
        fp32 ``[S, I]``, read from the fresh state before it is rounded.

    Raises:
        ValueError: Operands do not fit, no kernel for these sizes, or a window that is filled as none can be.
    """
    state_shapes.check_channels(codes, channel, scale, fixed, floats, x, dt, a, b, c, channels, bits, recent, count)
    out, window = torch.empty_like(x), 1 if recent is None else recent.shape[1] + 1
    sizes = (window, *x.shape, channels, a.shape[-1], bits, int(refit), int(dither))
    _call("llmc_mamba1_update", codes, channel, scale, fixed, floats, recent, count, x, dt, a, b, c, out, *sizes)
    return out


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, floats: Tensor) -> Tensor:
    """A prompt with a float state; arguments of :func:`llmcompress_kernels.reference.mamba1.scan`.

    Args:
        x: fp32 ``[S, T, I]``.
        dt: As there.
        a: As there.
        b: As there.
        c: As there.
        d: As there.
        floats: fp32 of :func:`blocked`, replaced by the state after the last token.

    Returns:
        ``y + d x``, as ``x``.

    Raises:
        ValueError: Operands do not fit each other, or no kernel for these sizes.
    """
    state_shapes.check_channel_scan(x, dt, a, b, c, d, floats)
    out = x.clone(memory_format=torch.contiguous_format)
    _call("llmc_mamba1_scan", out, dt, a, torch.cat((b, c), -1), d, floats, *x.shape, a.shape[-1])
    return out


def _call(name: str, *arguments: Tensor | int | None) -> None:
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError(f"{name}: tensors are contiguous")
    function: Any = getattr(library(), name)
    function.argtypes = [ctypes.c_int64 if isinstance(a, int) else ctypes.c_void_p for a in arguments]
    code = function(*[a.data_ptr() if isinstance(a, Tensor) else a for a in arguments])
    if code == cpu_state.COUNT_IS_WRONG:
        raise ValueError(f"{name}: a replay window is filled with a negative number of tokens or more than it has rows")
    if code != 0:
        raise ValueError(f"{name}: no kernel for these sizes")
