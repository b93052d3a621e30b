"""The type of matrix products in training."""

from __future__ import annotations

from typing import Any


def autocast(device: str, dtype: str = "auto") -> Any:
    """Matrix products in ``dtype`` over float32 weights inside the ``with`` block.

    ``auto`` is bfloat16, but float32 on processors without AVX-512: on two cores of a Zen 3 products in bfloat16 ran
    at 0.8 GFLOP/s, in float32 at 36 (torch 2.13).
    """
    import torch

    kind = torch.device(device).type
    if dtype == "auto":
        slow = kind == "cpu" and "AVX512" not in torch.backends.cpu.get_cpu_capability()
        dtype = "float32" if slow else "bfloat16"
    return torch.autocast(kind, torch.bfloat16, enabled=dtype == "bfloat16")
