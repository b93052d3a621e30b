"""What CUDA tensors run: the first of CUDA C++, Triton and the definition that accepts the call.

Registered under PyTorch's CUDA key, which takes precedence over the definition. Nothing is imported or compiled before
the first call on a CUDA tensor, and a machine without a GPU registers all of it just the same.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build, operand_shapes, select, state_shapes
from llmcompress_kernels.cuda import library as libraries
from llmcompress_kernels.cuda import skinny
from llmcompress_kernels.cuda import state as cuda_state
from llmcompress_kernels.cuda import tree as cuda_tree
from llmcompress_kernels.reference import delta_decode as reference_delta_decode
from llmcompress_kernels.reference import group_gemm as reference_group_gemm
from llmcompress_kernels.reference import moe_group_gemm as reference_moe_group_gemm
from llmcompress_kernels.reference import state as reference_state
from llmcompress_kernels.schemas import _LIBRARY
from llmcompress_kernels.state import SCHEMAS as _STATE_SCHEMAS  # the operators have to exist

assert _STATE_SCHEMAS


@cache
def no_triton() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'llmcompress[triton]'"
    return libraries.no_device()


def wanted(name: str) -> bool:
    """Whether the user's choice admits an implementation."""
    return select.requested() in ("auto", name)


@cache
def family_ready(name: str) -> bool:
    """Load a family of CUDA C++ kernels if this machine can have it; tried once, a failed build is told on stderr."""
    if libraries.unavailable(name) is not None:
        return False
    try:
        build.load(name)
    except build.BuildError as error:
        sys.stderr.write(f"llmcompress: no CUDA C++ kernels ({name}): {error}\n")
        return False
    return True


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    *rest: Any,
) -> Tensor:
    """CUDA implementation of the operator; ``rest`` is ``int8``, whether activations are rounded."""
    arguments = (x, packed, scale, zero, bits, group_size, in_features)
    # here and not in front of the operator, so that a compiled graph's calls are checked as well
    operand_shapes.check_linear(*arguments)
    small = wanted("cuda") and packed.dim() == 2 and not any(rest)
    if small and skinny.verify(x, packed, scale, zero, bits, group_size) is None and family_ready(skinny.FAMILY):
        return skinny.group_gemm(*arguments)
    if wanted("triton") and no_triton() is None and packed.dim() == 2 and not any(rest):
        from llmcompress_kernels.triton import group_gemm as kernels
        from llmcompress_kernels.triton import widened

        if widened.verify(x, bits, x.numel() // max(1, in_features), widened.FROM) is None:
            return widened.group_gemm(*arguments)
        if kernels.verify(x, bits) is None:
            return kernels.group_gemm(*arguments)
    if wanted("triton") and no_triton() is None and any(rest):
        from llmcompress_kernels.triton import int8_gemm

        if int8_gemm.verify(x, packed, bits, group_size, in_features) is None:
            return int8_gemm.group_gemm(*arguments)
    return reference_group_gemm.group_gemm(*arguments, *rest)


# operands of moe_group_gemm by position: x, index, weights, six per side, intermediate, activation, alpha, limit
_GATE_UP, _GATE_UP_BITS, _DOWN_BITS, _ACTIVATION, _COUNT = 3, 7, 13, 16, 19


def moe_group_gemm(*arguments: Any) -> Tensor:
    """CUDA implementation of the operator; arguments as in its schema."""
    x, own, rest = arguments[0], arguments[:_COUNT], arguments[_COUNT:]
    rows = reference_moe_group_gemm.first_rows(own[15], own[_ACTIVATION])
    operand_shapes.check_routed(x, own[1], own[2], own[3:9], own[9:15], rows, own[15])
    if wanted("cuda") and own[_GATE_UP].dim() == 3 and not any(rest):
        index, weights, intermediate, activation, alpha, limit = *own[1:3], *own[15:]
        sides = (skinny.Side(*own[3:9]), skinny.Side(*own[9:15]))
        if skinny.verify_routed(x, index, sides, intermediate, activation) is None and family_ready(skinny.FAMILY):
            return skinny.moe_group_gemm(x, index, weights, sides, intermediate, activation, alpha, limit)
    if wanted("triton") and no_triton() is None and own[_GATE_UP].dim() == 3 and not any(rest):
        from llmcompress_kernels.triton import moe_group_gemm as kernels
        from llmcompress_kernels.triton import widened

        up, down = own[_GATE_UP : _GATE_UP + 6], own[_DOWN_BITS - 4 : _DOWN_BITS + 2]
        bits = (own[_GATE_UP_BITS], own[_DOWN_BITS])
        if widened.verify_routed(x, own[1], (up[1], up[3], down[1], down[3]), bits, own[_ACTIVATION]) is None:
            up, down = (*up[:3], *up[4:]), (*down[:3], *down[4:])  # without the bias
            return widened.moe_group_gemm(x, own[1], own[2], up, down, *own[15:])
        if kernels.verify(x, own[_GATE_UP_BITS], own[_DOWN_BITS], own[_ACTIVATION]) is None:
            return kernels.moe_group_gemm(*own)
    return reference_moe_group_gemm.moe_group_gemm(*arguments)


def _states(channels: int, states: int, bits: int | None, *tensors: Tensor | None) -> bool:
    """Whether the state kernels take these sizes and tensors."""
    if not wanted("triton") or no_triton() is not None:
        return False
    from llmcompress_kernels.triton import state as kernels

    plain = all(t is None or t.is_contiguous() for t in tensors)
    return plain and kernels.verify(channels, states, bits) is None


def dsq_state_update(*arguments: Any) -> Tensor:
    """CUDA implementation of the operator; arguments as in its schema."""
    held, drive, bits = arguments[:4], arguments[4], arguments[8]
    if wanted("cuda") and cuda_state.verify(*arguments) is None and family_ready(cuda_state.FAMILY):
        return cuda_state.dsq_state_update(*arguments)
    if _states(drive.shape[-1], held[2].shape[-1], bits, *held):
        from llmcompress_kernels.triton import state as kernels

        return kernels.dsq_state_update(*arguments)
    return reference_state.dsq_state_update(*arguments)


def dsq_replay_update(*arguments: Any) -> Tensor:
    """CUDA implementation of the operator; arguments as in its schema."""
    held, drive, bits = arguments[:6], arguments[6], arguments[10]
    if wanted("cuda") and cuda_state.verify_replay(*arguments) is None and family_ready(cuda_state.REPLAY):
        return cuda_state.dsq_replay_update(*arguments)
    if _states(drive.shape[-1], held[2].shape[-1], bits, *held):
        from llmcompress_kernels.triton import replay as kernels

        return kernels.dsq_replay_update(*arguments)
    return reference_state.dsq_replay_update(*arguments)


def state_update(*arguments: Tensor) -> Tensor:
    """CUDA implementation of the operator; arguments as in its schema."""
    if wanted("triton") and no_triton() is None:
        from llmcompress_kernels.triton import mixer as kernels

        if kernels.verify_update(*arguments) is None:
            return kernels.state_update(*arguments)
    return reference_state.state_update(*arguments)


def mamba2_decode(*arguments: Any) -> Tensor:
    """CUDA implementation of the operator; arguments as in its schema."""
    projected, conv, weights, held, sizes = *arguments[:2], arguments[2:8], arguments[8:13], arguments[13:]
    groups, states, bits, epsilon, rounding, window = *sizes[:4], sizes[4:6], sizes[6:]
    if wanted("triton") and no_triton() is None:
        from llmcompress_kernels.triton import mixer as kernels

        if kernels.verify(projected, conv, weights, groups) is None:
            *packed, floats = held

            def update(*step: Tensor) -> Tensor:
                if packed[0] is None:
                    return state_update(floats, *step)
                if window and window[0] is not None:
                    return dsq_replay_update(*packed, *window, *step, bits, *rounding)
                return dsq_state_update(*packed, *step, bits, *rounding)

            return kernels.mamba2_decode(projected, conv, weights, groups, states, epsilon, update)
    return reference_state.mamba2_decode(*arguments)


def prompt_declined(heads: int, channels: int, states: int, groups: int, dtype: torch.dtype) -> str | None:
    """Why a prompt of a mixer of these sizes has no kernel here, or None; the definition goes token by token."""
    if not wanted("triton"):
        return "LLMCOMPRESS_KERNELS names another implementation"
    if no_triton() is not None:
        return no_triton()
    from llmcompress_kernels.triton import prompt as kernels

    return kernels.declines(heads, channels, states, groups, dtype)


def mamba2_prefill(*arguments: Any) -> Tensor:
    """CUDA implementation of the operator; arguments as in its schema."""
    (projected, dt, conv), weights, (state, groups, low, high, epsilon) = arguments[:3], arguments[3:9], arguments[9:]
    if wanted("triton") and no_triton() is None:
        from llmcompress_kernels.triton import prompt as kernels

        if kernels.verify(projected, dt, conv, weights, state, groups) is None:
            return kernels.mamba2_prefill(projected, dt, conv, weights, state, groups, (low, high), epsilon)
    return reference_state.mamba2_prefill(*arguments)


def dsq_pack(state: Tensor, fixed: Tensor | None, bits: int, *rounding: Any) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA implementation of the operator; arguments as in its schema."""
    if _states(state.shape[-2], state.shape[-1], bits, fixed):
        from llmcompress_kernels.triton import state as kernels

        codes, channel, scale = kernels.dsq_pack(state, fixed, bits, *rounding)
        return codes, scale.new_empty(0) if channel is None else channel, scale
    return reference_state.dsq_pack(state, fixed, bits, *rounding)


def selective_scan_q(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """CUDA implementation of the operator; arguments as in its schema."""
    drive, b, fixed = arguments[0], arguments[2], arguments[6]
    if drive.shape[1] > 0 and _states(drive.shape[-1], b.shape[-1], None, fixed):
        from llmcompress_kernels.triton import state as kernels

        return kernels.selective_scan_q(*arguments)
    return reference_state.selective_scan_q(*arguments)


def selective_scan_q_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """CUDA implementation of the operator; arguments as in its schema."""
    drive, b, fixed = arguments[1], arguments[3], arguments[7]
    if drive.shape[1] > 0 and _states(drive.shape[-1], b.shape[-1], None, fixed):
        from llmcompress_kernels.triton import state as kernels

        return kernels.selective_scan_q_backward(*arguments)
    return reference_state.selective_scan_q_backward(*arguments)


def delta_decode(
    x: Tensor,
    packed: list[Tensor],
    scale: list[Tensor],
    spans: Tensor,
    bits: list[int],
    multiplier: list[float],
    group_size: int,
) -> Tensor:
    """CUDA implementation of the operator; ``spans`` stays on the CPU."""
    arguments = (x, packed, scale, spans, bits, multiplier, group_size)
    operand_shapes.check_tree(*arguments)
    accepted = wanted("cuda") and cuda_tree.verify(x, packed, scale, bits, group_size) is None
    if accepted and family_ready(cuda_tree.FAMILY):
        return cuda_tree.delta_decode(*arguments)
    if wanted("triton") and no_triton() is None:
        from llmcompress_kernels.triton import delta_decode as kernels

        plain = all(t.is_contiguous() for t in (*packed, *scale))
        if plain and kernels.verify(x, bits, group_size) is None:
            return kernels.delta_decode(*arguments)
    return reference_delta_decode.delta_decode(*arguments)


_FUNCTIONS: tuple[Callable[..., Any], ...] = (
    group_gemm,
    moe_group_gemm,
    state_update,
    dsq_state_update,
    dsq_replay_update,
    mamba2_decode,
    mamba2_prefill,
    dsq_pack,
    selective_scan_q,
    selective_scan_q_backward,
    delta_decode,
)

_IN_CUDA: dict[Callable[..., Any], Callable[[], str | None]] = {
    group_gemm: skinny.unavailable,
    moe_group_gemm: skinny.unavailable,
    dsq_state_update: cuda_state.unavailable,
    dsq_replay_update: partial(cuda_state.unavailable, cuda_state.REPLAY),
    delta_decode: cuda_tree.unavailable,
}


def _scan_fits(*arguments: Any) -> None:
    held = state_shapes.check_scan("selective_scan_q", *arguments[:4], *arguments[5:7])
    state_shapes.require_shape("selective_scan_q", "state", arguments[4], held)


def _gradient_fits(*arguments: Any) -> None:
    state_shapes.check_gradient(*arguments[:8])


_packed_fits: Callable[..., object] = state_shapes.check_packed
# what every call of an operator on states is asked first; in the step of a mixer once, for all of it
_FITS: dict[Callable[..., Any], Callable[..., object]] = {
    state_update: state_shapes.check_float,
    dsq_state_update: lambda *given: _packed_fits(*given[:9]),
    dsq_replay_update: lambda *given: _packed_fits(*given[:4], *given[6:11], *given[4:6], "dsq_replay_update"),
    mamba2_decode: lambda *given: state_shapes.check_mixer(*given[:16], *given[19:]),
    mamba2_prefill: lambda *given: state_shapes.check_prompt(*given[:11]),
    dsq_pack: lambda *given: state_shapes.check_pack(*given[:3]),
    selective_scan_q: _scan_fits,
    selective_scan_q_backward: _gradient_fits,
}


def _checked(function: Callable[..., Any]) -> Callable[..., Any]:
    fits = _FITS.get(function)
    if fits is None:
        return function

    def run(*arguments: Any) -> Any:
        fits(*arguments)
        return function(*arguments)

    return run


for _function in _FUNCTIONS:
    _LIBRARY.impl(_function.__name__, _checked(_function), "CUDA")
    if _function in _IN_CUDA:
        select.register(select.Implementation(_function.__name__, "cuda", ("cuda",), _IN_CUDA[_function]))
    select.register(select.Implementation(_function.__name__, "triton", ("cuda",), no_triton))
