"""Typed façade of the operators; see :mod:`llmcompress_kernels.schemas` for the shape legend."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from llmcompress_kernels import cpu, operand_shapes, schemas
from llmcompress_kernels.reference.moe_group_gemm import ACTIVATIONS


@dataclass(frozen=True, slots=True)
class Stack:
    """One side of a bank of experts, packed or dense.

    Attributes:
        weight: Packed int32 ``[E, N, words(K, bits)]``, or a dense ``[E, N, K]`` with ``bits`` 16.
        scale: fp16 ``[E, N, G]``; None when dense.
        zero: int32 ``[E, N, words(G, bits)]``; None when symmetric or dense.
        bias: ``[E, N]`` or None.
        bits: Code width, or 16 for dense.
        group_size: Columns per scale.
    """

    weight: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    bias: Tensor | None = None
    bits: int = schemas.DENSE_BITS
    group_size: int = 1

    def operand(self) -> operand_shapes.Operand:
        """Its six operands in the order of the schema."""
        return self.weight, self.scale, self.zero, self.bias, self.bits, self.group_size


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes ``[..., K]`` uint8 into ``[..., words(K, bits)]`` int32."""
    out: Tensor = torch.ops.llmcompress.pack.default(codes, bits)
    return out


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack ``[..., words(count, bits)]`` int32 into ``[..., count]`` uint8."""
    out: Tensor = torch.ops.llmcompress.unpack.default(packed, bits, count)
    return out


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    int8: bool = False,
) -> Tensor:
    """``x Wᵀ`` with a group-quantized ``W [N, K]``.

    Args:
        x: ``[..., K]``, any floating type; the result has the same.
        packed: ``[N, words(K, bits)]`` int32. With scale and zero it may come interleaved, ``[N/16, words, 16]``.
        scale: ``[N, G]`` fp16.
        zero: ``[N, words(G, bits)]`` int32, or None for a symmetric grid.
        bits: 2, 3, 4 or 8.
        group_size: Columns per scale, positive.
        in_features: K.
        int8: Round activations to int8, one scale per token and chunk of at most 64 columns: faster where
            arithmetic limits, and another result (about 0.5 %), so never a default.

    Returns:
        ``[..., N]``.
    """
    if x.device.type == "cpu":
        cpu.ready()
    out: Tensor = torch.ops.llmcompress.group_gemm.default(x, packed, scale, zero, bits, group_size, in_features, int8)
    return out


def moe_group_gemm(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Stack,
    down: Stack,
    intermediate: int,
    activation: str = "silu",
    alpha: float = 1.702,
    limit: float = 7.0,
    int8: bool = False,
) -> Tensor:
    """Experts over routed tokens: gate and up, activation, down, weighted sum.

    Args:
        x: ``[T, H]``.
        index: int64 ``[T, k]`` expert of every slot; ``E`` means that the slot is skipped. On a GPU the range is not
            checked, because that would wait for it; slots of no expert are skipped.
        weights: ``[T, k]`` weight of every slot.
        gate_up: ``[E, 2I, H]``, gate rows first; without a gate (``relu2``) ``[E, I, H]``.
        down: ``[E, H, I]``.
        intermediate: I.
        activation: ``silu``, ``gelu``, ``gelu_pytorch_tanh``, ``gpt_oss``, or ``relu2``: ``relu(up)^2``, no gate.
        alpha: Alpha of ``gpt_oss``: ``(up + 1) * gate * sigmoid(alpha * gate)``.
        limit: Limit of ``gpt_oss``: ``gate`` is clamped from above and ``up`` from both sides there.
        int8: Round the activations of packed sides to int8, see :func:`group_gemm`.

    Returns:
        ``[T, H]`` in the type of ``x``; a token whose slots are all skipped gets zeros.

    Raises:
        ValueError: The activation is unknown, or operands do not fit each other.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}, expected one of {', '.join(ACTIVATIONS)}")
    if x.device.type == "cpu":
        cpu.ready()
    sides = *gate_up.operand(), *down.operand()
    rest = (intermediate, activation, alpha, limit, int8)
    out: Tensor = torch.ops.llmcompress.moe_group_gemm.default(x, index, weights, *sides, *rest)
    return out


def delta_decode(
    x: Tensor,
    packed: list[Tensor],
    scale: list[Tensor],
    spans: Tensor,
    bits: list[int],
    multiplier: list[float],
    group_size: int,
) -> Tensor:
    """Product of rows that belong to several models of one residual tree; each node is used once.

    Args:
        x: ``[T, K]``, rows sorted so that those below each node are neighbours.
        packed: Per node ``[N, words(K, b_v)]`` int32.
        scale: Per node ``[N, G]`` fp16.
        spans: ``[V, 2]`` int64 on the CPU, rows ``lo ≤ t < hi`` below each node.
        bits: Per node, 1 to 6; codes are centred on ``(2^b - 1)/2``.
        multiplier: Per node, a power of two that multiplies its scales.
        group_size: Columns per scale.

    Returns:
        ``[T, N]`` in the type of ``x``: per row the sum over the nodes whose range holds it.

    Raises:
        ValueError: Operands do not fit each other.
    """
    out: Tensor = torch.ops.llmcompress.delta_decode(x, packed, scale, spans, bits, multiplier, group_size)
    return out
