"""Codec ``int_group``: unsigned codes with an fp16 scale and an optional zero point per group of columns.

Legend: E experts, N rows, K columns, G groups per row, b bits.

``w ≈ scale * (code - zero)``; on a symmetric grid ``zero`` is ``2**(b-1)`` and not stored. Decoding is done
in fp32 (fp16 scale widened exactly), then cast.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from llmcompress.quant.packed import PackedWeight, TensorShapes, stored_bytes
from llmcompress.quant.spec import QuantSpec, packed_words

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PACKED, SCALE, ZERO, DENSE = "weight_packed", "weight_scale", "weight_zero_point", "weight_dense"


def tensor_shapes(shape: Sequence[int], spec: QuantSpec) -> TensorShapes:
    """Names, shapes and dtype names of the stored tensors, without torch.

    Args:
        shape: Logical shape ``[..., N, K]``.
        spec: Quantization of the weight.
    """
    *leading, count, columns = shape
    rows = [*leading, count - spec.dense_rows]
    groups = spec.groups(columns)
    found: TensorShapes = {
        PACKED: ((*rows, packed_words(columns, spec.bits)), "int32"),
        SCALE: ((*rows, groups), "float16"),
    }
    if not spec.symmetric:
        found[ZERO] = ((*rows, packed_words(groups, spec.bits)), "int32")
    if spec.dense_rows:
        found[DENSE] = ((*leading, spec.dense_rows, columns), "float16")
    return found


def nbytes(shape: Sequence[int], spec: QuantSpec) -> int:
    """Bytes of the stored tensors, without torch."""
    return stored_bytes(tensor_shapes(shape, spec))


def encode(
    codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, dense: Tensor | None = None
) -> PackedWeight:
    """Pack codes, scales and zero points.

    Args:
        codes: ``[..., N, K]`` uint8.
        scale: ``[..., N, G]``, values representable in fp16.
        zero: ``[..., N, G]`` uint8, or None on a symmetric grid.
        spec: Quantization of the weight.
        dense: ``[..., spec.dense_rows, K]`` rows that follow and are not quantized, if the spec has any.

    Raises:
        ValueError: Shapes disagree, or ``zero`` or ``dense`` is missing or superfluous.
    """
    import torch

    from llmcompress.quant.bitpack import pack

    grid_shape = (*codes.shape[:-1], spec.groups(codes.shape[-1]))
    if tuple(scale.shape) != grid_shape:
        raise ValueError(f"scale has shape {tuple(scale.shape)}, expected {grid_shape}")
    if (zero is None) != spec.symmetric:
        raise ValueError("a zero point is needed on an asymmetric grid and only there")
    tensors = {PACKED: pack(codes, spec.bits), SCALE: scale.to(torch.float16).contiguous()}
    if zero is not None:
        if tuple(zero.shape) != grid_shape:
            raise ValueError(f"zero has shape {tuple(zero.shape)}, expected {grid_shape}")
        tensors[ZERO] = pack(zero.to(torch.uint8), spec.bits)
    if (dense is None) != (spec.dense_rows == 0) or (dense is not None and dense.shape[-2] != spec.dense_rows):
        raise ValueError(f"the spec keeps {spec.dense_rows} dense rows")
    shape = (*codes.shape[:-2], codes.shape[-2] + spec.dense_rows, codes.shape[-1])
    if dense is not None:
        tensors[DENSE] = dense.to(torch.float16).contiguous()
    return PackedWeight(shape, spec, tensors)


def unpack_parts(pw: PackedWeight) -> tuple[Tensor, Tensor, Tensor | None]:
    """Codes ``[..., N, K]`` uint8, scale ``[..., N, G]`` fp16 and zero ``[..., N, G]`` uint8 or None; no dense rows.

    Raises:
        InputError: A stored tensor is missing or has another shape than ``tensor_shapes`` says.
    """
    from llmcompress.quant.bitpack import unpack

    pw.require(tensor_shapes(pw.shape, pw.spec), "packed weight")
    columns = pw.shape[-1]
    codes = unpack(pw.tensors[PACKED], pw.spec.bits, columns)
    zero = None if pw.spec.symmetric else unpack(pw.tensors[ZERO], pw.spec.bits, pw.spec.groups(columns))
    return codes, pw.tensors[SCALE], zero


def dequantize(
    codes: Tensor, scale: Tensor, zero: Tensor | None, spec: QuantSpec, dtype: torch.dtype | None = None
) -> Tensor:
    """``scale * (code - zero)`` in fp32, cast to ``dtype``.

    Args:
        codes: ``[..., N, K]`` uint8.
        scale: ``[..., N, G]`` fp16 (or fp32 with fp16 values).
        zero: ``[..., N, G]`` uint8, or None on a symmetric grid.
        spec: Quantization of the weight.
        dtype: Result dtype, fp32 when None.

    Returns:
        ``[..., N, K]``.
    """
    import torch

    columns = codes.shape[-1]
    size, groups = spec.group(columns), spec.groups(columns)
    values = codes.to(torch.float32)
    padded = size * groups != columns
    if padded:
        values = torch.nn.functional.pad(values, (0, size * groups - columns))
    values = values.unflatten(-1, (groups, size))
    offset = float(spec.midpoint) if zero is None else zero.to(torch.float32).unsqueeze(-1)
    values = values.sub_(offset).mul_(scale.to(torch.float32).unsqueeze(-1)).flatten(-2)
    if padded:
        values = values[..., :columns].contiguous()
    return values if dtype is None else values.to(dtype)


def decode(pw: PackedWeight, dtype: torch.dtype | None = None) -> Tensor:
    """Dense weight ``[..., N, K]`` in ``dtype`` (fp32 when None).

    Raises:
        InputError: The stored tensors do not fit the logical shape.
    """
    import torch

    codes, scale, zero = unpack_parts(pw)
    values = dequantize(codes, scale, zero, pw.spec, dtype)
    dense = pw.tensors.get(DENSE)
    return values if dense is None else torch.cat((values, dense.to(values.dtype)), dim=-2)
