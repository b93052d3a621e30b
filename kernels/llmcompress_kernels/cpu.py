"""The C++ kernels for CPUs: built at first use, chosen by CPU flags, declined with a reason.

Operators: ``group_gemm`` and ``moe_group_gemm`` (``csrc/cpu/gemm``). Loading the library registers
them with PyTorch's dispatcher under the CPU key; before that, and where they decline, the definitions run.
"""

from __future__ import annotations

import ctypes
import os
import sys

import torch

from llmcompress_kernels import build, select
from llmcompress_kernels.reference.group_gemm import LANES

FAMILY = "gemm"
ISA_VARIABLE = "LLMCOMPRESS_CPU_ISA"
# from fastest to slowest
ISAS = ("avx512", "avxvnni", "avx2", "neon", "portable")
# columns that the inner loop takes at once; a group has to begin at such a step
STEP_COLUMNS = {2: 16, 3: 32, 4: 8, 8: 4}

_ready: bool | None = None


def unavailable(family: str = FAMILY) -> str | None:
    """Why the native kernels of a family cannot run on this machine, or None; starts no build."""
    wanted = os.environ.get(ISA_VARIABLE, "")
    if wanted and wanted not in ISAS:
        return f"{ISA_VARIABLE}={wanted} is not one of {', '.join(ISAS)}"
    return build.unavailable(family)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def ready() -> bool:
    """Load the kernels if this process may use them; tried once.

    Returns:
        Whether they run. The reason why not was printed once and is in :func:`select.explain`.
    """
    global _ready  # noqa: PLW0603 - one library per process
    if _ready is None:
        _ready = False
        reason = None if select.requested() in ("auto", "cpu") else "not asked for"
        if reason is None:
            try:
                _ready = _load()
            except build.BuildError as error:
                sys.stderr.write(f"llmcompress: no native kernels: {error}\n")
    return _ready


def _load() -> bool:
    """Build, register, and check that the instruction set that was asked for exists.

    Raises:
        BuildError: See :func:`build.load`; or the CPU lacks the instruction set that was asked for.
    """
    reason = unavailable()
    if reason is not None:
        raise build.BuildError(reason)
    library = build.load(FAMILY)
    wanted = os.environ.get(ISA_VARIABLE)
    if wanted and not library.llmcompress_select_isa(wanted.encode()):
        raise build.BuildError(f"{ISA_VARIABLE}={wanted}: this CPU cannot run it")
    return True


def isa() -> str:
    """Name of the instruction set in use; one of :data:`ISAS`.

    Raises:
        BuildError: The kernels are not available.
    """
    function = build.load(FAMILY).llmcompress_isa
    function.restype = ctypes.c_char_p
    return str(function().decode())


def set_isa(name: str | None) -> bool:
    """Switch the instruction set, None for the best; for tests and benchmarks. False where the CPU cannot run it."""
    return bool(build.load(FAMILY).llmcompress_select_isa(None if name is None else name.encode()))


def declines(bits: int, group_size: int, rows: int, columns: int) -> str | None:
    """Why a weight ``[rows, columns]`` cannot be interleaved for these kernels, or None.

    A weight that is not interleaved is still computed with, at the cost of interleaving it in every call;
    one whose groups do not begin at a word runs by the definition.
    """
    if bits not in STEP_COLUMNS:
        return f"{bits} bits"
    if group_size < columns and group_size % STEP_COLUMNS[bits] != 0:
        return f"groups of {group_size} columns of {bits} bits do not begin at a word"
    if rows % LANES != 0:
        return f"{rows} rows are no multiple of {LANES}"
    return None


for _op in ("group_gemm", "moe_group_gemm"):
    select.register(select.Implementation(_op, "cpu", ("cpu",), unavailable))
