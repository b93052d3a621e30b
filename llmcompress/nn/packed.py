"""PackedTensors: a packed weight as a module whose state dict is what the codec stores."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llmcompress_kernels.ops import Stack
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.quant.codecs import codec
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec


class PackedTensors(nn.Module):
    """Holds the tensors of one packed weight as buffers, empty until a state dict or a weight is loaded.

    Args:
        shape: Logical shape ``[N, K]`` or ``[E, N, K]``.
        spec: How the weight is quantized.
        device: Where to allocate; ``meta`` allocates nothing.

    Raises:
        InputError: No operator can compute with the spec's codec.
    """

    weight_packed: Tensor
    weight_scale: Tensor

    def __init__(self, shape: tuple[int, ...], spec: QuantSpec, device: torch.device | str | None = None) -> None:
        super().__init__()
        if spec.codec != "int_group":
            raise InputError(f"codec {spec.codec!r} cannot be computed with while packed")
        self.shape = tuple(shape)
        self.spec = spec
        for key, (dims, dtype) in codec(spec.codec).tensor_shapes(self.shape, spec).items():
            self.register_buffer(key, torch.empty(dims, dtype=getattr(torch, dtype), device=device))

    @property
    def zero(self) -> Tensor | None:
        """Packed zero points, None on a symmetric grid."""
        found: Tensor | None = self._buffers.get("weight_zero_point")
        return found

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return self.packed_weight().nbytes

    @property
    def columns_per_group(self) -> int:
        """Columns that share a scale; a group never exceeds the row."""
        return self.spec.group(self.shape[-1])

    def packed_weight(self) -> PackedWeight:
        """The weight as a value; tensors are shared, not copied."""
        keys = codec(self.spec.codec).tensor_shapes(self.shape, self.spec)
        return PackedWeight(self.shape, self.spec, {key: getattr(self, key) for key in keys})

    def stack(self, bias: Tensor | None = None) -> Stack:
        """The weight as an operand of ``moe_group_gemm``."""
        return Stack(self.weight_packed, self.weight_scale, self.zero, bias, self.spec.bits, self.columns_per_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move buffers but never change their type: scales are fp16 by definition, whatever the model's type."""
        own, self._buffers = self._buffers, {}
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers = own
        for key, buffer in own.items():
            if buffer is not None:
                moved = fn(buffer)
                own[key] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        """Shape and spec for printing."""
        spec = self.spec
        kind = "symmetric" if spec.symmetric else "asymmetric"
        return f"shape={list(self.shape)}, bits={spec.bits}, group_size={spec.group_size}, {kind}"
