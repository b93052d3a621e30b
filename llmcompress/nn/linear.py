"""PackedLinear: a linear layer whose weight stays packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llmcompress_kernels import prepared
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
        self._product: Callable[[Tensor], Tensor] | None = None
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
        own = self._buffers
        y = _GROUP_GEMM(x, *self._arguments()) if torch.compiler.is_compiling() else self._call(own)(x)
        dense = own.get("weight_dense")
        return y, None if dense is None else torch.nn.functional.linear(x, dense.to(x.dtype))

    def _call(self, own: dict[str, Tensor | None]) -> Callable[[Tensor], Tensor]:
        """The product as a function of ``x``; made once, since looking its operands up costs as much as a small one."""
        held, product = self._operands, self._product
        if (
            product is None
            or held is None
            or held[0] is not own["weight_packed"]
            or held[1] is not own["weight_scale"]
            or held[-1] is not self.int8_activations
        ):
            if self.weight_packed.device.type == "cpu":
                self.prepare()
            held = self._arguments()
            product = self._product = prepared.product(*held)
            self._operands = held
        return product

    def _arguments(self) -> tuple[Any, ...]:
        """Arguments of the operator but for ``x``."""
        shape = (self.spec.bits, self.columns_per_group, self.in_features)
        return (self.weight_packed, self.weight_scale, self.zero, *shape, self.int8_activations)

    def _restore(self) -> None:
        self._operands = self._product = None  # they would keep the old tensors alive
        super()._restore()

    def __getstate__(self) -> dict[str, Any]:
        """What a copy starts from: it makes its own product."""
        return {**self.__dict__, "_operands": None, "_product": None}
