"""The C library's heap: which blocks are mapped by themselves, and when freed memory goes back. Torch-free; glibc only.

Blocks in the heap are cheap to take again and leave holes; mapped ones cost a page fault per 4 KiB each time they are
touched anew, and leave nothing. Elsewhere than on glibc every function here does nothing and says so.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

MIB = 1 << 20
# blocks of this size are mapped where :func:`keep_freed_memory` does not spare; smaller ones come from what was freed
MAPPED = 8 * MIB
# <malloc.h>
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
# torch's own switch: tensors of 2 MiB and more lie in huge pages. Read at the first tensor of a process
_HUGE_PAGES = "THP_MEM_ALLOC_ENABLE"


def _libc(name: str) -> Callable[..., int] | None:
    """A function of the C library, None where it has none of that name."""
    try:
        found: Callable[..., int] = getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError, TypeError):  # not glibc
        return None
    return found


def _map_from(size: int) -> bool:
    """Map blocks of this many bytes and more by themselves; fixes a limit that glibc would move by itself."""
    mallopt = _libc("mallopt")
    return mallopt is not None and bool(mallopt(_M_MMAP_THRESHOLD, size))


def keep_freed_memory(sparing: bool = False) -> bool:
    """Let glibc's allocator keep freed batches for the next one, instead of giving them back to the kernel.

    By default every tensor above 128 KiB to 32 MiB (a moving limit) is mapped anew, and touching new memory
    costs a page fault per 4 KiB: an eighth of the time of a GPTQ run of a 135 M model. Larger tensors, such as a
    solver's matrices, still come and go one by one: kept in the heap they would leave holes, and raise the peak.

    Args:
        sparing: For runs with a budget of memory: weights of 1 to 8 MiB are mapped too. A model of 1.2 GB, 4 MiB to
            an expert, peaked anywhere from 0.88 to 1.05 GiB from run to run with them in the heap, and at 0.88 GiB
            so, in 1.2 times the time. What is mapped is asked for in huge pages then, a page fault per 2 MiB instead
            of 4 KiB: that model took 31.2 and 31.5 s instead of 35.1, 3.5 s less of it in the kernel, at the same peak
            (alone on two cores, one thread). Without a budget most memory is taken again, and they did not pay: OLMoE
            spent more time in the kernel, clearing them.

    Returns:
        Whether the C library has these settings.
    """
    if sparing:
        os.environ.setdefault(_HUGE_PAGES, "1")
    mallopt = _libc("mallopt")
    return _map_from(MIB if sparing else MAPPED) and mallopt is not None and bool(mallopt(_M_TRIM_THRESHOLD, 32 * MIB))


@contextmanager
def whole_models(sparing: bool = False) -> Iterator[None]:
    """Within, blocks of 1 MiB and more are mapped too; afterwards as :func:`keep_freed_memory` has it.

    For code that holds one whole model after another. Weights of 1 to 8 MiB lie in the heap otherwise, between
    activations, and what is freed around those that live stays with the process: evaluating a model of 135 M parameters
    peaked anywhere from 1.74 to 2.08 GB from run to run, and at 1.72 GB so, in the same time.

    Args:
        sparing: Whether it was ``sparing`` before; glibc can be told and not asked.
    """
    _map_from(MIB)
    try:
        yield
    finally:
        keep_freed_memory(sparing)


def give_back_memory() -> bool:
    """Return the heap's freed pages to the system (``malloc_trim``).

    Returns:
        Whether it could.
    """
    trim = _libc("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True
