"""Weights as the native steps read them: dense rows, packed blocks of sixteen rows, or the nodes of a residual tree.

The typed side of ``Matrix`` in ``csrc/cpu/decode/decode.h``, which :mod:`~llmcompress_kernels.decode` and
:mod:`~llmcompress_kernels.mamba2` share.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import tree
from llmcompress_kernels.reference.group_gemm import LANES, interleave

KINDS = {torch.float32: 1, torch.bfloat16: 2}
_PACKED = 3
_TREE = 4


class MatrixStruct(ctypes.Structure):
    """``Matrix`` of C++."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("data", "scale", "zero", "bias", "factors", "adapter")),
        *((name, ctypes.c_int64) for name in ("rows", "columns", "expert_rows")),
        *((name, ctypes.c_int32) for name in ("kind", "bits", "group", "input_bytes")),
    )


class Adapter:
    """Two matrices U ``[r, K]`` and V ``[N, r]`` by which a weight is more than it is: ``V (U x)`` is added.

    Args:
        low: U.
        high: V.
    """

    def __init__(self, low: Matrix, high: Matrix) -> None:
        self.matrices = (low, high)
        # C++ reads these at every step
        self.structs = (MatrixStruct * 2)(low.struct(), high.struct())


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight as the step reads it.

    Attributes:
        data: float32 or bfloat16 ``[(E,) N, K]``, or interleaved int32 words ``[(E,) N / 16, W, 16]``. Experts may
            be further apart than their rows (the gate half of a stacked projection).
        rows: N.
        columns: K.
        scale: Interleaved fp16 scales of a packed weight.
        zero: Interleaved packed zero points, or None.
        bias: float32 ``[(E,) N]`` or None.
        factors: float32 ``[N]`` of results with their biases, or None for ones.
        adapter: What is added to these results, or None.
        bits: Code width, 0 for a dense tensor.
        group_size: Columns per scale.
        planes: Nodes of a residual tree instead of all that.
        nodes: The same for C++.
        input_bytes: Of each input where it is packed, 0 for what the step says. Mixers have a number of their own.
    """

    data: Tensor
    rows: int
    columns: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    bias: Tensor | None = None
    factors: Tensor | None = None
    adapter: Adapter | None = None
    bits: int = 0
    group_size: int = 0
    planes: Sequence[tree.Plane] = ()
    nodes: Any = None
    input_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zero points, or of the dense tensor, and of the adapter."""
        if self.planes:
            held = {t.data_ptr(): t.nbytes for part in self.planes for t in (part.words, part.scale)}
            return sum(held.values())
        own = sum(t.nbytes for t in (self.data, self.scale, self.zero) if t is not None)
        return own + (0 if self.adapter is None else sum(part.nbytes for part in self.adapter.matrices))

    @property
    def experts(self) -> int:
        """E, 1 without that dimension."""
        return self.data.shape[0] if self.data.ndim == (4 if self.bits else 3) else 1

    @property
    def _adapter(self) -> int | None:
        return None if self.adapter is None else ctypes.addressof(self.adapter.structs)

    def struct(self) -> MatrixStruct:
        """The same for C++, which points into the tensors."""
        if self.planes:
            return MatrixStruct(
                ctypes.addressof(self.nodes), None, None,
                *(None if t is None else t.data_ptr() for t in (self.bias, self.factors)), self._adapter,
                self.rows, self.columns, 0, _TREE, len(self.planes), self.group_size, 0,
            )  # fmt: skip
        apart = self.data.stride(0) // self.data.shape[-2] if self.bits else self.data.stride(0) // self.columns
        return MatrixStruct(
            *(None if t is None else t.data_ptr() for t in (self.data, self.scale, self.zero, self.bias, self.factors)),
            self._adapter,
            self.rows, self.columns, apart if self.experts > 1 else 0,
            _PACKED if self.bits else KINDS[self.data.dtype], self.bits, self.group_size, self.input_bytes,
        )  # fmt: skip


def adapted(given: Matrix, low: Matrix, high: Matrix) -> Matrix:
    """The same weight with an adapter; see :class:`Adapter`."""
    return replace(given, adapter=Adapter(low, high))


def times(given: Matrix, factors: Tensor | float) -> Matrix:
    """The same weight with factors of its results.

    Args:
        given: Without factors.
        factors: One for each row, or one for all.
    """
    rows = torch.as_tensor(factors, dtype=torch.float32).expand(given.rows).contiguous()
    return given if bool((rows == 1).all()) else replace(given, factors=rows)


def dense(weight: Tensor, bias: Tensor | None = None) -> Matrix:
    """A dense weight.

    Args:
        weight: ``[(E,) N, K]`` with contiguous rows. float32 whose values are all representable in bfloat16 is stored
            as bfloat16, which changes no result and halves the traffic; other types than these two become float32.
        bias: ``[(E,) N]`` or None.
    """
    if weight.dtype == torch.float32 and torch.equal(weight.to(torch.bfloat16).to(torch.float32), weight):
        weight = weight.to(torch.bfloat16)
    if weight.dtype not in KINDS:
        weight = weight.to(torch.float32)
    if weight.stride(-1) != 1 or weight.stride(-2) != weight.shape[-1]:
        weight = weight.contiguous()
    return Matrix(weight, weight.shape[-2], weight.shape[-1], bias=_float(bias))


def packed(
    words: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int,
    bias: Tensor | None = None, interleaved: bool = False,
) -> Matrix:  # fmt: skip
    """A group-quantized weight.

    Args:
        words: Canonical int32 ``[(E,) N, words(K, bits)]``, which is copied, or interleaved ones, which are shared.
        scale: fp16 ``[(E,) N, G]``, or interleaved.
        zero: int32 ``[(E,) N, words(G, bits)]``, or interleaved, or None.
        bits: 2, 3, 4 or 8.
        group_size: Columns per scale.
        columns: K.
        bias: ``[(E,) N]`` or None.
        interleaved: Whether the tensors are.
    """
    rows = words.shape[-3] * LANES if interleaved else words.shape[-2]
    tensors = [None if t is None else t if interleaved else _interleave(t) for t in (words, scale, zero)]
    held: Any = tensors
    return Matrix(held[0], rows, columns, held[1], held[2], _float(bias), bits=bits, group_size=group_size)


def of_tree(
    planes: Sequence[tree.Plane], members: Sequence[int], rows: int, columns: int, group_size: int,
    bias: Tensor | None = None,
) -> Matrix:  # fmt: skip
    """A weight of a family: the sum of the nodes above a token's member.

    Args:
        planes: Nodes in the order of :mod:`llmcompress_kernels.tree`.
        members: For each of them a bit per member below it.
        rows: N, a multiple of 16.
        columns: K.
        group_size: Columns per scale.
        bias: ``[members, N]`` or None.
    """
    assert rows % LANES == 0
    nodes = (tree.Node * len(planes))(*(plane.struct(below) for plane, below in zip(planes, members)))
    group = min(group_size, columns)
    return Matrix(
        planes[0].words, rows, columns, bias=_float(bias), group_size=group, planes=tuple(planes), nodes=nodes
    )


def _interleave(rows: Tensor) -> Tensor:
    """Words of sixteen neighbouring rows side by side; the last rows are filled up with zeros."""
    return interleave(torch.nn.functional.pad(rows, (0, 0, 0, -rows.shape[-2] % LANES)))


def _float(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()
