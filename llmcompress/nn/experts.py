"""PackedExperts: a bank of experts, gated or not, whose weights stay packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from llmcompress_kernels import ops
from llmcompress_kernels.ops import Stack
from torch import Tensor, nn

from llmcompress.models.layout import ExpertBank
from llmcompress.nn.adapted_mixtures import on_scaled_inputs
from llmcompress.nn.packed import PackedTensors
from llmcompress.quant.spec import QuantSpec


class PackedExperts(nn.Module):
    """Stands where transformers has an experts module and is called like one.

    Weights are in the canonical orientation ``[E, 2I, H]`` (``[E, I, H]`` without a gate) and ``[E, H, I]`` whatever
    the family stores, under the family's names (``gate_up_proj`` or ``up_proj``, ``down_proj``); a projection without
    a spec stays dense in that orientation. Biases keep the family's order.

    Args:
        bank: Sizes, activation and biases.
        gate_up: Spec of the gate and up projections, or of the up projections alone, None to keep them dense.
        down: Spec of the down projection, None to keep it dense.
        dtype: Type of what is dense.
        device: Where to allocate.
        alpha: See ``limit``.
        limit: Constants of the ``gpt_oss`` activation.
    """

    def __init__(
        self,
        bank: ExpertBank,
        gate_up: QuantSpec | None,
        down: QuantSpec | None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        alpha: float = 1.702,
        limit: float = 7.0,
    ) -> None:
        super().__init__()
        self.num_experts = bank.num_experts
        self.hidden_dim = bank.hidden
        self.intermediate_dim = bank.intermediate
        self.activation = bank.activation
        self.interleaved = bank.interleaved
        self.scales_inputs = bank.scales_inputs
        self.first = bank.gate_up.rpartition(".")[2]
        self.alpha = alpha
        self.limit = limit
        # rounding activations to int8 changes results, so only a caller turns it on
        self.int8_activations = False
        self._operands: tuple[tuple[Any, ...], Stack, Stack] | None = None
        for key, name, spec in ((self.first, bank.gate_up, gate_up), ("down_proj", bank.down, down)):
            shape = bank.shape(name)
            if spec is not None:
                self.add_module(key, PackedTensors(shape, spec, device))
            else:
                self.register_parameter(key, _frozen(shape, dtype, device))
            rows = (shape[0], shape[1])
            self.register_parameter(f"{key}_bias", _frozen(rows, dtype, device) if bank.bias else None)

    def _side(self, key: str) -> Stack:
        weight, bias = getattr(self, key), getattr(self, f"{key}_bias")
        if bias is not None and self.interleaved and key == self.first:
            bias = torch.cat((bias[:, 0::2], bias[:, 1::2]), dim=1)
        return weight.stack(bias) if isinstance(weight, PackedTensors) else Stack(weight, bias=bias)

    def prepare(self) -> bool:
        """Interleave the packed sides if native CPU kernels can use them here; done at the first call otherwise.

        Returns:
            Whether every packed side is interleaved.
        """
        sides = [side for side in self._sides() if isinstance(side, PackedTensors)]
        done = [side.prepare() for side in sides]  # both, whatever the first says
        return all(done)

    def _sides(self) -> tuple[Any, Any]:
        return getattr(self, self.first), self.down_proj

    def _stacks(self, x: Tensor) -> tuple[Stack, Stack]:
        """Both sides as operands; looked up again only when a weight or a bias was replaced."""
        if torch.compiler.is_compiling():
            return self._side(self.first), self._side("down_proj")
        held = self._held()
        if self._operands is None or any(a is not b for a, b in zip(held, self._operands[0])):
            if x.device.type == "cpu":
                self.prepare()
            self._operands = (self._held(), self._side(self.first), self._side("down_proj"))
        return self._operands[1:]

    def _held(self) -> tuple[Any, ...]:
        """What the operands are made from."""
        tensors: list[Any] = [getattr(self, f"{self.first}_bias"), self.down_proj_bias]
        for side in self._sides():
            packed = isinstance(side, PackedTensors)
            tensors += [side.weight_packed, side.weight_scale] if packed else [side]
        return tuple(tensors)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self._operands = None  # they would keep the old tensors alive
        return super()._apply(fn, recurse)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the routed experts.

        Args:
            hidden_states: ``[T, H]``.
            top_k_index: ``[T, k]``; the index ``E`` skips a slot.
            top_k_weights: ``[T, k]``.

        Returns:
            ``[T, H]``.
        """
        if self.scales_inputs:
            return on_scaled_inputs(self._run, hidden_states, top_k_index, top_k_weights)
        return self._run(hidden_states, top_k_index, top_k_weights)

    def _run(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        gate_up, down = self._stacks(hidden_states)
        return ops.moe_group_gemm(
            hidden_states,
            top_k_index,
            top_k_weights,
            gate_up,
            down,
            self.intermediate_dim,
            self.activation,
            self.alpha,
            self.limit,
            self.int8_activations,
        )

    def extra_repr(self) -> str:
        """Sizes for printing."""
        sizes = f"experts={self.num_experts}, hidden={self.hidden_dim}, intermediate={self.intermediate_dim}"
        return f"{sizes}, activation={self.activation}"


def _frozen(shape: tuple[int, ...], dtype: torch.dtype | None, device: torch.device | str | None) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)
