"""What CUDA tensors run: the first of CUDA C++, Triton and the definition that accepts the call.

Registered under PyTorch's CUDA key, which takes precedence over the definition. Nothing is imported or compiled before
the first call on a CUDA tensor, and a machine without a GPU registers all of it just the same.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import select
from llmcompress_kernels.reference import group_gemm as reference_group_gemm
from llmcompress_kernels.reference import moe_group_gemm as reference_moe_group_gemm
from llmcompress_kernels.schemas import _LIBRARY


@cache
def no_triton() -> str | None:
    """Why Triton kernels cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'llmcompress[triton]'"
    return no_device()


@cache
def no_device() -> str | None:
    """Why no CUDA kernel can run here, or None."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 8 else f"compute capability {major}.{minor}, 8.0 is needed"


def wanted(name: str) -> bool:
    """Whether the user's choice admits an implementation."""
    return select.requested() in ("auto", name)


def group_gemm(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    in_features: int,
    *rest: Any,
) -> Tensor:
    """CUDA implementation of the operator; ``rest`` holds options that only the definition knows."""
    arguments = (x, packed, scale, zero, bits, group_size, in_features)
    if wanted("triton") and no_triton() is None and packed.dim() == 2 and not any(rest):
        from llmcompress_kernels.triton import group_gemm as kernels

        if kernels.verify(x, bits) is None:
            return kernels.group_gemm(*arguments)
    return reference_group_gemm.group_gemm(*arguments, *rest)


# operands of moe_group_gemm by position: x, index, weights, six per side, intermediate, activation, alpha, limit
_GATE_UP, _GATE_UP_BITS, _DOWN_BITS, _ACTIVATION, _COUNT = 3, 7, 13, 16, 19


def moe_group_gemm(*arguments: Any) -> Tensor:
    """CUDA implementation of the operator; arguments as in its schema."""
    x, own, rest = arguments[0], arguments[:_COUNT], arguments[_COUNT:]
    if wanted("triton") and no_triton() is None and own[_GATE_UP].dim() == 3 and not any(rest):
        from llmcompress_kernels.triton import moe_group_gemm as kernels

        if kernels.verify(x, own[_GATE_UP_BITS], own[_DOWN_BITS], own[_ACTIVATION]) is None:
            return kernels.moe_group_gemm(*own)
    return reference_moe_group_gemm.moe_group_gemm(*arguments)


for _name, _function in (("group_gemm", group_gemm), ("moe_group_gemm", moe_group_gemm)):
    _LIBRARY.impl(_name, _function, "CUDA")
    select.register(select.Implementation(_name, "triton", ("cuda",), no_triton))
