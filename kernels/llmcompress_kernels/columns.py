"""GPTQ's column loop in C++ and its steps in Triton: the thin, typed side of ``csrc/cpu/columns`` and of
:mod:`llmcompress_kernels.triton.gptq_columns`.

Not an operator of the dispatcher: its definition is the loop in ``llmcompress/algorithms/gptq.py``, which runs where
these decline. Both want grids chosen on reaching a group. The C++ needs a compiler, fp32 weights on the CPU and
whole-number zero points; a tile of 32 rows goes through all columns in the caches, and the result depends on neither
threads nor tiles. It works with the Hessian's root instead of that of its inverse, and fits the scales on the way.
Triton's kernel takes the place of the steps between two updates of the columns that follow.

Legend: E experts, N rows (outputs), K columns (inputs), G groups per row.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import build, select

FAMILY = "columns"
OPERATOR = "gptq_columns"

build.register(
    build.Family(
        FAMILY,
        ("cpu/columns/*.cpp",),
        headers=("cpu/columns/*.h", *(f"cpu/include/llmcompress/{name}.h" for name in ("isa", "target"))),
        # sums may be fused with products: codes near a rounding boundary may differ from the definition's anyway
        flags=("-ffp-contract=fast", "-Wno-psabi"),
    )
)

_POINTERS = (
    "weight", "order", "root", "added", "ridge", "codes", "values", "scale", "zero", "error", "energy", "coarse",
    "fine",
)  # fmt: skip
_SIZES = (
    "experts", "rows", "columns", "group", "groups", "row_stride", "column_stride", "coarse_count", "fine_count",
    "levels", "midpoint", "symmetric", "refit",
)  # fmt: skip


class _Problem(ctypes.Structure):
    _fields_ = (*((name, ctypes.c_void_p) for name in _POINTERS), *((name, ctypes.c_int64) for name in _SIZES))


@dataclass(frozen=True, slots=True)
class Grid:
    """How a group's scale and zero point are chosen.

    Attributes:
        group: Columns per group.
        levels: Number of codes.
        midpoint: The zero point of a symmetric grid.
        symmetric: Whether there is only that one.
        coarse: Fractions of the min-max range that are tried beside the whole; empty for no search.
        fine: Offsets from the best of them that are tried then.
    """

    group: int
    levels: int
    midpoint: int
    symmetric: bool
    coarse: tuple[float, ...] = ()
    fine: tuple[float, ...] = ()


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, or None; starts no build."""
    return build.unavailable(FAMILY)


# groups per row up to which scales are fitted: their products are a square of them for each of 32 rows
FITTED_GROUPS = 128

_library: ctypes.CDLL | None = None
_tried = False


def _kernel() -> ctypes.CDLL | None:
    """The library, built at first use; None where the definition has to do."""
    global _library, _tried  # noqa: PLW0603 - one library per process
    if not _tried:
        _tried = True
        try:
            _library = build.load(FAMILY)
        except build.BuildError as error:
            sys.stderr.write(f"llmcompress: no native column loop: {error}\n")
    return _library


def ready() -> bool:
    """Whether :func:`quantize` runs here; builds the library at the first call."""
    return select.requested() in ("auto", "cpu") and _kernel() is not None


@dataclass(frozen=True, slots=True)
class Found:
    """Where :func:`quantize` puts what it finds, in the stored order of columns.

    Attributes:
        codes: uint8 ``[E, N, K]``.
        values: fp32 ``[E, N, K]``, what codes and scales stand for.
        scale: fp16 ``[E, N, G]``.
        zero: uint8 ``[E, N, G]``.
        error: fp32 ``[E, N]``, diagonal of ``(W-Q) H (W-Q)ᵀ``.
        energy: fp32 ``[E, N]``, diagonal of ``W H Wᵀ``; written where scales are fitted.
    """

    codes: Tensor
    values: Tensor
    scale: Tensor
    zero: Tensor
    error: Tensor
    energy: Tensor

    @classmethod
    def empty(cls, experts: int, rows: int, columns: int, groups: int) -> Found:
        """Uninitialised results."""
        return cls(
            torch.empty(experts, rows, columns, dtype=torch.uint8), torch.empty(experts, rows, columns),
            torch.empty(experts, rows, groups, dtype=torch.float16),
            torch.empty(experts, rows, groups, dtype=torch.uint8), torch.empty(experts, rows),
            torch.empty(experts, rows),
        )  # fmt: skip

    def part(self, experts: slice) -> Found:
        """Views of some experts."""
        return Found(
            self.codes[experts], self.values[experts], self.scale[experts], self.zero[experts], self.error[experts],
            self.energy[experts],
        )  # fmt: skip


def quantize(
    w: Tensor, order: Tensor | None, root: Tensor, added: Tensor, grid: Grid, ridge: Tensor | None, found: Found
) -> None:
    """Quantize all columns, each one's error made up for by those after it, and fit the scales to the chosen codes.

    Args:
        w: ``[E, N, K]`` fp32 on the CPU.
        order: int64 ``[E, K]``, the stored column of each visit; None for as they come. Groups stay together.
        root: ``[E, K, K]`` fp32, lower Cholesky factor of the damped Hessian with rows and columns in the reverse of
            the order of visit; only its lower triangle is read.
        added: ``[E, K]`` fp32, what damping added to the Hessian's diagonal, in the order of visit.
        grid: How scales and zero points are chosen.
        ridge: ``[E]`` fp32, added to the Hessian's diagonal where scales are fitted; None to leave them.
        found: Written.

    Raises:
        RuntimeError: The kernel is not available (see :func:`ready`), or memory ran out.
    """
    library = _loaded()
    experts, rows, columns = w.shape
    groups = -(-columns // grid.group)
    # the library that makes it returns it by columns
    w, root = w.contiguous(), root if root.mT.is_contiguous() else root.contiguous()
    order = None if order is None else order.contiguous()
    added, ridge = added.contiguous(), None if ridge is None else ridge.contiguous()
    assert w.dtype == root.dtype == added.dtype == torch.float32
    assert root.shape == (experts, columns, columns)
    assert added.shape == (experts, columns)
    assert w.device.type == "cpu"
    assert found.codes.shape == found.values.shape == w.shape
    assert found.scale.shape == found.zero.shape == (experts, rows, groups)
    coarse, fine = torch.tensor(grid.coarse), torch.tensor(grid.fine)
    written = (found.codes, found.values, found.scale, found.zero, found.error, found.energy)
    assert all(tensor.is_contiguous() for tensor in written)
    tensors = (w, order, root, added, ridge, *written, coarse, fine)
    sizes = (
        experts, rows, columns, grid.group, groups, *root.stride()[1:], len(grid.coarse), len(grid.fine), grid.levels,
        grid.midpoint, int(grid.symmetric), int(ridge is not None),
    )  # fmt: skip
    problem = _Problem(*(None if t is None else t.data_ptr() for t in tensors), *sizes)
    if library.llmc_gptq_columns(ctypes.byref(problem)) != 0:
        raise RuntimeError("out of memory")


def reversed_lower(matrix: Tensor, order: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Lower triangles with rows and columns in the reverse of an order of visit; what is above them is arbitrary.

    Args:
        matrix: ``[E, K, K]`` fp32 on the CPU, symmetric.
        order: int64 ``[E, K]``; None for as they come.
        out: Where to write, contiguous; by default a new tensor.

    Raises:
        RuntimeError: The kernel is not available (see :func:`ready`).
    """
    library = _loaded()
    out = torch.empty_like(matrix) if out is None else out
    matrix, order = matrix.contiguous(), None if order is None else order.contiguous()
    assert matrix.dtype == out.dtype == torch.float32
    assert matrix.shape == out.shape
    assert out.is_contiguous()
    assert matrix.device.type == "cpu"
    places = None if order is None else order.data_ptr()
    library.llmc_gptq_reversed(
        ctypes.c_void_p(matrix.data_ptr()), ctypes.c_void_p(places), ctypes.c_void_p(out.data_ptr()),
        ctypes.c_int64(matrix.shape[0]), ctypes.c_int64(matrix.shape[1]),
    )  # fmt: skip
    return out


def _loaded() -> ctypes.CDLL:
    library = _kernel()
    if library is None:
        raise RuntimeError("the native column loop is not available")
    return library


# columns that quantize_span takes at most
FUSED_COLUMNS = 64


def _no_triton() -> str | None:
    from llmcompress_kernels import gpu

    return gpu.no_triton()


def fuses(device: str) -> bool:
    """Whether :func:`quantize_span` runs on a type of device here."""
    return device == "cuda" and select.requested() in ("auto", "triton") and _no_triton() is None


def quantize_span(*arguments: Any) -> Tensor:
    """Quantize some columns of one group on a GPU; arguments and result as of the kernel's own ``quantize``."""
    from llmcompress_kernels.triton import gptq_columns

    return gptq_columns.quantize(*arguments)


def descend_span(*arguments: Any) -> Tensor:
    """Move the codes of some columns of one group on a GPU; arguments and result as of the kernel's own ``descend``."""
    from llmcompress_kernels.triton import gptq_columns

    return gptq_columns.descend(*arguments)


def spans(columns: int, group: int, most: int = FUSED_COLUMNS) -> list[tuple[int, int]]:
    """Column ranges of at most ``most`` columns, none of which spans two groups."""
    ends = [min(begin + group, columns) for begin in range(0, columns, group)]
    return [
        (start, min(start + most, end)) for end, begin in zip(ends, [0, *ends]) for start in range(begin, end, most)
    ]


select.register(select.Implementation(OPERATOR, "reference", ("any",)))
select.register(select.Implementation(OPERATOR, "cpu", ("cpu",), unavailable))
select.register(select.Implementation(OPERATOR, "triton", ("cuda",), _no_triton))
