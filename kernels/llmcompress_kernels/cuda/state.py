"""``dsq_state_update`` in CUDA C++; ``csrc/cuda/state/update.cuh`` says how.

One token of heads with P = 64 and N = 64 or 128, the sizes of the released Mamba-2 models. Triton takes whatever this
declines.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels.cuda import library as libraries

FAMILY = "state-cuda"
CHANNELS, STATES, BITS = 64, (64, 128), (4, 8)
# of launch.h: rows and lanes that share a row, 2 x 4, 4 x 8 and 4 x 4. The last does the least per state, the second
# has the most threads.
SMALL, LARGE = 1, 2
# heads from which on the GPU is full either way
FULL = 4096

libraries.register(FAMILY, "state/update.cu")


class Call(ctypes.Structure):
    """What one launch is told, as in ``csrc/cuda/state/call.h``."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("codes", "channel", "scale", "fixed", "drive", "decay", "b", "c", "out")
        ),
        *((name, ctypes.c_int) for name in ("units", "heads", "share", "bits", "states", "blocks", "dither")),
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


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, or None; starts no build."""
    return libraries.unavailable(FAMILY)


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
) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.state.dsq_state_update`, which :func:`verify` has accepted.

    ``library`` is the emulation of the tests, on CPU tensors; ``variant`` and ``family`` are for benches.

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    sequences, heads, _ = drive.shape
    drive, decay, b, c = (libraries.placed(t) for t in (drive, decay, b, c))
    out = torch.empty_like(drive)
    if variant is None:
        variant = LARGE if sequences * heads >= FULL else SMALL
    call = Call(
        *(libraries.address(t) for t in (codes, channel, scale, fixed, drive, decay, b, c, out)),
        sequences * heads, heads, heads // b.shape[1], bits, scale.shape[-1], 0, int(dither),
    )  # fmt: skip
    libraries.launch(family, "llmcompress_state", "llmcompress_state_update", call, (variant,), drive, library)
    return out
