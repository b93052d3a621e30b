"""``dsq_state_update`` and ``dsq_replay_update`` in CUDA C++; ``csrc/cuda/state/{update,read}.cuh`` say how.

One token of heads with P = 64 and N = 64 or 128, the sizes of the released Mamba-2 models; within windows of up to 16
tokens with 4 bits. Triton takes whatever this declines.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels.cuda import library as libraries

FAMILY, REPLAY = "state-cuda", "replay-cuda"
CHANNELS, STATES, BITS = 64, (64, 128), (4, 8)
# of launch.h: rows and lanes that share a row, 2 x 4, 4 x 8 and 4 x 4. The last does the least per state, the second
# has the most threads.
SMALL, LARGE = 1, 2
# only in libraries compiled for benches (LLMCOMPRESS_TUNE), 4 bits and N = 128: by the arithmetic of nibbles.cuh the
# same two, and LARGE with six blocks a multiprocessor; then LARGE with six blocks by that of update.cuh
CANDIDATES = (3, 4, 5, 6)
# heads from which on the GPU is full either way
FULL = 4096

# of windows; MOST_ROWS of window.cuh
REPLAY_BITS, MOST_ROWS, MOST_SEQUENCES = 4, 15, 65535
# warps of a block that reads: 4 take 188 us where 8 take 201 (512 sequences in windows of 4 on an H200)
READERS = (4, 8)
# likewise of benches: 4 warps that ask for everything early, as four or five blocks
EARLY_READERS = (44, 45)

libraries.register(FAMILY, "state/update.cu")
libraries.register(REPLAY, "state/replay.cu")


class Call(ctypes.Structure):
    """What one launch is told, as in ``csrc/cuda/state/call.h``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "channel", "scale", "fixed", "drive", "decay", "b", "c", "out")
        ),
        *(
            (name, ctypes.c_int)
            for name in ("units", "heads", "share", "bits", "states", "blocks", "dither", "overlap")
        ),
    )


class ReplayCall(ctypes.Structure):
    """The same within replay windows."""

    _fields_ = (
        ("token", Call),
        *((name, ctypes.c_void_p) for name in ("recent", "count", "arrived")),
        *((name, ctypes.c_int) for name in ("rows", "sequences", "groups", "width")),
    )


def verify(
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
) -> str | None:
    """Why :func:`dsq_state_update` declines, or None."""
    if refit and fixed is None:
        return "the channel scale is fitted to the codes"
    if drive.shape[-1] != CHANNELS or scale.shape[-1] not in STATES or bits not in BITS:
        return f"P = {drive.shape[-1]}, N = {scale.shape[-1]}, {bits} bits"
    if drive.numel() == 0 or drive.shape[0] * drive.shape[1] >= 1 << 30:
        return f"{drive.shape[0]} sequences of {drive.shape[1]} heads"
    if any(t.dtype != torch.float32 for t in (drive, decay, b, c)):
        return "operands that are not float32"
    return libraries.declines_tensors(codes, channel, scale, fixed)


def unavailable(family: str = FAMILY) -> str | None:
    """Why a family's kernels cannot run on this machine, or None; starts no build."""
    return libraries.unavailable(family)


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
    library: Any = None,
    variant: int | None = None,
    family: str = FAMILY,
    overlap: bool = False,
) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.state.dsq_state_update`, which :func:`verify` has accepted.

    ``library`` is the emulation of the tests, on CPU tensors; ``variant`` and ``family`` are for benches, and so is
    ``overlap``: whether the launch may begin while the one in front still runs (compute capability 9.0).

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    drive, decay, b, c = (libraries.placed(t) for t in (drive, decay, b, c))
    out = torch.empty_like(drive)
    call = _call(codes, channel, scale, fixed, drive, decay, b, c, out, bits, dither, overlap)
    chosen = (_variant(drive) if variant is None else variant,)
    libraries.launch(family, "llmcompress_state", "llmcompress_state_update", call, chosen, drive, library)
    return out


def _call(*given: Any) -> Call:
    """Tensors from ``codes`` to ``out``, bits, dither, overlap."""
    *tensors, bits, dither, overlap = given
    scale, drive, b = tensors[2], tensors[4], tensors[6]
    sequences, heads, _ = drive.shape
    return Call(
        *(libraries.address(t) for t in tensors),
        sequences * heads, heads, heads // b.shape[1], bits, scale.shape[-1], 0, int(dither), int(overlap),
    )  # fmt: skip


def _variant(drive: Tensor) -> int:
    return LARGE if drive.shape[0] * drive.shape[1] >= FULL else SMALL


def verify_replay(
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
) -> str | None:
    """Why :func:`dsq_replay_update` declines, or None."""
    if bits != REPLAY_BITS or not 1 <= recent.shape[1] <= MOST_ROWS:
        return f"{bits} bits, a window of {recent.shape[1] + 1}"
    if (
        drive.shape[0] > MOST_SEQUENCES
        or drive.shape[1] % 4
        or recent.dtype != torch.float32
        or count.dtype != torch.int32
    ):
        return f"{drive.shape[0]} sequences of {drive.shape[1]} heads, or a window of {recent.dtype} and {count.dtype}"
    why = verify(codes, channel, scale, fixed, drive, decay, b, c, bits, refit, dither)
    return why or libraries.declines_tensors(recent) or (None if count.is_contiguous() else "count is not contiguous")


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
    library: Any = None,
    variant: int | None = None,
    readers: int = READERS[0],
    family: str = REPLAY,
    overlap: bool = False,
) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.state.dsq_replay_update`, which :func:`verify_replay` has accepted.

    Two launches: one for the sequences that are rounded, by ``variant``, and one for the others, by blocks of this many
    ``readers``. ``library``, ``family`` and ``overlap`` as in :func:`dsq_state_update`; with the latter the second
    launch runs beside the first.

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    drive, decay, b, c = (libraries.placed(t) for t in (drive, decay, b, c))
    out, sequences = torch.empty_like(drive), drive.shape[0]
    arrived = libraries.arrivals(sequences, drive.device)
    call = ReplayCall(
        _call(codes, channel, scale, fixed, drive, decay, b, c, out, bits, dither, overlap),
        *(t.data_ptr() for t in (recent, count, arrived)),
        recent.shape[1], sequences, b.shape[1], recent.shape[2],
    )  # fmt: skip
    chosen = (_variant(drive) if variant is None else variant, readers)
    libraries.launch(family, "llmcompress_replay", "llmcompress_replay_update", call, chosen, drive, library)
    return out
