"""Models of one residual tree decoded together, beside as many bfloat16 products and as many of our 4-bit ones."""

from __future__ import annotations

from typing import Any

import torch
from gpu_matrix import packed
from gpu_timing import replay, rotations
from llmcompress_kernels import ops

GROUP, ACTIVE = 128, (4, 8)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


def _node(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    stack = packed(rows, columns, bits=bits, group=GROUP)
    assert stack.scale is not None
    return stack.weight, stack.scale


def tree(rows: int, columns: int, rate: float, models: int, root: int = 4, leaf: int = 1) -> dict[str, Any]:
    """A root shared by ``models`` leaves, one token per model; microseconds and the share of the floor."""
    x = torch.randn(models, columns, dtype=torch.bfloat16, device="cuda")
    spans = torch.tensor([[0, models], *([m, m + 1] for m in range(models))])
    bits = [root] + [leaf] * models
    multiplier = [1.0] + [2.0**-6] * models
    first = [_node(rows, columns, b) for b in bits]
    size = sum(p.nbytes + s.nbytes for p, s in first)
    trees = [first] + [[_node(rows, columns, b) for b in bits] for _ in range(rotations(size, 8) - 1)]
    wide = [torch.randn(models, rows, columns, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    own = [[packed(rows, columns, bits=4) for _ in range(models)] for _ in range(2)]

    def each(weights: list[ops.Stack]) -> None:
        for m, w in enumerate(weights):
            assert w.scale is not None
            ops.group_gemm(x[m : m + 1], w.weight, w.scale, w.zero, 4, GROUP, columns)

    times = replay(
        {
            "ours": [
                lambda t=t: ops.delta_decode(x, [p for p, _ in t], [s for _, s in t], spans, bits, multiplier, GROUP)
                for t in trees
            ],
            "bf16": [lambda w=w: torch.bmm(w, x.unsqueeze(-1)) for w in wide],
            "own_w4": [lambda w=w: each(w) for w in own],
        }
    )
    floor = size / rate * 1e6
    return {
        "op": "delta_decode", "rows": rows, "columns": columns, "models": models, "root_bits": root, "leaf_bits": leaf,
        "floor_us": round(floor, 2), "floor_share": round(floor / times["ours"].median, 3),
        **{f"{name}_us": round(t.median, 2) for name, t in times.items()},
        "over_bf16": round(times["bf16"].median / times["ours"].median, 3),
        "over_own_w4": round(times["own_w4"].median / times["ours"].median, 3),
    }  # fmt: skip
