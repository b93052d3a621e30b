"""Tensors in huge pages, for what is read as a stream: weights in the order of the CPU kernels, recurrent states.

A product that reads from memory leaves a page of 4 KiB behind every microsecond or less, and has to find the next one's
address first, through two levels of tables on a virtual machine. Linux gives huge pages to who asks for them before the
memory is touched.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# a huge page on x86 and, with the usual granule, on Arm
HUGE = 2 << 20


@functools.cache
def _madvise() -> Callable[..., int] | None:
    """The C library's function, None where it or huge pages are missing."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    try:
        found: Callable[..., int] = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):
        return None
    return found


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A new tensor, not filled; on a CPU in huge pages, if the system has them and it takes :data:`HUGE` bytes."""
    out = torch.empty(shape, dtype=dtype, device=device)
    advise = _madvise()
    if device.type == "cpu" and out.nbytes >= HUGE and advise is not None:
        # whole pages: the allocator's header is on the first, and a huge page begins there or not at all
        begin = out.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(out.data_ptr() + out.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(mmap.MADV_HUGEPAGE))
    return out


def zeros(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Like :func:`empty`, on the CPU and filled."""
    return empty(shape, dtype, torch.device("cpu")).zero_()
