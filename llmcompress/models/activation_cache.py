"""Memory for activations: the heap up to a limit, beyond it files whose pages are given up after use.

A tensor in a file is a shared mapping of a file that has no name any more, so that a kill leaves nothing behind. Its
pages count as resident memory while they are mapped; :meth:`ActivationCache.drop` unmaps them, their values stay in the
system's page cache or go to the disk. Code that works on such a tensor drops it after every batch and is otherwise
the same, so where a tensor lies changes no bit of a result.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import tempfile
import weakref
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from llmcompress.errors import ResourceError
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# <sys/mman.h>, Linux
_MADV_DONTNEED = 4


class ActivationCache:
    """Allocates tensors for activations.

    Args:
        limit: Bytes on the heap; None for no limit. Without a folder there is none either.
        folder: Where files go; created when the first is needed.

    Attributes:
        spilled: Largest number of bytes that lay in files at once.
    """

    def __init__(self, limit: int | None = None, folder: Path | None = None) -> None:
        self._limit, self._folder = (None if folder is None else limit), folder
        self._held = self._in_files = self.spilled = 0
        self._mapped: dict[int, int] = {}

    def empty(self, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
        """An uninitialised tensor; on a device it is an ordinary one.

        Raises:
            ResourceError: The disk is full.
        """
        size = prod(shape) * dtype.itemsize
        if torch.device(device).type != "cpu" or self._limit is None or self._held + size <= self._limit or size == 0:
            made = torch.empty(tuple(shape), dtype=dtype, device=device)
            if made.device.type == "cpu":
                self._held += size
                weakref.finalize(made, self._give_back, size)
            return made
        return self._in_file(tuple(shape), dtype, size)

    def copy(self, tensor: Tensor) -> Tensor:
        """A copy of ``tensor``, made without reading more than a part of it at a time."""
        made = self.empty(tensor.shape, tensor.dtype, tensor.device)
        for target, source in zip(made.split(1), tensor.split(1)):
            target.copy_(source)
            self.drop(made, tensor)
        return made

    def keep(self, tensor: Tensor) -> Tensor:
        """``tensor`` itself where it fits on the heap, else a copy in a file; the caller gives its own up."""
        size = tensor.numel() * tensor.itemsize
        if self._limit is not None and self._held + size > self._limit:
            made = self._in_file(tuple(tensor.shape), tensor.dtype, size)
            made.copy_(tensor)
            self.drop(made)
            return made
        self._held += size
        weakref.finalize(tensor, self._give_back, size)
        return tensor

    def drop(self, *tensors: Tensor) -> None:
        """Let the pages of tensors in files leave this process's memory; their values stay. Others are left alone."""
        for tensor in tensors:
            address = tensor.data_ptr() if self._mapped else 0
            size = self._mapped.get(address)
            if size is not None:
                _unmap_pages(address, size)

    def _in_file(self, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> Tensor:
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True)
        number, name = tempfile.mkstemp(prefix="activations-", dir=self._folder)
        try:
            _reserve(number, size)
            made = torch.from_file(name, shared=True, size=prod(shape), dtype=dtype).view(shape)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise ResourceError(
                f"{self._folder}: no room for {bytes_text(size)} of activations", "raise host.ram, or free some space"
            ) from error
        finally:
            os.close(number)
            Path(name).unlink()
        address = made.data_ptr()
        self._mapped[address] = size
        self._in_files += size
        self.spilled = max(self.spilled, self._in_files)
        weakref.finalize(made, self._forget, address, size)
        return made

    def _give_back(self, size: int) -> None:
        self._held -= size

    def _forget(self, address: int, size: int) -> None:
        self._mapped.pop(address, None)
        self._in_files -= size


def _reserve(number: int, size: int) -> None:
    """Give an open file this many bytes of disk: a mapped file that cannot grow would kill the process later.

    Raises:
        OSError: There is no room.
    """
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(number, 0, size)
        return
    # macOS reserves nothing, but can say what there is
    disk = os.fstatvfs(number)
    if disk.f_bavail * disk.f_frsize < size:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    os.ftruncate(number, size)


def _unmap_pages(address: int, size: int) -> None:
    """``madvise(MADV_DONTNEED)`` of a shared file mapping: pages leave the process, changes stay in the file."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # no such call: pages stay until the system wants them
        return
    length = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(_MADV_DONTNEED))
