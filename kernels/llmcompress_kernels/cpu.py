"""The C++ kernels for CPUs: built at first use, chosen by CPU flags, declined with a reason.

Operators: ``group_gemm`` and ``moe_group_gemm`` (``csrc/cpu/gemm``). Loading the library registers
them with PyTorch's dispatcher under the CPU key; before that, and where they decline, the definitions run.

The products they are made of (``csrc/cpu/products``) are a library for each instruction set, so that nothing is
compiled that this machine cannot run or has no use for. Families that multiply are handed the products in use; families
with floating-point code of their own come once for each of :func:`float_isas`.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys

import torch

from llmcompress_kernels import build, processors, select
from llmcompress_kernels.reference.group_gemm import LANES

FAMILY = "gemm"
PRODUCTS = "products"
PROCESSOR = "processor"
ISA_VARIABLE = "LLMCOMPRESS_CPU_ISA"
# from fastest to slowest
ISAS = ("avx512", "avxvnni", "avx2", "neon", "portable")
# columns that the inner loop takes at once; a group has to begin at such a step
STEP_COLUMNS = {2: 16, 3: 32, 4: 8, 8: 4}
# byte products are all that these have more than others
_SAME_FLOATS = {"avxvnni": "avx2", "neon": "portable"}
_ARCHITECTURES = {"x86_64": ("avx512", "avxvnni", "avx2"), "aarch64": ("neon",)}
# the names of other systems than Linux
_ALIASES = {"AMD64": "x86_64", "arm64": "aarch64"}

_ready: bool | None = None
# the instruction set in use, None before it is known
_in_use: str | None = None


def team(threads: int | None) -> int:
    """Threads of a call whose threads wait for each other by spinning.

    Those that spin keep a processor from whom they wait for, and a scheduler takes milliseconds to believe a yield.

    Args:
        threads: So many; None for torch's, but no more than this process has processors (:mod:`processors`).
    """
    return threads or min(torch.get_num_threads(), processors.count())


def architecture() -> str:
    """What this processor's kind is called on Linux: ``x86_64``, ``aarch64`` or another."""
    machine = platform.machine()
    return _ALIASES.get(machine, machine)


def known_isas() -> tuple[str, ...]:
    """Those of :data:`ISAS` that are compiled on this architecture, whether its processor runs them or not."""
    return (*_ARCHITECTURES.get(architecture(), ()), "portable")


def float_isas() -> tuple[str, ...]:
    """The known ones that floating-point code is compiled for."""
    return tuple(isa for isa in known_isas() if isa not in _SAME_FLOATS)


def variant(family: str, isa: str) -> str:
    """Name of the library of a family with floating-point code that runs beside the products of ``isa``."""
    return f"{family}_{_SAME_FLOATS.get(isa, isa)}"


def products_family(isa: str) -> str:
    """Name of the library of products."""
    return f"{PRODUCTS}_{isa}"


build.register(
    build.Family(PROCESSOR, ("cpu/processor/*.cpp",), headers=("cpu/include/llmcompress/isa.h",), silent=True)
)
build.register(
    build.Family(
        FAMILY, ("cpu/gemm/*.cpp",), ("cpu/include/**/*", "cpu/gemm/*.h"), torch=True, flags=("-DNDEBUG",),
        libraries=("-lc10",),
    )
)  # fmt: skip
for _isa in known_isas():
    build.register(build.Family(products_family(_isa), (f"cpu/products/{_isa}*.cpp",), isa=_isa))


def runs(isa: str) -> bool:
    """Whether this processor runs an instruction set.

    Raises:
        BuildError: There is no compiler, and nothing that was compiled before.
    """
    return isa in known_isas() and bool(build.load(PROCESSOR).llmcompress_runs(isa.encode()))


@functools.cache
def fastest() -> str:
    """The first of :data:`ISAS` that this processor runs.

    Raises:
        BuildError: See :func:`runs`.
    """
    return next(isa for isa in ISAS if runs(isa))


def wanted() -> str:
    """The instruction set that the environment asks for, else the fastest.

    Raises:
        BuildError: It asks for one that there is not or that this processor lacks; or see :func:`runs`.
    """
    name = os.environ.get(ISA_VARIABLE)
    if not name:
        return fastest()
    if name not in ISAS:
        raise build.BuildError(f"{ISA_VARIABLE}={name} is not one of {', '.join(ISAS)}")
    if not runs(name):
        raise build.BuildError(f"{ISA_VARIABLE}={name}: this CPU cannot run it")
    return name


def needed(family: build.Family) -> bool:
    """Whether this machine uses a family.

    Raises:
        BuildError: See :func:`wanted`.
    """
    if not family.isa:
        return True
    isa = wanted()
    return family.isa == (isa if family.name.startswith(PRODUCTS) else _SAME_FLOATS.get(isa, isa))


def unavailable(family: str = FAMILY) -> str | None:
    """Why the native kernels of a family cannot run on this machine, or None.

    Nothing is built but the library that asks the processor, in a tenth of a second.

    Args:
        family: As it is registered, or what comes before the instruction set.
    """
    try:
        isa = wanted()
    except build.BuildError as error:
        return str(error).splitlines()[0]
    if family == FAMILY:
        return build.unavailable(FAMILY) or build.unavailable(products_family(isa))
    return build.unavailable(family if family in build.FAMILIES else variant(family, isa))


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
                library()
                _ready = True
            except build.BuildError as error:
                sys.stderr.write(f"llmcompress: no native kernels: {error}\n")
    return _ready


def library() -> ctypes.CDLL:
    """The compiled family, with products.

    Raises:
        BuildError: See :func:`wanted` and :func:`build.load`.
    """
    if _in_use is None:
        _use(wanted())
    return build.load(FAMILY)


def _use(isa: str) -> None:
    global _in_use  # noqa: PLW0603 - one choice per process
    build.prepare((FAMILY, products_family(isa)))
    hand_products(build.load(FAMILY), isa)
    _in_use = isa


def products(isa: str) -> int:
    """Address of the products of an instruction set, ``Variant`` in lowbit.h.

    Raises:
        BuildError: See :func:`build.load`.
    """
    return ctypes.addressof(ctypes.c_char.in_dll(build.load(products_family(isa)), "llmcompress_products"))


def hand_products(family: ctypes.CDLL, isa: str) -> None:
    """Let a library that has ``gemm/variants.cpp`` multiply by the products of an instruction set.

    Raises:
        BuildError: See :func:`build.load`.
    """
    family.llmcompress_use_products.argtypes = (ctypes.c_void_p,)
    family.llmcompress_use_products.restype = None
    family.llmcompress_use_products(products(isa))


def isa() -> str:
    """Name of the instruction set in use; one of :data:`ISAS`.

    Raises:
        BuildError: See :func:`wanted`.
    """
    return _in_use or wanted()


def set_isa(name: str | None) -> bool:
    """Switch the instruction set, None for the best; for tests and benchmarks. False where the CPU cannot run it.

    Raises:
        BuildError: See :func:`build.load`.
    """
    if name is not None and not runs(name):
        return False
    _use(name or fastest())
    return True


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
