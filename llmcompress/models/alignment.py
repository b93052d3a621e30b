"""Where tensors begin in memory: the last bits of a product may depend on it.

Matrix libraries choose code paths by alignment and round differently. What is to be the same to the last bit, whether
it lies in a file's mapping, in a part of a larger tensor or alone, begins on a cache line.
"""

from __future__ import annotations

from torch import Tensor, nn

CACHE_LINE = 64


def aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it that begins on a cache line; on a GPU ``x``."""
    return x if _is_aligned(x) else x.clone()


def align(model: nn.Module) -> None:
    """Move CPU tensors of a model that do not start on a cache line, as those mapped from a file rarely do.

    Shared tensors stay shared.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            # a tied parameter is one object with several owners; changing its data keeps it so
            if not _is_aligned(parameter):
                parameter.data = parameter.detach().clone()
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not _is_aligned(buffer):
                persistent = name not in module._non_persistent_buffers_set
                module.register_buffer(name, buffer.detach().clone(), persistent=persistent)


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" or tensor.data_ptr() % CACHE_LINE == 0
