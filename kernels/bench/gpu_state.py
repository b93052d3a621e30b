"""The DSQ state update on a GPU, within replay windows too, beside the same update with an fp16 and an fp32 state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import replay, rotations
from llmcompress_kernels import state
from llmcompress_kernels.cuda import state as cuda_state
from llmcompress_kernels.triton import mixer
from llmcompress_kernels.triton.state import dsq_pack

# Mamba2-2.7B
HEADS, P, N = 80, 64, 128
WINDOWS = (4, 8, 16)


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
        # both instances whatever the number of heads, to see where one overtakes the other
        for name, variant in (("small", cuda_state.SMALL), ("large", cuda_state.LARGE)):
            candidates[f"dsq{bits}_{name}"] = [_dsq_call(q, drive, decay, b, c, bits, variant) for q in packed]
    held = [dsq_pack(torch.randn(batch, HEADS, P, N, device="cuda"), None, 4, dither=True) for _ in candidates["dsq4"]]
    for tokens in WINDOWS:
        candidates[f"dsq4_w{tokens}"] = window_calls(held, tokens, drive, decay, b, c)
    times = replay(candidates)
    found: dict[str, Any] = {"op": "dsq_state_update", "batch": batch}
    for name, each in times.items():
        found[f"{name}_us"] = round(each.median, 2)
    found["dsq8_floor_share"] = round(traffic(batch, 8, 1) / rate * 1e6 / times["dsq8"].median, 3)
    for tokens in (1, *WINDOWS):
        name = "dsq4" if tokens == 1 else f"dsq4_w{tokens}"
        found[f"{name}_floor_share"] = round(traffic(batch, 4, tokens) / rate * 1e6 / times[name].median, 3)
        for kind in ("fp16", "fp32"):
            found[f"{name}_over_{kind}"] = round(times[kind].median / times[name].median, 3)
    return found


def traffic(batch: int, bits: int, window: int) -> float:
    """Bytes that a token has to move, on average over a window."""
    stored = HEADS * (P * N * bits // 8 + 2 * (P + N)) * (1 + 1 / window)
    # a row is written for every token but the last, which reads all of them, as each reads those before it
    rows = (window - 1) / window + (window - 1) / 2
    return batch * (stored + 4 * rows * (HEADS * (P + 1) + N))


def empty_window(batch: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``recent`` and ``count`` for a window of so many tokens."""
    recent = torch.empty(batch, tokens - 1, HEADS * (P + 1) + N, device="cuda")
    return recent, torch.zeros(batch, dtype=torch.int32, device="cuda")


def window_calls(
    held: list[tuple[torch.Tensor, torch.Tensor | None, torch.Tensor]],
    tokens: int,
    *step: torch.Tensor,
    update: Callable[..., torch.Tensor] = state.dsq_replay_update,
) -> list[Callable[[], object]]:
    """All tokens of a window, each for every rotation before the next, so that no state is still in a cache."""
    kept = [empty_window(step[0].shape[0], tokens) for _ in held]
    calls = [lambda one=one, own=own: update(*one, None, *own, *step, 4, dither=True) for one, own in zip(held, kept)]
    return calls * tokens


def _dsq_call(
    held: tuple[torch.Tensor, torch.Tensor | None, torch.Tensor],
    drive: torch.Tensor,
    decay: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    bits: int,
    variant: int | None = None,
) -> Callable[[], object]:
    token = (None, drive, decay, b, c, bits)
    if variant is None:
        return lambda: state.dsq_state_update(*held, *token)
    return lambda: cuda_state.dsq_state_update(*held, *token, variant=variant)
