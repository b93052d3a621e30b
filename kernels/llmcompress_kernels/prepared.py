"""``group_gemm`` for one weight, prepared once: an object that is called with the input alone.

What the dispatcher does for each call, matching eight arguments with a schema and boxing them, takes as long as half a
product of one token with a small weight. The object goes straight to the C++ kernels (``csrc/cpu/call``) and leaves to
the operator whatever needs a dispatcher: other devices, gradients, subclasses, modes, transforms, profilers. Results
are the operator's, bit for bit.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from llmcompress_kernels import build, cpu, schemas  # noqa: F401 - schemas defines the operator
from llmcompress_kernels.reference.group_gemm import LANES

FAMILY = "call"
_INCLUDE = sysconfig.get_path("include")
_GROUP_GEMM = torch.ops.llmcompress.group_gemm.default


def unavailable() -> str | None:
    """Why calls go through the dispatcher on this machine, or None; starts no build."""
    reason = cpu.unavailable()
    if reason is None and not (Path(_INCLUDE) / "Python.h").is_file():
        reason = f"no {_INCLUDE}/Python.h (python3-dev or python3-devel has it)"
    return reason or build.unavailable(FAMILY)


@functools.cache
def _library() -> ctypes.PyDLL | None:
    """The library, its types set; None where it cannot be had."""
    if not cpu.ready() or unavailable() is not None:
        return None
    try:
        path = build.load(FAMILY)._name
    except build.BuildError as error:
        sys.stderr.write(f"llmcompress: calls go through the dispatcher: {error}\n")
        return None
    library = ctypes.PyDLL(path)
    library.llmcompress_call_start.argtypes = [ctypes.c_void_p, ctypes.py_object]
    library.llmcompress_call_product.restype = ctypes.py_object
    library.llmcompress_call_product.argtypes = [
        *(ctypes.py_object,) * 3, ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.py_object
    ]  # fmt: skip
    library.llmcompress_call_start(ctypes.cast(cpu.library().llmcompress_linear, ctypes.c_void_p), Tensor)
    return library


def product(
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    int8: bool = False,
) -> Callable[[Tensor], Tensor]:
    """``group_gemm`` as a function of ``x`` alone; see :func:`llmcompress_kernels.ops.group_gemm` for the arguments.

    The tensors are kept. The fast call is made where they are interleaved, on the CPU and contiguous.
    """
    operands = (packed, scale, zero, bits, group_size, in_features, int8)

    def operator(x: Tensor) -> Tensor:
        out: Tensor = _GROUP_GEMM(x, *operands)
        return out

    library = _library() if _covered(packed, scale, zero, bits, group_size, in_features) else None
    if library is None:
        return operator
    made: Callable[[Tensor], Tensor] = library.llmcompress_call_product(*operands, operator)
    return made


def _covered(packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, columns: int) -> bool:
    """Whether these are operands that the kernels take as they are."""
    if packed.dim() != 3 or bits not in cpu.STEP_COLUMNS or group < 1 or columns < 1:
        return False
    groups = -(-columns // group)
    words, zero_words = -(-columns * bits // 32), -(-groups * bits // 32)
    expected = [(packed, torch.int32, words), (scale, torch.float16, groups)]
    if zero is not None:
        expected.append((zero, torch.int32, zero_words))
    return cpu.declines(bits, group, LANES, columns) is None and all(
        type(t) is Tensor
        and t.device.type == "cpu"
        and t.dtype == dtype
        and t.shape == (packed.shape[0], count, LANES)
        and t.is_contiguous()
        for t, dtype, count in expected
    )


build.register(
    build.Family(
        FAMILY, ("cpu/call/*.cpp",), ("cpu/include/**/*", "cpu/gemm/linear.h"), torch=True,
        # the version of Python is part of the cache key
        flags=(f"-I{_INCLUDE}", f"-DLLMCOMPRESS_PYTHON={sys.hexversion >> 16:#x}", "-DNDEBUG"),
        libraries=("-lc10", "-ltorch_python"),
        optional=True,
    )
)  # fmt: skip
