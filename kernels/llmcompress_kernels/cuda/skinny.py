"""``group_gemm`` and ``moe_group_gemm`` for a few tokens in CUDA C++; ``csrc/cuda/skinny/skinny.cuh`` says how.

They read the stored order like the Triton kernels, which take over whatever these decline. Two launches serve a
block of experts: gate, up and activation; down projection and the weighted sum over a token's slots.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build
from llmcompress_kernels.cuda import launches, toolchain
from llmcompress_kernels.cuda import library as libraries
from llmcompress_kernels.cuda.launches import Launch

FAMILY = "skinny"
BITS = (2, 3, 4)
# most tokens of a dense product, and most slots per expert on average; beyond, other kernels are faster
TOKENS, SLOTS_PER_EXPERT = 16, 16
MOST_SLOTS = 1024
# shape.cuh: rows of a warp, slots of a matrix instruction, columns of a step and units of one
STRIP, TILE, COLUMNS, UNITS = 32, 8, {2: 512, 3: 256, 4: 256}, 8
# spans.cuh: columns of a span, and bytes of a stage
SPAN, SPANS, STAGE = 128, 4, {2: 32 * (128 + 32), 3: 32 * (208 + 32), 4: 32 * (256 + 32)}
STRIP_WARPS, TEAMS = 8, (1, 2, 4, 8)
# warps that the registers of a multiprocessor are enough for, with up to 8 and up to 16 slots at once
WARPS_AT_ONCE = (12, 8)
# slots of a launch whose results a block keeps
MOST_KEPT = 256
# columns of a row whose words begin at 16 bytes
ALIGNED = {2: 64, 3: 128, 4: 32}
MODES = {"dense": 0, "gate_up": 1, "down": 2}
ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh", "gpt_oss")
TYPES = (torch.bfloat16, torch.float16)
# warps that the registers of a multiprocessor are enough for, with up to 8 and up to 16 slots at once
MOST_WARPS = (16, 12)
# bytes of shared memory of a block, and of a multiprocessor, of which every block takes 1024 more than it asks for
SHARED_OF_A_BLOCK, SHARED = {8: 163 << 10, 9: 227 << 10}, {8: 164 << 10, 9: 228 << 10}
# steps that a block has at least, and blocks that share a strip at most: the last of them adds what all have summed
LEAST_STEPS, MOST_PIECES = 2, 32

build.register(
    build.Family(
        FAMILY,
        ("cuda/skinny/*.cu",),
        headers=("cuda/skinny/*.h", "cuda/skinny/*.cuh", "cuda/common/*"),
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
        *((name, ctypes.c_int) for name in ("mode", "activation", "at_once", "blocks", "warps", "stages")),
        *((name, ctypes.c_int) for name in ("room", "least", "pieces")),
        *((name, ctypes.c_int) for name in ("height", "teams", "teams_log", "members", "tiles", "rounds", "jobs")),
        ("overlap", ctypes.c_int),
        *((name, ctypes.c_float) for name in ("alpha", "limit")),
    )


@dataclass(frozen=True, slots=True)
class Device:
    """What a launch has to know of a GPU.

    Attributes:
        processors: Multiprocessors.
        major: Compute capability, first number.
    """

    processors: int
    major: int


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
    if group < columns and group % step != 0 and (step % group != 0 or group * UNITS < step):
        return f"groups of {group} columns"
    return None


def declines_tensors(x: Tensor, *tensors: Tensor | None) -> str | None:
    """Why operands are not for these kernels, or None: type, order, alignment."""
    if x.dtype not in TYPES:
        return f"activations of {x.dtype}"
    return libraries.declines_tensors(x, *tensors)


def verify(x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int) -> str | None:
    """Why ``group_gemm`` declines, or None."""
    tokens = x.numel() // max(1, x.shape[-1])
    if not 1 <= tokens <= TOKENS or packed.shape[0] == 0:
        return f"{tokens} tokens, {packed.shape[0]} rows"
    return declines_weight(bits, group, x.shape[-1]) or declines_tensors(x, packed, scale, zero)


def verify_routed(x: Tensor, index: Tensor, sides: tuple[Side, Side], intermediate: int, activation: str) -> str | None:
    """Why ``moe_group_gemm`` declines, or None."""
    experts = sides[0].weight.shape[0]
    if not 1 <= index.numel() <= min(MOST_SLOTS, SLOTS_PER_EXPERT * experts) or intermediate == 0:
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
    return libraries.unavailable(FAMILY)


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    launch: Launch | None = None,
    library: Any = None,
    device: Device | None = None,
) -> Tensor:
    """``x Wᵀ``; arguments as in :func:`llmcompress_kernels.ops.group_gemm`, which :func:`verify` has accepted.

    Sums in fp32. ``library`` is the emulation of the tests, on CPU tensors, for a ``device`` that is not there.

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    rows, tokens = packed.shape[0], x.numel() // in_features
    out = x.new_empty((*x.shape[:-1], rows))
    at_once = min(tokens, 2 * TILE)
    side = Side(packed, scale, zero, None, bits, group_size)
    call = _call("dense", x, side, out, tokens, 1, 1, rows, in_features, at_once)
    _launch(call, side, x, launch, library, device)
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
    chosen: tuple[Launch | None, Launch | None] = (None, None),
    library: Any = None,
    device: Device | None = None,
) -> Tensor:
    """Gated experts over routed tokens; arguments as in :func:`llmcompress_kernels.ops.moe_group_gemm`.

    See :func:`group_gemm` for ``library``, ``device`` and errors.
    """
    (tokens, hidden), slots, experts = x.shape, index.shape[-1], sides[0].weight.shape[0]
    index, share = index.contiguous(), weights.to(torch.float32).contiguous()
    count = tokens * slots
    at_once = min(tokens, at_once_of(count, experts))
    gate_up, down = (_with_bias(side, x.dtype) for side in sides)

    inner = x.new_empty((count, intermediate))
    call = _call("gate_up", x, gate_up, inner, tokens, slots, experts, intermediate, hidden, at_once)
    call.index, call.activation, call.alpha, call.limit = index.data_ptr(), ACTIVATIONS.index(activation), alpha, limit
    _launch(call, gate_up, x, chosen[0], library, device)

    out = torch.empty_like(x)
    call = _call("down", inner, down, out, tokens, slots, experts, hidden, intermediate, at_once)
    call.index, call.share = index.data_ptr(), share.data_ptr()
    _launch(call, down, x, chosen[1], library, device)
    return out


def at_once_of(count: int, experts: int) -> int:
    """Slots of an expert that one pass over its weights should serve, 8 or 16.

    A second pass costs the weights again; a wider one costs shared memory and products whether it is full or not. With
    uniform routing more than twice the average is rare.
    """
    return TILE if 2 * count <= TILE * experts else 2 * TILE


def _with_bias(side: Side, dtype: torch.dtype) -> Side:
    if side.bias is None or side.bias.dtype == dtype:
        return side
    return Side(side.weight, side.scale, side.zero, side.bias.to(dtype), side.bits, side.group)


def _call(
    mode: str,
    x: Tensor,
    side: Side,
    out: Tensor,
    tokens: int,
    slots: int,
    experts: int,
    rows: int,
    columns: int,
    at_once: int,
) -> Call:
    """The launch but for routing, memory and how it is cut up; the tensors have to outlive it."""
    # whole rows have one group; a multiple of a step says so to the kernel without a special case
    group = side.group if side.group < columns else -(-columns // COLUMNS[side.bits]) * COLUMNS[side.bits]
    address = libraries.address
    return Call(
        x=address(x), weight=address(side.weight), scale=address(side.scale), zero=address(side.zero),
        bias=address(side.bias), out=address(out), words=side.weight.shape[-1],
        groups=side.scale.shape[-1], zero_words=0 if side.zero is None else side.zero.shape[-1], tokens=tokens,
        slots=slots, experts=experts, rows=rows, columns=columns, group=group, mode=MODES[mode], at_once=at_once,
    )  # fmt: skip


def shared(bits: int, call: Call) -> int:
    """Bytes of shared memory of a block, as ``Memory`` of activations.cuh has them."""
    up = lambda count: -(-count // 16) * 16  # noqa: E731
    step, dense = COLUMNS[bits], call.mode == MODES["dense"]
    slots, experts = (0, 0) if dense else (call.tokens * call.slots, call.experts)
    jobs = min(slots, experts + slots // call.at_once)
    spans = 1 if call.group >= step else step // call.group
    tiles = 1 if call.at_once <= TILE else 2
    tables = 64 + 2 * up(4 * experts) + up(2 * jobs) + 3 * up(2 * slots) + 2 * tiles * TILE
    tables += up(call.warps * jobs) if call.mode == MODES["down"] else 0
    stage = STRIP * (step * bits // 8 + 16) + 8 * STRIP * spans
    return tables + call.room + call.warps * call.stages * stage


def _x_bytes(bits: int, call: Call, steps: int) -> int:
    """Bytes of a job's activations for this many steps, with the sums that belong to them."""
    tiles, spans = -(-call.at_once // TILE), max(1, COLUMNS[bits] // call.group)
    sums = 8 * TILE * tiles * spans * steps
    return call.at_once * (2 * COLUMNS[bits] * steps + (16 if bits == 2 else 64)) + sums


def whole_strips(call: Call) -> bool:
    """Whether blocks can take whole strips: groups of 128 columns or multiples, and few enough results to keep."""
    kept = call.tokens * call.slots if call.mode == MODES["down"] else 0
    return call.group % SPAN == 0 and kept <= MOST_KEPT


def shared_of_strips(bits: int, call: Call) -> int:
    """Bytes of shared memory of a block that takes whole strips, as ``Places`` of spans.cuh has them."""
    up = lambda count: -(-count // 16) * 16  # noqa: E731
    dense = call.mode == MODES["dense"]
    slots, experts = (0, 0) if dense else (call.tokens * call.slots, call.experts)
    jobs = min(slots, experts + slots // call.at_once)
    tiles = 1 if call.at_once <= TILE else 2
    tables = 16 + 2 * up(4 * experts) + up(2 * jobs) + 3 * up(2 * slots) + 2 * tiles * TILE
    tables += call.warps * 4 * (STRIP + 4) * call.at_once
    tables += 4 * STRIP * call.teams * slots if call.mode == MODES["down"] else 0
    return tables + call.room + call.warps * call.stages * STAGE[bits]


def _x_of_strips(call: Call, rounds: int) -> int:
    """Bytes of a job's activations for this many rounds of steps, with the sums that belong to them."""
    tiles, spans = -(-call.at_once // TILE), rounds * call.members * SPANS
    return call.at_once * (2 * SPAN * spans + 64) + tiles * 8 * TILE * spans


def cut_by_strips(call: Call, bits: int, launch: Launch, device: Device) -> None:
    """Write into ``call`` how whole strips are shared out.

    A tile is a strip per team of warps, whose members share its columns. Teams, members and the rows of a strip are
    those that :func:`_cost` finds best.

    Raises:
        RuntimeError: Not even one block fits.
    """
    given = tuple(getattr(call, name) for name in _GIVEN)
    for name, value in zip(_CHOSEN, _strips(given, bits, launch, device)):
        setattr(call, name, value)


_GIVEN = ("mode", "tokens", "slots", "experts", "rows", "columns", "group", "at_once")
_CHOSEN = (
    "teams", "teams_log", "members", "rounds", "warps", "stages",
    "room", "height", "tiles", "jobs", "blocks", "overlap",
)  # fmt: skip


@cache
def _strips(given: tuple[int, ...], bits: int, launch: Launch, device: Device) -> tuple[int, ...]:
    """The values of ``_CHOSEN`` for those of ``_GIVEN``."""
    call = Call(**dict(zip(_GIVEN, given)))
    steps = -(-call.columns // (SPANS * SPAN))
    major = 9 if device.major >= 9 else 8
    call.overlap = int(launch.overlap and device.major >= 9)
    call.jobs = -(-call.tokens // call.at_once)
    most = min(launch.warps, STRIP_WARPS)
    blocks = max(1, min(launch.blocks, WARPS_AT_ONCE[call.at_once > TILE] // most))
    limit = min(SHARED_OF_A_BLOCK[major], SHARED[major] // blocks - 1024)
    best: tuple[float, tuple[int, ...]] | None = None
    for call.teams_log, call.teams in enumerate(TEAMS):
        if launch.teams not in (0, call.teams):
            continue
        for members in range(most // call.teams, 0, -1):
            call.rounds = -(-steps // members)
            call.members = -(-steps // call.rounds)
            call.warps = call.teams * call.members
            if _fits(call, bits, limit, launch.stages):
                break
        else:
            continue
        for call.height in range(STRIP, 3, -2):
            cost = _cost(call, steps, blocks, device.processors)
            if best is None or cost < best[0]:
                # no more than have something to do, so that these are spread over all multiprocessors
                call.blocks = min(blocks * device.processors, call.tiles * _most_jobs(call))
                best = cost, tuple(getattr(call, name) for name in _CHOSEN)
    if best is None:
        raise RuntimeError("a block does not fit the GPU's shared memory")
    return best[1]


def _fits(call: Call, bits: int, limit: int, stages: int) -> bool:
    """Choose the stages, and the room for activations that they leave of ``limit`` bytes; whether that is enough."""
    for call.stages in range(max(2, min(stages, 4)), 1, -1):
        call.room = 0
        call.room = min(limit - shared_of_strips(bits, call), _x_of_strips(call, call.rounds)) // 16 * 16
        if call.room >= _x_of_strips(call, 1):
            return True
    return False


def _most_jobs(call: Call) -> int:
    """Jobs that share out the tiles, whatever the routing."""
    if call.mode == MODES["gate_up"]:
        return min(call.tokens * call.slots, call.experts + call.tokens * call.slots // call.at_once)
    return call.jobs if call.mode == MODES["dense"] else 1


def _cost(call: Call, steps: int, blocks: int, processors: int) -> float:
    """About what a multiprocessor takes, in rows of a step; writes the tiles of a job into ``call``."""
    jobs, pair = call.jobs if call.mode == MODES["dense"] else 1, 1
    if call.mode == MODES["gate_up"]:
        jobs, pair = min(call.tokens * call.slots, call.experts), 2
    call.tiles = -(-call.rows * pair // (call.height * call.teams))
    units = call.tiles * jobs
    visits = -(-units // (blocks * processors)) * blocks if units > processors else 1
    # what is read, and the products: those of a warp's step take the time of about 20 rows, however few there are. Both
    # go on at the same time, the less the better all the same
    read, products = call.teams * call.height * steps, 20 * call.warps * call.rounds
    each = max(read, products) + min(read, products) / 4
    # the end of a tile, and slices of activations that come one after the other
    return float(visits * (each + 100 + 40 * -(-_x_of_strips(call, call.rounds) // call.room)))


def cut(call: Call, bits: int, launch: Launch, device: Device) -> int:
    """Write into ``call`` how it is cut up; returns the pieces of memory that strips need.

    Activations get the shared memory that the pipeline leaves, up to whole rows. Where that is not even two steps,
    fewer stages and then fewer blocks share a multiprocessor.

    Raises:
        RuntimeError: Not even one block fits; shapes that :func:`verify` accepts do.
    """
    if launch.whole and whole_strips(call):
        cut_by_strips(call, bits, launch, device)
        return 0
    if launch.whole:
        mode = next(name for name, number in MODES.items() if number == call.mode)
        launch = launches.shared(mode, call.tokens)
    call.height = 0
    steps = -(-call.columns // COLUMNS[bits])
    major = 9 if device.major >= 9 else 8
    most = MOST_WARPS[call.at_once > TILE]
    call.warps, call.stages, call.least = (
        min(launch.warps, most),
        launch.stages,
        max(LEAST_STEPS, -(-steps // MOST_PIECES)),
    )
    call.overlap = int(launch.overlap and device.major >= 9)
    blocks = min(launch.blocks, most // call.warps)
    while True:
        room = min(SHARED_OF_A_BLOCK[major], SHARED[major] // blocks - 1024)
        call.room = 0
        call.room = min(room - shared(bits, call), _x_bytes(bits, call, steps)) // 16 * 16
        if call.room >= _x_bytes(bits, call, min(steps, 2)):
            break
        if call.stages > 3:
            call.stages -= 1
        elif blocks > 1:
            blocks -= 1
        elif call.warps > 1:
            call.warps //= 2
        else:
            raise RuntimeError("a block does not fit the GPU's shared memory")
    strip = STRIP // 2 if call.mode == MODES["gate_up"] else STRIP
    tiles = -(-call.rows // (strip * call.warps))
    jobs = -(-call.tokens // call.at_once)
    if call.mode != MODES["dense"]:
        jobs = min(call.tokens * call.slots, call.experts + call.tokens * call.slots // call.at_once)
    call.blocks = max(1, min(blocks * device.processors, (2**32 - 1) // (jobs * tiles * steps + 1)))
    # a block has at least this many steps, whatever the routing
    each = max(call.least, tiles * steps // call.blocks)
    call.pieces = min(steps, -(-steps // each) + 1)
    return jobs * tiles * call.warps if call.mode != MODES["down"] else tiles * call.warps


def _launch(call: Call, side: Side, x: Tensor, launch: Launch | None, library: Any, device: Device | None) -> None:
    tiles = 1 if call.at_once <= TILE else 2
    mode = next(name for name, number in MODES.items() if number == call.mode)
    launch = launch or launches.pick(mode, side.bits, call.tokens, call.rows, call.columns, x.device)
    counters = cut(call, side.bits, launch, device or _device(x.device))
    width = call.rows * (2 if mode == "gate_up" else 1)
    parts = x.new_empty((call.pieces, call.tokens * call.slots, width), dtype=torch.float32)
    held = libraries.arrivals(counters, x.device) if counters else parts
    call.parts, call.arrived = parts.data_ptr(), held.data_ptr()
    arguments = (int(x.dtype == torch.bfloat16), tiles)
    libraries.launch(FAMILY, "llmcompress_skinny", f"llmcompress_skinny_{side.bits}", call, arguments, x, library)


def _device(device: torch.device) -> Device:
    return _properties(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _properties(number: int) -> Device:
    found = torch.cuda.get_device_properties(number)
    return Device(found.multi_processor_count, found.major)
