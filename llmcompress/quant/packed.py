"""PackedWeight: a quantized weight as a value; what its tensors mean is its codec's affair."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from llmcompress.errors import InputError
from llmcompress.quant.spec import QuantSpec

if TYPE_CHECKING:
    import torch
    from torch import Tensor


# name of a stored tensor → shape and name of its data type
TensorShapes = dict[str, tuple[tuple[int, ...], str]]
_ITEM_BYTES = {"int32": 4, "float16": 2}


def stored_bytes(tensors: TensorShapes) -> int:
    """Bytes of tensors of these shapes and types, without torch."""
    return sum(prod(shape) * _ITEM_BYTES[kind] for shape, kind in tensors.values())


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

    def require(self, expected: TensorShapes, what: str) -> None:
        """Check that the tensors are those that a codec wants.

        Args:
            expected: The codec's ``tensor_shapes``.
            what: Kind of weight, for the message.

        Raises:
            InputError: One is missing or has another shape.
        """
        for name, (shape, _) in expected.items():
            stored = self.tensors.get(name)
            if stored is None or tuple(stored.shape) != shape:
                got = "nothing" if stored is None else f"shape {tuple(stored.shape)}"
                raise InputError(f"{what} {self.shape}: {name} should have shape {shape}, found {got}")

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensors."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())
