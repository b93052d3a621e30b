"""How the kernels of ``csrc/cuda/state`` and ``csrc/cuda/tree`` are loaded and launched."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build
from llmcompress_kernels.cuda import toolchain


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


def unavailable(family: str) -> str | None:
    """Why a family's kernels cannot run on this machine, or None; starts no build."""
    from llmcompress_kernels.gpu import no_device

    return no_device() or build.unavailable(family)


def launch(
    family: str, prefix: str, call: ctypes.Structure, arguments: tuple[int, ...], like: Tensor, library: Any
) -> None:
    """Launch on the current stream of the device of ``like``.

    Args:
        family: Which library to load.
        prefix: Of its error and device functions, ``<prefix>_error`` and ``<prefix>_device``.
        call: What the launch is told.
        arguments: Further numbers of the function ``<prefix>`` or ``<prefix>_update``.
        like: A tensor on the device.
        library: The emulation of the tests instead, on CPU tensors, or None.

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    emulated = library is not None
    library = library if emulated else build.load(family)
    function = getattr(library, f"{prefix}_update", None) if prefix.endswith("state") else getattr(library, prefix)
    assert function is not None
    if emulated:
        _check(library, prefix, function(ctypes.byref(call), *arguments, None))
        return
    # the library's own copy of CUDA's run time is told the device as well; on leaving, PyTorch's is what it was
    with torch.cuda.device(like.device):
        _check(library, prefix, getattr(library, f"{prefix}_device")(like.device.index or 0))
        stream = ctypes.c_void_p(torch.cuda.current_stream(like.device).cuda_stream)
        _check(library, prefix, function(ctypes.byref(call), *arguments, stream))


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
    """For a pointer that may be null."""
    return None if tensor is None else tensor.data_ptr()


def declines_tensors(*tensors: Tensor | None) -> str | None:
    """Why operands are not for these kernels, or None: order, alignment."""
    given = [t for t in tensors if t is not None]
    if not all(t.is_contiguous() for t in given):
        return "an operand is not contiguous"
    return None if all(t.data_ptr() % 16 == 0 for t in given) else "an operand does not begin at 16 bytes"
