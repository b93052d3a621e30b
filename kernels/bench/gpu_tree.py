"""Models of one residual tree decoded together, beside as many bfloat16 products and as many of our 4-bit ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from gpu_matrix import packed
from gpu_timing import replay, rotations
from llmcompress_kernels import ops

GROUP, ACTIVE = 128, (4, 8)
SHAPES = ((4096, 4096), (11008, 4096), (4096, 11008))


@dataclass(frozen=True, slots=True)
class Operands:
    """What a root and its leaves are multiplied with, one token per model.

    Attributes:
        x: ``[M, K]`` bf16.
        spans: Tokens of each node.
        bits: Of each node.
        multiplier: Of each node.
        trees: As many as keep the cache from helping; of each node codes and scales.
        size: Bytes of one of them.
    """

    x: torch.Tensor
    spans: torch.Tensor
    bits: list[int]
    multiplier: list[float]
    trees: list[list[tuple[torch.Tensor, torch.Tensor]]]
    size: int

    @classmethod
    def random(cls, rows: int, columns: int, models: int, root: int = 4, leaf: int = 1) -> Operands:
        """A root shared by ``models`` leaves."""
        x = torch.randn(models, columns, dtype=torch.bfloat16, device="cuda")
        spans = torch.tensor([[0, models], *([m, m + 1] for m in range(models))])
        bits = [root] + [leaf] * models
        first = [node(rows, columns, b) for b in bits]
        size = sum(p.nbytes + s.nbytes for p, s in first)
        trees = [first] + [[node(rows, columns, b) for b in bits] for _ in range(rotations(size, 8) - 1)]
        return cls(x, spans, bits, [1.0] + [2.0**-6] * models, trees, size)

    def of(self, tree: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[Any, ...]:
        """Arguments of ``delta_decode`` after ``x``."""
        return [p for p, _ in tree], [s for _, s in tree], self.spans, self.bits, self.multiplier, GROUP

    def bf16(self, rows: int) -> list[Callable[[], torch.Tensor]]:
        """One bfloat16 product per model."""
        x = self.x
        wide = [torch.randn(len(x), rows, x.shape[1], dtype=x.dtype, device=x.device) for _ in range(2)]
        return [lambda w=w: torch.bmm(w, x.unsqueeze(-1)) for w in wide]


def node(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    stack = packed(rows, columns, bits=bits, group=GROUP)
    assert stack.scale is not None
    return stack.weight, stack.scale


def tree(rows: int, columns: int, rate: float, models: int, root: int = 4, leaf: int = 1) -> dict[str, Any]:
    """A root shared by ``models`` leaves, one token per model; microseconds and the share of the floor."""
    given = Operands.random(rows, columns, models, root, leaf)
    x, bf16 = given.x, given.bf16(rows)
    own = [[packed(rows, columns, bits=4) for _ in range(models)] for _ in range(2)]

    def each(weights: list[ops.Stack]) -> None:
        for m, w in enumerate(weights):
            assert w.scale is not None
            ops.group_gemm(x[m : m + 1], w.weight, w.scale, w.zero, 4, GROUP, columns)

    times = replay(
        {
            "ours": [lambda t=t: ops.delta_decode(x, *given.of(t)) for t in given.trees],
            "bf16": bf16,
            "own_w4": [lambda w=w: each(w) for w in own],
        }
    )
    floor = given.size / rate * 1e6
    return {
        "op": "delta_decode", "rows": rows, "columns": columns, "models": models, "root_bits": root, "leaf_bits": leaf,
        "floor_us": round(floor, 2), "floor_share": round(floor / times["ours"].median, 3),
        **{f"{name}_us": round(t.median, 2) for name, t in times.items()},
        "over_bf16": round(times["bf16"].median / times["ours"].median, 3),
        "over_own_w4": round(times["own_w4"].median / times["ours"].median, 3),
    }  # fmt: skip
