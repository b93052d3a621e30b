"""PackedLinear: a linear layer whose weight stays packed."""

from __future__ import annotations

from typing import Any

import llmcompress_kernels  # noqa: F401 - defines the operator
import torch
from torch import Tensor, nn

from llmcompress.nn.packed import PackedTensors
from llmcompress.quant.spec import QuantSpec

# the overload itself: choosing it costs half a microsecond in every call
_GROUP_GEMM = torch.ops.llmcompress.group_gemm.default


class PackedLinear(PackedTensors):
    """``y = x Wᵀ (+ b)`` with a packed ``W [out_features, in_features]``.

    Args:
        in_features: K.
        out_features: N.
        spec: How the weight is quantized.
        bias: Whether there is a bias, kept dense.
        dtype: Type of the bias.
        device: Where to allocate.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        spec: QuantSpec,
        bias: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__((out_features, in_features), spec, device)
        self.in_features = in_features
        self.out_features = out_features
        # rounding activations to int8 changes results, so only a caller turns it on
        self.int8_activations = False
        self._operands: tuple[Any, ...] | None = None
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))

    @property
    def weight(self) -> Tensor:
        """The packed tensor: code that initialises or inspects ``.weight`` finds an initialised one."""
        return self.weight_packed

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[..., in_features]`` into ``[..., out_features]`` of the same type."""
        y, dense = self.parts(x)
        if dense is not None:
            y = torch.cat((y, dense), dim=-1)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def parts(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Outputs of the packed rows and of the dense rows after them, None where there are none; without bias."""
        operands, own = self._operands, self._buffers
        if operands is None or operands[0] is not own["weight_packed"] or operands[1] is not own["weight_scale"]:
            operands = self._prepared(x)
        y = _GROUP_GEMM(x, *operands, self.int8_activations)
        dense = own.get("weight_dense")
        return y, None if dense is None else torch.nn.functional.linear(x, dense.to(x.dtype))

    def _restore(self) -> None:
        self._operands = None  # they would keep the old tensors alive
        super()._restore()

    def _prepared(self, x: Tensor) -> tuple[Any, ...]:
        """Arguments of the operator but for ``x``; looked up once, since a lookup costs as much as a small product."""
        compiling = torch.compiler.is_compiling()
        if not compiling and x.device.type == "cpu":
            self.prepare()
        shape = (self.spec.bits, self.columns_per_group, self.in_features)
        operands = (self.weight_packed, self.weight_scale, self.zero, *shape)
        if not compiling:
            self._operands = operands
        return operands
