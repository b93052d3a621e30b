"""Reading one safetensors file, tensor by tensor, without mapping it into memory.

A mapped file's touched pages count as resident memory, which would make peak memory depend on
what was read before; and a file cut short while mapped kills the process. Plain reads into
freshly allocated tensors have neither problem.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.quant.tensor_writer import DTYPES

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MAX_HEADER = 100_000_000
# bytes that are read at once; what the kernel holds of a file that it need not keep
_PIECE = 16 << 20
# absent on macOS and Windows
_FORGET = getattr(os, "posix_fadvise", None)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor lies in its file: type code, shape, first byte, size in bytes."""

    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def all_finite(tensor: Tensor) -> bool:
    """Whether a floating-point tensor holds neither NaN nor infinity.

    Its extremes show both (a NaN is passed on), in one pass 10 to 20 times faster than ``torch.isfinite`` on a CPU.
    """
    if tensor.numel() == 0:
        return True
    low, high = tensor.aminmax()
    # times zero both become zero, or NaN; one answer, because a GPU has to be waited for
    return float(low * 0 + high * 0) == 0.0


class TensorFile:
    """One safetensors file. The header is read and checked at once, values on request.

    Args:
        path: The file.

    Attributes:
        once: Whether the kernel need not keep what was read for the next time. Of files that are larger than memory it
            cannot, and what it keeps of them takes new pages for every byte, which can take longer than the disk.

    Raises:
        InputError: It is missing, cut short, or not a safetensors file, or its tensors overlap.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.once = path, False
        try:
            self._state = _state(path.stat())
        except OSError as error:
            raise _unread(path, error) from error
        # a run looks at its model's headers before it begins, and opens the model then
        self.entries = _entries(path, *self._state)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries.values())

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor."""
        import torch

        found: torch.dtype = getattr(torch, DTYPES[self.entries[name].code][0])
        return found

    def read(self, name: str, into: Tensor | None = None) -> Tensor:
        """Read one tensor.

        Args:
            name: Which tensor.
            into: Contiguous memory of its shape and type to read it into, new memory without.

        Raises:
            InputError: The file has been replaced or written since it was opened.
        """
        import torch

        entry = self.entries[name]
        result = torch.empty(entry.shape, dtype=self.dtype(name)) if into is None else into
        if entry.nbytes:
            # a view of raw bytes exists for every dtype; numpy has no bfloat16
            target = memoryview(result.reshape(-1).view(torch.uint8).numpy().data)
            with self.path.open("rb", buffering=0) as handle:
                if _state(os.fstat(handle.fileno())) != self._state:
                    # of another model with the same names half the tensors would be taken
                    raise InputError(
                        f"{self.path}: has changed since it was opened", "leave it as it is, then run again"
                    )
                handle.seek(entry.start)
                done = 0
                while done < entry.nbytes:
                    count = handle.readinto(target[done : done + _PIECE])
                    if not count:
                        raise _damaged(self.path, f"ends inside {name}")
                    done += count
                    if self.once and _FORGET is not None:
                        _FORGET(handle.fileno(), entry.start + done - count, count, os.POSIX_FADV_DONTNEED)
        return result


def _state(facts: os.stat_result) -> tuple[int, int, int]:
    """What tells a file from another one under its name: size, time of its last change, number."""
    return facts.st_size, facts.st_mtime_ns, facts.st_ino


def header_bytes(path: Path) -> bytes:
    """The header of a safetensors file as it stands there: JSON in UTF-8.

    Raises:
        InputError: It cannot be read, is cut short, or is not a safetensors file.
    """
    try:
        with path.open("rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            prefix = handle.read(8)
            length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else -1
            if not 0 < length <= min(_MAX_HEADER, size - 8):
                raise _damaged(path, "the header is not that of a safetensors file, or the file is cut short")
            return handle.read(length)
    except OSError as error:
        raise _unread(path, error) from error


def header_of(path: Path) -> dict[str, Any]:
    """The header of a safetensors file: tensor name → type code, shape and offsets; ``__metadata__`` where it has any.

    Raises:
        InputError: It cannot be read, is cut short, or is not a safetensors file.
    """
    return _parsed(path, header_bytes(path))


def _parsed(path: Path, raw: bytes) -> dict[str, Any]:
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "the header is not JSON") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not an object")
    return header


@lru_cache(maxsize=1024)
def _entries(path: Path, size: int, modified: int, inode: int) -> dict[str, Entry]:
    """Entries of a file by name; what is remembered holds as long as its size, time and number are these.

    Raises:
        InputError: It cannot be read, is cut short, or is not a safetensors file.
    """
    raw = header_bytes(path)
    header = _parsed(path, raw)
    header.pop("__metadata__", None)
    found = {name: _entry(path, name, value, 8 + len(raw), size) for name, value in header.items()}
    placed = sorted((entry.start, name) for name, entry in found.items() if entry.nbytes)
    for (start, name), (after, other) in itertools.pairwise(placed):
        # as safetensors does: one of the two would be read from the other's bytes
        if start + found[name].nbytes > after:
            raise _damaged(path, f"{name} and {other} share bytes")
    return found


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> Entry:
    try:
        code, shape = str(value["dtype"]), tuple(int(n) for n in value["shape"])
        begin, end = (int(n) for n in value["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"the header entry of {name} is malformed") from error
    if code not in DTYPES:
        raise InputError(f"{path}: {name} has data type {code}, which is not supported")
    expected = math.prod(shape) * DTYPES[code][1]
    if begin < 0 or end - begin != expected:
        raise _damaged(path, f"{name} of shape {list(shape)} cannot span {end - begin} bytes")
    if base + end > size:
        raise _damaged(path, f"cut short: {name} needs {base + end} bytes, the file has {size}")
    return Entry(code, shape, base + begin, expected)


def _damaged(path: Path, problem: str) -> InputError:
    return InputError(f"{path}: damaged: {problem}", "download or copy the file again")


def _unread(path: Path, error: OSError) -> InputError:
    return InputError(f"{path}: cannot read: {error.strerror or error}")
