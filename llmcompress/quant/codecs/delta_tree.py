"""Codec ``delta_tree``: one node's residual of one weight, on a half-integer grid with fp16 scales.

``r = 2^e · s · (q - z)`` with ``z = (2^b - 1)/2``, codes ``q`` of 1 to 6 bits, a scale ``s`` per row and group of
columns, and one exponent per matrix. Residuals can be ten thousand times smaller than weights, where fp16
loses digits; the power of two brings them back into its range and costs no rounding. A model's weight is the sum of its
nodes, from the root down, in fp32.

Legend: N rows, K columns, G groups per row, b bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcompress.errors import InputError
from llmcompress.quant.codecs.int_group import PACKED, SCALE
from llmcompress.quant.codecs.int_group import dequantize as dequantize_group
from llmcompress.quant.packed import PackedWeight, TensorShapes, stored_bytes
from llmcompress.quant.spec import DELTA_TREE, QuantSpec, packed_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EXPONENT = "weight_exponent"
# exponents within which 2^e and its product with any fp16 scale are normal fp32 numbers
LOWEST, HIGHEST = -100, 100


def node_spec(bits: int, group_size: int) -> QuantSpec:
    """Spec of a residual with ``bits`` bits."""
    return QuantSpec(bits, group_size, symmetric=True, codec=DELTA_TREE)


def tensor_shapes(shape: Sequence[int], spec: QuantSpec) -> TensorShapes:
    """Names, shapes and dtype names of the stored tensors, without torch.

    Args:
        shape: Logical shape ``[N, K]``.
        spec: Quantization of the residual.
    """
    *rows, columns = shape
    return {
        PACKED: ((*rows, packed_words(columns, spec.bits)), "int32"),
        SCALE: ((*rows, spec.groups(columns)), "float16"),
        EXPONENT: ((1,), "int32"),
    }


def nbytes(shape: Sequence[int], spec: QuantSpec) -> int:
    """Bytes of the stored tensors, without torch."""
    return stored_bytes(tensor_shapes(shape, spec))


def encode(codes: Tensor, scale: Tensor, exponent: int, spec: QuantSpec) -> PackedWeight:
    """Pack codes and scales.

    Args:
        codes: ``[N, K]`` uint8.
        scale: ``[N, G]``, values representable in fp16.
        exponent: e.
        spec: Quantization of the residual.

    Raises:
        ValueError: Shapes disagree or the exponent is out of range.
    """
    import torch

    from llmcompress.quant.bitpack import pack

    grid_shape = (*codes.shape[:-1], spec.groups(codes.shape[-1]))
    if tuple(scale.shape) != grid_shape:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {grid_shape}")
    if not LOWEST <= exponent <= HIGHEST:
        raise ValueError(f"exponent {exponent} is outside {LOWEST} to {HIGHEST}")
    tensors = {
        PACKED: pack(codes, spec.bits),
        SCALE: scale.to(torch.float16).contiguous(),
        EXPONENT: torch.tensor([exponent], dtype=torch.int32),
    }
    return PackedWeight(tuple(codes.shape), spec, tensors)


def dequantize(codes: Tensor, scale: Tensor, exponent: int, spec: QuantSpec) -> Tensor:
    """``2^e · (s · (q - z))`` in fp32.

    Args:
        codes: ``[N, K]`` uint8.
        scale: ``[N, G]`` fp16.
        exponent: e.
        spec: Quantization of the residual.

    Returns:
        ``[N, K]`` fp32.
    """
    return dequantize_group(codes, scale, None, spec).mul_(2.0**exponent)


def decode(pw: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Dense residual ``[N, K]`` in ``dtype`` (fp32 when None).

    Raises:
        InputError: The stored tensors do not fit the logical shape.
    """
    from llmcompress.quant.bitpack import unpack

    pw.require(tensor_shapes(pw.shape, pw.spec), "residual")
    exponent = int(pw.tensors[EXPONENT][0])
    if not LOWEST <= exponent <= HIGHEST:
        raise InputError(f"residual {pw.shape}: exponent {exponent} is outside {LOWEST} to {HIGHEST}")
    codes = unpack(pw.tensors[PACKED], pw.spec.bits, pw.shape[-1])
    values = dequantize(codes, pw.tensors[SCALE], exponent, pw.spec)
    return values if dtype is None else values.to(dtype)


def reconstruct(nodes: Sequence[PackedWeight]) -> Tensor:
    """Sum of nodes from the root down, in fp32: the weight of the model at the end of the path.

    Raises:
        InputError: There is no node, or shapes disagree.
    """
    if not nodes:
        raise InputError("a weight without any node cannot be rebuilt", "the artifact is incomplete: export it again")
    total = decode(nodes[0])
    for node in nodes[1:]:
        if node.shape != nodes[0].shape:
            raise InputError(f"residuals of shapes {nodes[0].shape} and {node.shape} cannot be added")
        total += decode(node)
    return total
