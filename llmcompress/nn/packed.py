"""PackedTensors: a packed weight as a module whose state dict is what the codec stores.

In memory the words of 16 rows may lie side by side (*interleaved*), the order that the CPU kernels want. It holds
the same bytes, so it replaces the stored order instead of standing beside it; a state dict, a move to another
device and :meth:`PackedTensors.packed_weight` give the stored order back, bit for bit.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from llmcompress_kernels import cpu
from llmcompress_kernels.ops import Stack
from llmcompress_kernels.reference.group_gemm import deinterleave, interleave
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.quant.codecs import codec
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec

# what is interleaved; dense rows keep their order
_WORDS = ("weight_packed", "weight_scale", "weight_zero_point")
# two threads may meet at the first call of a module
_PREPARING = threading.Lock()


@contextmanager
def buffers_of_fixed_type(module: nn.Module, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, ``nn.Module._apply`` finds no buffers; afterwards ``fn`` has moved them without changing their type.

    Scales are fp16 by definition, whatever the model's type.
    """
    own, module._buffers = module._buffers, {}
    try:
        yield
    finally:
        module._buffers = own
    for key, buffer in own.items():
        if buffer is not None:
            moved = fn(buffer)
            own[key] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)


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
        self.interleaved = False
        self.declined: str | None = "not prepared"
        self.seconds = 0.0
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
        """The weight as a value in the stored order; tensors are shared, not copied, unless they are interleaved."""
        keys = codec(self.spec.codec).tensor_shapes(self.shape, self.spec)
        return PackedWeight(self.shape, self.spec, {key: self._stored(key) for key in keys})

    def prepare(self) -> bool:
        """Interleave the weight if native CPU kernels run here and can use it; done at the first call otherwise.

        Returns:
            Whether it is interleaved. :attr:`declined` holds the reason why not, :attr:`seconds` what it took.
        """
        with _PREPARING:
            if self.interleaved or self.weight_packed.device.type != "cpu":
                return self.interleaved
            self.declined = self._declined()
            if self.declined is None:
                began = time.perf_counter()
                # one tensor at a time, so that the peak is one tensor and not the weight
                for key in _WORDS:
                    tensor = self._buffers.get(key)
                    if tensor is not None:
                        self._buffers[key] = interleave(tensor)
                self.interleaved = True
                self.seconds = time.perf_counter() - began
            return self.interleaved

    def _declined(self) -> str | None:
        if not cpu.ready():
            return "native kernels do not run here; `llmcompress doctor` says why"
        return cpu.declines(self.spec.bits, self.columns_per_group, self.weight_packed.shape[-2], self.shape[-1])

    def _stored(self, key: str) -> Tensor:
        """A buffer in the stored order."""
        tensor: Tensor = getattr(self, key)
        return deinterleave(tensor) if self.interleaved and key in _WORDS else tensor

    def _restore(self) -> None:
        """Back to the stored order."""
        with _PREPARING:
            for key in _WORDS:
                if self._buffers.get(key) is not None:
                    self._buffers[key] = self._stored(key)
            self.interleaved, self.declined = False, "not prepared"

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.interleaved:
            destination.update(
                {prefix + key: self._stored(key) for key in _WORDS if self._buffers.get(key) is not None}
            )

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self._restore()
        super()._load_from_state_dict(*args, **kwargs)

    def stack(self, bias: Tensor | None = None) -> Stack:
        """The weight as an operand of ``moe_group_gemm``."""
        return Stack(self.weight_packed, self.weight_scale, self.zero, bias, self.spec.bits, self.columns_per_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move buffers but never change their type."""
        self._restore()
        with buffers_of_fixed_type(self, fn):
            super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Shape and spec for printing."""
        spec = self.spec
        kind = "symmetric" if spec.symmetric else "asymmetric"
        return f"shape={list(self.shape)}, bits={spec.bits}, group_size={spec.group_size}, {kind}"


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put a module in the place of the one that has this name in the model."""
    parent, _, key = name.rpartition(".")
    new.train(model.training)
    setattr(model.get_submodule(parent), key, new)
