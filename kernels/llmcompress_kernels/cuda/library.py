"""How the kernels of ``csrc/cuda`` are loaded and launched, and what all of them ask of their operands."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build
from llmcompress_kernels.cuda import toolchain

# counters of arrivals that a captured graph may take without ever giving them back
RESERVED = 1 << 22


def register(family: str, source: str) -> None:
    """Make ``csrc/cuda/<source>`` a family of :mod:`llmcompress_kernels.build`."""
    folder = source.rsplit("/", 1)[0]
    build.register(
        build.Family(
            family,
            (f"cuda/{source}",),
            headers=(f"cuda/{folder}/*", "cuda/common/*"),
            toolchain=toolchain.nvcc,
            optional=True,
        )
    )


@cache
def no_device() -> str | None:
    """Why no CUDA kernel can run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor}, 8.0 is needed"


def unavailable(family: str) -> str | None:
    """Why a family's kernels cannot run on this machine, or None; starts no build."""
    return no_device() or build.unavailable(family)


def launch(
    family: str,
    prefix: str,
    function: str,
    call: ctypes.Structure,
    arguments: Sequence[int],
    like: Tensor,
    library: Any,
) -> None:
    """Launch on the current stream of the device of ``like``.

    Args:
        family: Which library to load.
        prefix: Prefix of its error and device functions, ``<prefix>_error`` and ``<prefix>_device``.
        function: That launches: its arguments are the call, ``arguments`` and the stream.
        call: What the launch is told.
        arguments: Further numbers.
        like: A tensor on the device.
        library: The emulation of the tests instead, on CPU tensors, or None.

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    emulated = library is not None
    library = library if emulated else build.load(family)
    start = getattr(library, function)
    if emulated:
        _check(library, prefix, start(ctypes.byref(call), *arguments, None))
        return
    # the library's own copy of CUDA's run time is told the device as well; on leaving, PyTorch's is what it was
    with torch.cuda.device(like.device):
        _check(library, prefix, getattr(library, f"{prefix}_device")(like.device.index or 0))
        stream = ctypes.c_void_p(torch.cuda.current_stream(like.device).cuda_stream)
        _check(library, prefix, start(ctypes.byref(call), *arguments, stream))


def _check(library: Any, prefix: str, code: int) -> None:
    if code == 0:
        return
    told = f"code {code}"
    if code > 0 and hasattr(library, f"{prefix}_error"):
        describe = getattr(library, f"{prefix}_error")
        describe.restype = ctypes.c_char_p
        told = describe(code).decode()
    raise RuntimeError(f"a launch of the {prefix.removeprefix('llmcompress_')} kernels failed: {told}")


def address(tensor: Tensor | None) -> int | None:
    """A tensor's address, for a pointer that may be null."""
    return None if tensor is None else tensor.data_ptr()


def declines_tensors(*tensors: Tensor | None) -> str | None:
    """Why operands are not for these kernels, or None: order, alignment."""
    given = [t for t in tensors if t is not None]
    if not all(t.is_contiguous() for t in given):
        return "an operand is not contiguous"
    return None if all(t.data_ptr() % 16 == 0 for t in given) else "an operand does not begin at 16 bytes"


def placed(tensor: Tensor) -> Tensor:
    """Contiguous and at 16 bytes; a part of a larger tensor may begin anywhere."""
    plain = tensor.contiguous()
    return plain if plain.data_ptr() % 16 == 0 else plain.clone()


_STREAMS: dict[tuple[int, int], Tensor] = {}
_GRAPHS: dict[int, tuple[Tensor, int]] = {}


@contextlib.contextmanager
def graphs_that_end() -> Iterator[None]:
    """Give back what graphs captured inside took of the reserve; they must not be replayed afterwards."""
    before = dict(_GRAPHS)
    try:
        yield
    finally:
        _GRAPHS.update(before)


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
