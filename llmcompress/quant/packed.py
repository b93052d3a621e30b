"""PackedWeight: a quantized weight as a value, with no behaviour of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A quantized weight: logical shape, spec, and the tensors its codec stores.

    Attributes:
        shape: Logical shape, ``(N, K)`` or ``(E, N, K)``.
        spec: How it is quantized; ``spec.codec`` names the codec that reads ``tensors``.
        tensors: For ``int_group``: ``weight_packed`` int32 ``[..., N, ceil(K*bits/32)]``,
            ``weight_scale`` fp16 ``[..., N, G]`` and, when asymmetric,
            ``weight_zero_point`` int32 ``[..., N, ceil(G*bits/32)]``.
    """

    shape: tuple[int, ...]
    spec: QuantSpec
    tensors: Mapping[str, Tensor]

    def to(self, device: torch.device | str) -> PackedWeight:
        """The same weight with its tensors on a device."""
        return PackedWeight(self.shape, self.spec, {name: tensor.to(device) for name, tensor in self.tensors.items()})

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
