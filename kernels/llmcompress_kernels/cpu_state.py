"""The C++ kernels of ``csrc/cpu/state``, one function an operator; arguments as in :mod:`llmcompress_kernels.state`.

They need AVX-512, AVX2 or Arm, N of 32, 64, 128 or 256 and P a multiple of 16 up to 256, fp32 and contiguous memory;
all else runs by the definition. The same sources are compiled for one of them (``wide.h``, ``narrow.h``); codes are the
same.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build, cpu, select, state_shapes
from llmcompress_kernels.reference import delta_state as delta_definition
from llmcompress_kernels.reference import state as definition
from llmcompress_kernels.reference.state import SEGMENT

FAMILY = "state"
# taps of the convolution that the kernels know
CONV_WIDTH = 4
# tokens of a replay window, at most
MAX_WINDOW = 64
# what a kernel returns where a window is filled as none can be
COUNT_IS_WRONG = 2


def instructions() -> str | None:
    """What the kernels are compiled for on this machine; None where the definitions run.

    ``avx512``, ``avx2`` or ``portable``, which is for Arm. x86 takes it where it is asked for: without AVX2 a fused
    product, which codes depend on, is a call of the C library. The environment may ask for less than the processor has
    (:data:`cpu.ISA_VARIABLE`).
    """
    asked = os.environ.get(cpu.ISA_VARIABLE)
    if cpu.architecture() == "aarch64" or (cpu.architecture() == "x86_64" and asked == "portable"):
        return "portable"
    # AVX512 or AVX2, with more behind it in some versions
    have = torch.backends.cpu.get_cpu_capability().split("_")[0].lower()
    wanted = (asked or have).replace("avxvnni", "avx2")
    if have == "avx512" and wanted in ("avx512", "avx2"):
        return wanted
    return "avx2" if have == wanted == "avx2" else None


_FLAGS = {
    "avx512": (*(f"-mavx512{part}" for part in ("f", "bw", "vl", "dq")), "-mfma", "-mf16c", "-mbmi2"),
    "avx2": ("-mavx2", "-mfma", "-mf16c", "-DLLMCOMPRESS_AVX2"),
    "portable": ("-DLLMCOMPRESS_AVX2", "-DLLMCOMPRESS_NARROW", "-Wno-psabi"),
}


def family(isa: str | None) -> build.Family:
    """The library of an instruction set, see :func:`instructions`."""
    flags = _FLAGS.get(isa or "", ())
    headers = ("cpu/state/*.h", "cpu/decode/decode.h", "cpu/include/llmcompress/*.h")
    return build.Family(FAMILY, ("cpu/state/*.cpp",), headers, flags=flags, optional=isa is None)


build.register(family(instructions()))


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None; starts no build."""
    return "needs AVX-512, AVX2 or Arm" if instructions() is None else build.unavailable(FAMILY)


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
    # a loop: a generator takes twice the time, and a token of a small state little more than such
    for t in tensors:
        if t is not None and not t.is_contiguous():
            return False
    return states in (32, 64, 128, 256) and channels % 16 == 0 and channels <= 256 and _kernels() is not None


# with their argument types declared: ctypes then converts numbers faster than objects of its own
_functions: dict[str, Any] = {}


def _function(name: str, tensors: int, numbers: int, last: int) -> Any:
    assert _library is not None
    found = getattr(_library, name)
    found.argtypes = [ctypes.c_void_p] * tensors + [ctypes.c_int64] * numbers + [ctypes.c_void_p] * last
    _functions[name] = found
    return found


def _call(
    name: str, tensors: tuple[Tensor | None, ...], numbers: tuple[int, ...], last: tuple[Tensor, ...] = ()
) -> None:
    function = _functions.get(name) or _function(name, len(tensors), len(numbers), len(last))
    code = function(*[None if t is None else t.data_ptr() for t in tensors], *numbers, *[t.data_ptr() for t in last])
    if code == COUNT_IS_WRONG:
        raise ValueError(f"{name}: a replay window is filled with a negative number of tokens or more than it has rows")
    assert code == 0, f"{name}: no kernel for these sizes"


def state_update(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """One token with float states."""
    sizes = state_shapes.check_float(state, drive, decay, b, c)
    drive, decay, b, c = drive.contiguous(), decay.contiguous(), b.contiguous(), c.contiguous()
    if not _runs(*sizes[3:], state) or not _all_float(state, drive, decay, b, c):
        return definition.state_update(state, drive, decay, b, c)
    out = torch.empty_like(drive)
    _call("llmc_state_update", (state, drive, decay, b, c, out), sizes)
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
    """One token with packed states."""
    sizes = state_shapes.check_packed(codes, channel, scale, fixed, drive, decay, b, c, bits)
    drive, decay, b, c = drive.contiguous(), decay.contiguous(), b.contiguous(), c.contiguous()
    held = (codes, channel, scale, fixed)
    if not _runs(*sizes[3:], *held) or not _all_float(drive, decay, b, c):
        return definition.dsq_state_update(codes, channel, scale, fixed, drive, decay, b, c, bits, refit, dither)
    out = torch.empty_like(drive)
    _call("llmc_dsq_update", (*held, drive, decay, b, c, out), (*sizes, bits, refit, dither))
    return out


def dsq_replay_update(*arguments: Any) -> Tensor:
    """One token with packed states that have replay windows."""
    held, how = arguments[:6], arguments[10:]
    codes, channel, scale, fixed, recent, count, drive, decay, b, c = arguments[:10]
    # the dispatcher leaves out arguments that have their defaults
    bits, refit, dither = how + (False, False)[len(how) - 1 :]
    sizes = state_shapes.check_packed(
        codes, channel, scale, fixed, drive, decay, b, c, bits, recent, count, "dsq_replay_update"
    )
    numbers = drive.contiguous(), decay.contiguous(), b.contiguous(), c.contiguous()
    if not (_window_fits(recent, count) and _runs(*sizes[3:], *held) and _all_float(*numbers)):
        return definition.dsq_replay_update(*arguments)
    out, window = torch.empty_like(numbers[0]), recent.shape[1] + 1
    _call("llmc_dsq_replay_update", (*held, *numbers, out), (window, *sizes, bits, refit, dither))
    return out


def dsq_delta_update(*arguments: Any) -> Tensor:
    """One token of a gated delta rule with packed states."""
    held, numbers, how = arguments[:6], arguments[6:11], arguments[11:]
    recent, count = held[4:]
    # the dispatcher leaves out arguments that have their defaults
    bits, refit, dither = how + (False, False)[len(how) - 1 :]
    sizes = state_shapes.check_delta(*arguments[:12])
    numbers = tuple(t.contiguous() for t in numbers)
    fits = (recent is None or _window_fits(recent, count)) and _runs(*sizes[3:], *held)
    if not fits or not _all_float(*numbers):
        return delta_definition.dsq_delta_update(*arguments)
    out, window = torch.empty_like(numbers[0]), 1 if recent is None else recent.shape[1] + 1
    _call("llmc_dsq_delta_update", (*held, *numbers, out), (window, *sizes, bits, refit, dither))
    return out


def _window_fits(recent: Tensor, count: Tensor) -> bool:
    return recent.dtype == torch.float32 and count.dtype == torch.int32 and recent.shape[1] < MAX_WINDOW


def mamba2_decode(projected: Tensor, conv: Tensor, *rest: Any) -> Tensor:
    """One token of a mixer."""
    conv_weight, conv_bias, dt_bias, a, d, gain, codes, channel, scale, fixed, floats, groups, states, bits = rest[:14]
    # the dispatcher leaves out arguments that have their defaults
    epsilon, refit, dither, recent, count = rest[14:] + (False, False, None, None)[len(rest) - 15 :]
    if codes is None:
        # floats are never rounded, so there is no window
        recent = count = None
    weights, packed = (conv_weight, conv_bias, dt_bias, a, d, gain), (codes, channel, scale, fixed, floats)
    check: Callable[..., tuple[int, int, int, int]] = state_shapes.check_mixer
    sequences, heads, channels, width = check(projected, conv, *weights, *packed, groups, states, bits, recent, count)
    inner = heads * channels
    held = (conv, *weights, *packed, recent, count)
    projected = projected.contiguous()
    numbers = (projected, conv, *weights, floats)
    sizes = conv.shape[-1] == CONV_WIDTH and inner // groups % 16 == 0
    sizes = sizes and (recent is None or _window_fits(recent, count))
    if not sizes or not _runs(channels, states, *held) or not _all_float(*numbers):
        return definition.mamba2_decode(projected, conv, *rest)
    out = projected.new_empty(sequences, inner)
    scratch = projected.new_empty(sequences * (width + heads + 2 * inner))
    window = 1 if recent is None else recent.shape[1] + 1
    shape = (window, sequences, heads, groups, channels, states, bits, _raw(epsilon), refit, dither)
    _call("llmc_mamba2_decode", (projected, *held, scratch, out), shape)
    return out


@cache
def _raw(number: float) -> int:
    """The bits of a number in float32."""
    return int(struct.unpack("<i", struct.pack("<f", number))[0])


def mamba2_prefill(projected: Tensor, dt: Tensor, conv: Tensor | None, *rest: Any) -> Tensor:
    """A prompt through a mixer."""
    conv_weight, conv_bias, dt_bias, a, d, gain, state, groups, low, high, epsilon = rest
    state_shapes.check_prompt(projected, dt, conv, *rest[:8])
    sequences, heads, channels, states = state.shape
    inner, tokens = heads * channels, projected.shape[1]
    projected, dt = _rows(projected), _rows(dt)
    held = (conv, conv_weight, conv_bias, dt_bias, a, d, gain, state)
    fits = conv_weight.shape[-1] == CONV_WIDTH and inner // groups % 16 == 0 and tokens > 0
    if not fits or not _runs(channels, states, *held) or not _all_float(projected, dt, *held):
        return definition.mamba2_prefill(projected, dt, conv, *rest)
    out = projected.new_empty(sequences, tokens, inner)
    limits = torch.tensor([low, high, epsilon], dtype=torch.float32)
    shape = (sequences, tokens, heads, groups, channels, states, projected.stride(1), dt.stride(1))
    _call("llmc_mamba2_prefill", (projected, dt, *held, out), shape, (limits,))
    return out


def _rows(values: Tensor) -> Tensor:
    """``[S, T, R]`` whose rows are contiguous and equally far apart; a copy where they are not."""
    sequences, tokens, _ = values.shape
    spaced = sequences == 1 or values.stride(0) == tokens * values.stride(1)
    return values if values.stride(2) == 1 and spaced else values.contiguous()


def dsq_pack(
    state: Tensor, fixed: Tensor | None, bits: int, refit: bool = False, dither: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """A float state to codes and scales."""
    state_shapes.check_pack(state, fixed, bits)
    sequences, heads, channels, states = state.shape
    state = state.contiguous()
    if not _runs(channels, states, fixed) or not _all_float(state):
        return definition.dsq_pack(state, fixed, bits, refit, dither)
    codes, channel, scale = empty_pack(state, fixed, bits)
    held = (codes, channel if fixed is None else None, scale, fixed)
    _call("llmc_dsq_pack", (state, *held), (sequences, heads, channels, states, bits, refit, dither))
    return codes, channel, scale


def empty_pack(
    state: Tensor, fixed: Tensor | None, bits: int, _refit: bool = False, _dither: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Room for what packing gives: codes, channel scale (empty with ``fixed``), state scale."""
    sequences, heads, channels, states = state.shape
    codes = state.new_empty((sequences, heads, channels, states * bits // 8), dtype=torch.uint8)
    channel = state.new_empty((sequences, heads, channels) if fixed is None else (0,), dtype=torch.float16)
    return codes, channel, state.new_empty((sequences, heads, states), dtype=torch.float16)


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
    """A sequence with its state rounded between tokens; what the adjoint needs with ``keep``."""
    held = state_shapes.check_scan("selective_scan_q", drive, decay, b, c, bits, fixed)
    state_shapes.require_shape("selective_scan_q", "state", state, held)
    drive, decay, b, c = (t.contiguous() for t in (drive, decay, b, c))
    sequences, tokens, heads, channels = drive.shape
    states = b.shape[-1]
    if tokens == 0 or not _runs(channels, states, fixed) or not _all_float(drive, decay, b, c, state):
        return definition.selective_scan_q(drive, decay, b, c, state, bits, fixed, first, window, keep, refit, dither)
    widths = bits.to(torch.int32).contiguous()
    out, last = torch.empty_like(drive), state.clone(memory_format=torch.contiguous_format)
    kept = drive.new_empty((sequences, heads, -(-tokens // SEGMENT), channels, states) if keep else 0)
    sizes = (sequences, tokens, heads, b.shape[2], channels, states)
    inputs = (drive, decay, b, c, out, last, widths, fixed, kept if keep else None)
    _call("llmc_dsq_scan", inputs, (SEGMENT, first, window, *sizes, refit, dither))
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
    """Straight-through gradients of the scan."""
    state_shapes.check_gradient(grad, drive, decay, b, c, kept, bits, fixed)
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
    _call("llmc_dsq_scan_backward", (*inputs, *gradients), (SEGMENT, first, window, *sizes, refit, dither))
    share = (groups, heads // groups)
    return d_drive, d_decay, d_b.unflatten(2, share).sum(3), d_c.unflatten(2, share).sum(3)


def _all_float(*tensors: Tensor | None) -> bool:
    for t in tensors:  # noqa: SIM110 - as in _runs
        if t is not None and t.dtype is not torch.float32:
            return False
    return True
