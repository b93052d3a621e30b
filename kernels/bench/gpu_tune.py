"""How launches of the CUDA C++ kernels for few tokens should be cut up: every candidate, timed side by side.

The winners go to the table of the cache (llmcompress_kernels/cuda/launches.py), which later calls on this machine
read, and from there into the one that comes with the package.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from gpu_matrix import EXPERTS, HIDDEN, INTERMEDIATE, SLOTS, dense_weights, packed, routing, sides
from gpu_timing import replay
from llmcompress_kernels.cuda import launches, skinny

SAMPLES = 15


def dense(rows: int, columns: int, bits: int, tokens: int) -> dict[str, Any]:
    """One dense product."""
    x = torch.randn(tokens, columns, dtype=torch.bfloat16, device="cuda")
    held = dense_weights(rows, columns, bits)
    candidates: dict[str, list[Callable[[], object]]] = {}
    for name, launch in launches.candidates().items():
        candidates[name] = [
            partial(skinny.group_gemm, x, w.weight, w.scale, w.zero, bits, w.group_size, columns, launch) for w in held
        ]
    return _best(candidates, "dense", bits, tokens, rows, columns)


def routed(bits: int, tokens: int) -> Iterator[dict[str, Any]]:
    """Both launches of a Mixtral layer's experts, one by one."""
    x, index, weights = routing(tokens)
    banks = [sides(bits) for _ in range(2)]
    for number, mode in enumerate(("gate_up", "down")):
        candidates: dict[str, list[Callable[[], object]]] = {}
        for name, launch in launches.candidates().items():
            chosen = (launch, None) if number == 0 else (None, launch)
            candidates[name] = [
                partial(skinny.moe_group_gemm, x, index, weights, each, INTERMEDIATE, "silu", 1.7, 7.0, chosen)
                for each in banks
            ]
        yield _best(
            candidates, mode, bits, tokens, *((INTERMEDIATE, HIDDEN) if number == 0 else (HIDDEN, INTERMEDIATE))
        )


def widened(bits: int, tokens: int) -> dict[str, Any]:
    """What the steps of a Mixtral layer with widened weights take, gate and up only."""
    from llmcompress_kernels.triton import widened as kernels

    x = torch.randn(tokens, HIDDEN, dtype=torch.bfloat16, device="cuda")
    index = torch.rand(tokens, EXPERTS, device="cuda").topk(SLOTS, -1).indices
    bank = packed(EXPERTS, 2 * INTERMEDIATE, HIDDEN, bits=bits)
    assert bank.scale is not None
    ends, order, _ = kernels._sort(index, EXPERTS)
    rows = x[order // SLOTS]
    widen = partial(
        kernels.widen, bank.weight, bank.scale, bank.zero, bits, bank.group_size, HIDDEN, 0, INTERMEDIATE, x.dtype
    )
    wide = widen()
    candidates: dict[str, list[Callable[[], object]]] = {
        "sort": [lambda: kernels._sort(index, EXPERTS)],
        "gather": [lambda: x[order // SLOTS]],
        "widen half": [widen],
        "multiply half": [lambda: torch._grouped_mm(rows, wide.transpose(1, 2), offs=ends)],
    }
    return {"op": "tune widened", "bits": bits, "tokens": tokens, **_sorted(candidates)}


def _best(
    candidates: dict[str, list[Callable[[], object]]], mode: str, bits: int, tokens: int, rows: int, columns: int
) -> dict[str, Any]:
    """Keep the fastest and report all."""
    times = _sorted(candidates)
    launch = launches.candidates()[next(iter(times["us"]))]
    launches.keep(torch.cuda.get_device_name(), {launches.key(mode, bits, tokens, rows, columns): launch})
    return {"op": f"tune {mode}", "rows": rows, "columns": columns, "bits": bits, "tokens": tokens, **times}


def _sorted(candidates: dict[str, list[Callable[[], object]]]) -> dict[str, Any]:
    times = {name: round(each.median, 2) for name, each in replay(candidates, SAMPLES).items()}
    return {"us": dict(sorted(times.items(), key=lambda item: item[1]))}
