"""Whether the operands of ``group_gemm``, ``moe_group_gemm`` and ``delta_decode`` fit each other: asked before any
kernel runs, which would read past them.

The C++ kernels compare shapes themselves, since this takes a fifth of a product of one token behind cold caches; what
does not fit they hand to the definition, which asks here.

Legend as in :mod:`llmcompress_kernels.schemas`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from llmcompress_kernels.reference.bitpack import words
from llmcompress_kernels.reference.group_gemm import LANES
from llmcompress_kernels.reference.moe_group_gemm import DENSE_BITS

# one side: weight, scale, zero, bias, bits, columns per group
Operand = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int, int]


def check_linear(
    x: Tensor, packed: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group_size: int, columns: int
) -> None:
    """Compare shapes of ``group_gemm``.

    Args:
        x: ``[..., K]``.
        packed: ``[N, words(K, bits)]``, or interleaved like the next two.
        scale: ``[N, G]``.
        zero: ``[N, words(G, bits)]`` or None.
        bits: Code width.
        group_size: Columns per scale.
        columns: K.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    if x.dim() == 0 or x.shape[-1] != columns:
        raise ValueError(f"group_gemm: x has shape {list(x.shape)}, expected [..., {columns}]")
    if packed.dim() not in (2, 3):
        raise ValueError(f"group_gemm: packed has shape {list(packed.shape)}, expected two dimensions, or three")
    if group_size < 1:
        raise ValueError(f"group_gemm: {group_size} columns per group")
    for part, tensor, width in _widths("packed", packed, scale, zero, bits, group_size, columns):
        # the three come in one order: row by row, or 16 rows interleaved
        shape = (packed.shape[0], width, LANES)[: packed.dim()]
        _expect(f"group_gemm: {part}", tensor, shape)


def check_routed(
    x: Tensor, index: Tensor, weights: Tensor, gate_up: Operand, down: Operand, rows: int, intermediate: int
) -> None:
    """Compare shapes of ``moe_group_gemm``; on the CPU also the range of ``index``, which a GPU would have to be waited
    for.

    Args:
        x: ``[T, H]``.
        index: int64 ``[T, k]``, 0 to E.
        weights: ``[T, k]``.
        gate_up: ``[E, rows, H]``.
        down: ``[E, H, I]``.
        rows: Rows of the first projection: 2I, or I where experts have no gate.
        intermediate: I.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    if x.dim() != 2:
        raise ValueError(f"moe_group_gemm: x has shape {list(x.shape)}, expected [tokens, hidden]")
    if index.dim() != 2 or index.shape[0] != x.shape[0] or index.dtype != torch.int64:
        raise ValueError(
            f"moe_group_gemm: index has shape {list(index.shape)} and type {index.dtype}, "
            f"expected [{x.shape[0]}, experts per token] and torch.int64"
        )
    if weights.shape != index.shape:
        raise ValueError(f"moe_group_gemm: weights have shape {list(weights.shape)}, expected {list(index.shape)}")
    experts, hidden = gate_up[0].shape[0], x.shape[1]
    _check_side("moe_group_gemm: gate_up", gate_up, experts, rows, hidden)
    _check_side("moe_group_gemm: down", down, experts, hidden, intermediate)
    if index.device.type == "cpu" and index.numel():
        least, most = (int(bound) for bound in index.aminmax())
        if least < 0 or most > experts:
            raise ValueError(
                f"moe_group_gemm: index holds experts {least} to {most}, expected 0 to {experts - 1}, "
                f"or {experts} for a slot that is skipped"
            )


def check_tree(
    x: Tensor, packed: Sequence[Tensor], scale: Sequence[Tensor], spans: Tensor, bits: Sequence[int],
    multiplier: Sequence[float], group_size: int,
) -> None:  # fmt: skip
    """Compare shapes of ``delta_decode``.

    Args:
        x: ``[T, K]``.
        packed: Per node ``[N, words(K, b)]``.
        scale: Per node ``[N, G]``.
        spans: ``[V, 2]``, rows of ``x``.
        bits: Per node.
        multiplier: Per node.
        group_size: Columns per scale.

    Raises:
        ValueError: They do not fit; the message names the operand, what it has and what it should have.
    """
    nodes = len(packed)
    if not nodes == len(scale) == len(bits) == len(multiplier) or spans.shape != (nodes, 2) or nodes == 0:
        raise ValueError(
            f"delta_decode: {nodes} packed weights, {len(scale)} scales, {len(bits)} widths, {len(multiplier)} "
            f"multipliers and spans {list(spans.shape)}, expected as many of each and spans [nodes, 2]"
        )
    if x.dim() != 2 or packed[0].dim() != 2 or group_size < 1:
        raise ValueError(
            f"delta_decode: x has shape {list(x.shape)}, packed {list(packed[0].shape)}, expected two dimensions each; "
            f"{group_size} columns per group, expected one or more"
        )
    columns, rows = x.shape[1], packed[0].shape[0]
    groups = -(-columns // group_size)
    for node, (weight, steps, width, (low, high)) in enumerate(zip(packed, scale, bits, spans.tolist())):
        if low < high and (low < 0 or high > x.shape[0]):
            raise ValueError(f"delta_decode: spans[{node}] are rows {low} to {high} of {x.shape[0]}")
        if weight.shape != (rows, words(columns, width)) or steps.shape != (rows, groups):
            _expect(f"delta_decode: packed[{node}]", weight, (rows, words(columns, width)))
            _expect(f"delta_decode: scale[{node}]", steps, (rows, groups))


def _check_side(name: str, side: Operand, experts: int, rows: int, columns: int) -> None:
    weight, scale, zero, bias, bits, group = side
    if bias is not None:
        _expect(f"{name}.bias", bias, (experts, rows))
    if bits == DENSE_BITS:
        _expect(f"{name}.weight", weight, (experts, rows, columns))
        return
    if scale is None:
        raise ValueError(f"{name} has {bits} bits but no scale")
    if group < 1:
        raise ValueError(f"{name} has {group} columns per group")
    # the three come in one order: row by row, or 16 rows interleaved
    interleaved = weight.dim() == 4 and rows % LANES == 0
    for part, tensor, width in _widths("weight", weight, scale, zero, bits, group, columns):
        shape = (experts, rows // LANES, width, LANES) if interleaved else (experts, rows, width)
        _expect(f"{name}.{part}", tensor, shape)


def _widths(
    name: str, weight: Tensor, scale: Tensor, zero: Tensor | None, bits: int, group: int, columns: int
) -> list[tuple[str, Tensor, int]]:
    """Tensors of a packed weight, the first of this name, and what a row of each has."""
    groups = -(-columns // group)
    found = [(name, weight, words(columns, bits)), ("scale", scale, groups)]
    return found if zero is None else [*found, ("zero", zero, words(groups, bits))]


def _expect(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tensor.shape != shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
