"""``group_gemm`` and ``moe_group_gemm`` for 1 to 16 tokens in CUDA C++; ``csrc/cuda/skinny/skinny.cuh`` says how.

They read the stored order like the Triton kernels, which take over whatever these decline. Two launches serve a
block of experts: gate, up and activation; down projection and the weighted sum over a token's slots.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build
from llmcompress_kernels.cuda import toolchain

FAMILY = "skinny"
BITS = (2, 3, 4)
TOKENS = 16
MOST_SLOTS = 1024
# skinny.cuh: rows of a block, columns of a step and most groups of one
ROWS, COLUMNS, GROUPS = 128, {2: 512, 3: 512, 4: 256}, 8
# columns of a row whose words begin at 16 bytes
ALIGNED = {2: 64, 3: 128, 4: 32}
MODES = {"dense": 0, "gate_up": 1, "down": 2}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gpt_oss")
TYPES = (torch.bfloat16, torch.float16)
# counters of arrivals that a captured graph may take without ever giving them back
RESERVED = 1 << 18
# blocks that a multiprocessor holds at once; what splits the columns
BLOCKS_PER_PROCESSOR = 3
# steps that a part has at least
STEPS_OF_A_PART = 4

build.register(
    build.Family(
        FAMILY,
        ("cuda/skinny/skinny.cu",),
        headers=("cuda/skinny/*.h", "cuda/skinny/*.cuh"),
        toolchain=toolchain.nvcc,
        optional=True,
    )
)


class Call(ctypes.Structure):
    """What one launch is told, as in ``csrc/cuda/skinny/call.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "weight", "scale", "zero", "bias", "index", "share", "out")),
        *((name, ctypes.c_void_p) for name in ("parts", "arrived")),
        *((name, ctypes.c_int64) for name in ("words", "groups", "zero_words")),
        *((name, ctypes.c_int) for name in ("tokens", "slots", "experts", "rows", "columns", "group")),
        *((name, ctypes.c_int) for name in ("splits", "steps", "mode", "activation", "at_once")),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
    )


@dataclass(frozen=True, slots=True)
class Side:
    """One packed matrix or bank of them; ``zero`` and ``bias`` may be None."""

    weight: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    bits: int
    group: int


def declines_weight(bits: int, group: int, columns: int) -> str | None:
    """Why a weight is not for these kernels, or None."""
    if bits not in BITS:
        return f"{bits} bits"
    if columns % ALIGNED[bits] != 0:
        return f"{columns} columns of {bits} bits: rows do not begin at 16 bytes"
    step = COLUMNS[bits]
    if group < columns and (group * GROUPS < step or (step % group != 0 and group % step != 0)):
        return f"groups of {group} columns"
    return None


def declines_tensors(x: Tensor, *tensors: Tensor | None) -> str | None:
    """Why operands are not for these kernels, or None: type, order, alignment."""
    if x.dtype not in TYPES:
        return f"activations of {x.dtype}"
    given = [t for t in (x, *tensors) if t is not None]
    if not all(t.is_contiguous() for t in given):
        return "an operand is not contiguous"
    return None if all(t.data_ptr() % 16 == 0 for t in given) else "an operand does not begin at 16 bytes"


def verify(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> str | None:
    """Why ``group_gemm`` declines, or None."""
    tokens = x.numel() // max(1, x.shape[-1])
    if not 1 <= tokens <= TOKENS or packed.shape[0] == 0:
        return f"{tokens} tokens, {packed.shape[0]} rows"
    return declines_weight(bits, group, x.shape[-1]) or declines_tensors(x, packed, scale, zero)


def verify_routed(x: Tensor, index: Tensor, sides: tuple[Side, Side], intermediate: int, activation: str) -> str | None:
    """Why ``moe_group_gemm`` declines, or None."""
    if not 1 <= x.shape[0] <= TOKENS or not 1 <= index.numel() <= MOST_SLOTS or intermediate == 0:
        return f"{x.shape[0]} tokens, {index.numel()} slots"
    if activation not in ACTIVATIONS:
        return f"activation {activation}"
    for side, columns in zip(sides, (x.shape[1], intermediate)):
        reason = declines_weight(side.bits, side.group, columns)
        if reason is None and not isinstance(side.scale, Tensor):
            reason = "a weight without scales"
        reason = reason or declines_tensors(x, side.weight, side.scale, side.zero, side.bias)
        if reason is not None:
            return reason
    return None


def unavailable() -> str | None:
    """Why the kernels cannot run on this machine, or None; starts no build."""
    from llmcompress_kernels.gpu import no_device

    return no_device() or build.unavailable(FAMILY)


def split(bits: int, tiles: int, experts: int, columns: int, processors: int) -> tuple[int, int]:
    """Parts that the columns are divided into, and steps per part.

    Enough blocks to fill the GPU once or twice, as long as a part keeps four steps: each part begins with an empty
    pipeline and ends in sums that go through memory.

    Args:
        bits: Code width.
        tiles: Tiles of rows.
        experts: Experts that have tokens, at most.
        columns: K.
        processors: Multiprocessors.
    """
    steps = -(-columns // COLUMNS[bits])
    wanted = -(-BLOCKS_PER_PROCESSOR * processors // max(1, tiles * experts))
    each = -(-steps // max(1, min(wanted, steps // STEPS_OF_A_PART)))
    return -(-steps // each), each


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    library: Any = None,
    processors: int | None = None,
) -> Tensor:
    """``x Wᵀ``; arguments as in :func:`llmcompress_kernels.ops.group_gemm`, which :func:`verify` has accepted.

    Sums in fp32. ``library`` is the emulation of the tests, on CPU tensors; ``processors`` decides how often the
    columns are split, None asks the GPU.

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    rows, tokens = packed.shape[0], x.numel() // in_features
    out = x.new_empty((*x.shape[:-1], rows))
    tiles = -(-rows // ROWS)
    splits, steps = split(bits, tiles, 1, in_features, processors or _processors(x.device))
    side = Side(packed, scale, zero, None, bits, group_size)
    parts = None if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)
    call = _call("dense", x, side, out, parts, tokens, 1, 1, rows, in_features, splits, steps)
    _launch(call, side, x, None if splits == 1 else tiles, library)
    return out


def moe_group_gemm(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    sides: tuple[Side, Side],
    intermediate: int,
    activation: str,
    alpha: float,
    limit: float,
    library: Any = None,
    processors: int | None = None,
) -> Tensor:
    """Gated experts over routed tokens; arguments as in :func:`llmcompress_kernels.ops.moe_group_gemm`.

    See :func:`group_gemm` for ``library``, ``processors`` and errors.
    """
    (tokens, hidden), slots, experts = x.shape, index.shape[-1], sides[0].weight.shape[0]
    index, share = index.contiguous(), weights.to(torch.float32).contiguous()
    count, processors = tokens * slots, processors or _processors(x.device)
    busy = min(experts, count)
    gate_up, down = (_with_bias(side, x.dtype) for side in sides)

    tiles = -(-intermediate // (ROWS // 2))
    splits, steps = split(gate_up.bits, tiles, busy, hidden, processors)
    inner = x.new_empty((count, intermediate))
    parts = None if splits == 1 else x.new_empty((splits, count, 2 * intermediate), dtype=torch.float32)
    call = _call("gate_up", x, gate_up, inner, parts, tokens, slots, experts, intermediate, hidden, splits, steps)
    call.index, call.activation, call.alpha, call.limit = index.data_ptr(), ACTIVATIONS.index(activation), alpha, limit
    _launch(call, gate_up, x, None if splits == 1 else tiles * experts, library)

    tiles, out = -(-hidden // ROWS), torch.empty_like(x)
    splits, steps = split(down.bits, tiles, busy, intermediate, processors)
    parts = x.new_empty((splits, count, hidden), dtype=torch.float32)
    call = _call("down", inner, down, out, parts, tokens, slots, experts, hidden, intermediate, splits, steps)
    call.index, call.share = index.data_ptr(), share.data_ptr()
    _launch(call, down, x, tiles, library)
    return out


def _with_bias(side: Side, dtype: torch.dtype) -> Side:
    if side.bias is None or side.bias.dtype == dtype:
        return side
    return Side(side.weight, side.scale, side.zero, side.bias.to(dtype), side.bits, side.group)


def _call(
    mode: str,
    x: Tensor,
    side: Side,
    out: Tensor,
    parts: Tensor | None,
    tokens: int,
    slots: int,
    experts: int,
    rows: int,
    columns: int,
    splits: int,
    steps: int,
) -> Call:
    """The launch but for routing and counters; the tensors have to outlive it."""
    address = lambda t: None if t is None else t.data_ptr()  # noqa: E731
    # whole rows have one group; a multiple of a step says so to the kernel without a special case
    group = side.group if side.group < columns else -(-columns // COLUMNS[side.bits]) * COLUMNS[side.bits]
    return Call(
        x=address(x), weight=address(side.weight), scale=address(side.scale), zero=address(side.zero),
        bias=address(side.bias), out=address(out), parts=address(parts), words=side.weight.shape[-1],
        groups=side.scale.shape[-1], zero_words=0 if side.zero is None else side.zero.shape[-1], tokens=tokens,
        slots=slots, experts=experts, rows=rows, columns=columns, group=group, splits=splits, steps=steps,
        mode=MODES[mode], at_once=min(tokens, TOKENS),
    )  # fmt: skip


def _launch(call: Call, side: Side, x: Tensor, counters: int | None, library: Any) -> None:
    held = None if counters is None else arrivals(counters, x.device)
    call.arrived = None if held is None else held.data_ptr()
    arguments = (ctypes.byref(call), side.bits, int(x.dtype == torch.bfloat16), 1 if call.at_once <= TOKENS // 2 else 2)
    if library is not None:
        _check(library, library.llmcompress_skinny(*arguments, None))
        return
    library = build.load(FAMILY)
    # the library's own copy of CUDA's run time is told the device as well; on leaving, PyTorch's is what it was
    with torch.cuda.device(x.device):
        _check(library, library.llmcompress_skinny_device(x.device.index or 0))
        stream = ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream)
        _check(library, library.llmcompress_skinny(*arguments, stream))


def _check(library: Any, code: int) -> None:
    if code == 0:
        return
    told = f"code {code}"
    if hasattr(library, "llmcompress_skinny_error"):
        library.llmcompress_skinny_error.restype = ctypes.c_char_p
        told = library.llmcompress_skinny_error(code).decode()
    raise RuntimeError(f"a launch of the {FAMILY} kernels failed: {told}")


_STREAMS: dict[tuple[int, int], Tensor] = {}
_GRAPHS: dict[int, tuple[Tensor, int]] = {}


def arrivals(count: int, device: torch.device) -> Tensor:
    """``count`` zeros for launches to count arrivals with; a launch leaves them zero.

    Launches of one stream follow one another and share theirs. A graph may run beside anything, so what it captures
    gets counters that nobody else ever gets; they come from a reserve made before, or from a fill in the graph.
    """
    if device.type != "cuda":
        return torch.zeros(count, dtype=torch.int32, device=device)
    number = device.index if device.index is not None else torch.cuda.current_device()
    if torch.cuda.is_current_stream_capturing():
        reserve, used = _GRAPHS.get(number, (None, 0))
        if reserve is None or used + count > reserve.numel():
            return torch.zeros(count, dtype=torch.int32, device=device)
        _GRAPHS[number] = (reserve, used + count)
        return reserve[used : used + count]
    if number not in _GRAPHS:
        _GRAPHS[number] = (torch.zeros(RESERVED, dtype=torch.int32, device=device), 0)
        torch.cuda.synchronize(device)
    key = (number, torch.cuda.current_stream(device).cuda_stream)
    if key not in _STREAMS or _STREAMS[key].numel() < count:
        _STREAMS[key] = torch.zeros(max(count, 4096), dtype=torch.int32, device=device)
    return _STREAMS[key]


def _processors(device: torch.device) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)
