"""Fixtures of the kernel tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from llmcompress_kernels import ops


@pytest.fixture
def packed() -> Callable[..., ops.Stack]:
    """Make random packed weights of any shape ``[..., N, K]``."""

    def make(shape: tuple[int, ...], bits: int, group: int, symmetric: bool, device: str = "cpu") -> ops.Stack:
        if bits == 16:
            return ops.Stack(torch.randn(shape, device=device) / 4)
        groups = -(-shape[-1] // group)
        codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8)
        scale = (torch.rand(*shape[:-1], groups) * 0.1 + 0.01).to(torch.float16)
        zero = torch.randint(0, 1 << bits, (*shape[:-1], groups), dtype=torch.uint8)
        zeros = None if symmetric else ops.pack(zero, bits).to(device)
        return ops.Stack(ops.pack(codes, bits).to(device), scale.to(device), zeros, None, bits, group)

    return make
