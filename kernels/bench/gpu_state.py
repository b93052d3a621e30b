"""The DSQ state update on a GPU, beside the same update with an fp16 and an fp32 state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import replay, rotations
from llmcompress_kernels import state
from llmcompress_kernels.triton import mixer
from llmcompress_kernels.triton.state import dsq_pack

# Mamba2-2.7B
HEADS, P, N = 80, 64, 128


def float_updates(
    batch: int, drive: torch.Tensor, decay: torch.Tensor, b: torch.Tensor, c: torch.Tensor
) -> dict[str, list[Callable[[], object]]]:
    """The same update with states in fp32 and fp16, one call per rotation."""
    candidates: dict[str, list[Callable[[], object]]] = {}
    for name, dtype in (("fp32", torch.float32), ("fp16", torch.float16)):
        size = batch * HEADS * P * N * dtype.itemsize
        held = [torch.randn(batch, HEADS, P, N, dtype=dtype, device="cuda") for _ in range(rotations(size, 16))]
        candidates[name] = [lambda s=s: mixer.state_update(s, drive, decay, b, c) for s in held]
    return candidates


def update(batch: int, rate: float) -> dict[str, Any]:
    """Microseconds of one token of ``batch`` sequences, one layer."""
    drive = torch.randn(batch, HEADS, P, device="cuda")
    decay = torch.rand(batch, HEADS, device="cuda")
    b, c = torch.randn(batch, 1, N, device="cuda"), torch.randn(batch, 1, N, device="cuda")
    candidates = float_updates(batch, drive, decay, b, c)
    for bits in (4, 8):
        size = batch * HEADS * P * N * bits // 8
        packed = [
            dsq_pack(torch.randn(batch, HEADS, P, N, device="cuda"), None, bits) for _ in range(rotations(size, 16))
        ]
        candidates[f"dsq{bits}"] = [_dsq_call(q, drive, decay, b, c, bits) for q in packed]
    times = replay(candidates)
    found: dict[str, Any] = {"op": "dsq_state_update", "batch": batch}
    for name, each in times.items():
        found[f"{name}_us"] = round(each.median, 2)
    for bits in (4, 8):
        traffic = 2 * batch * HEADS * (P * N * bits // 8 + 2 * (P + N))
        found[f"dsq{bits}_floor_share"] = round(traffic / rate * 1e6 / times[f"dsq{bits}"].median, 3)
    found["dsq4_over_fp16"] = round(times["fp16"].median / times["dsq4"].median, 3)
    found["dsq4_over_fp32"] = round(times["fp32"].median / times["dsq4"].median, 3)
    return found


def _dsq_call(
    held: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    drive: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    bits: int,
) -> Callable[[], object]:
    codes, channel, scale = held
    return lambda: state.dsq_state_update(codes, channel, scale, None, drive, decay, b, c, bits)
