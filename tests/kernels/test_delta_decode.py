"""``delta_decode``: rows of several models in one product, against the sum of each model's nodes."""

from __future__ import annotations

import pytest
import torch
from llmcompress_kernels import ops

from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.packed import PackedWeight


def node(bits: int, rows: int, columns: int, seed: int, exponent: int = 0, group: int = 64) -> PackedWeight:
    generator = torch.Generator().manual_seed(seed)
    spec = delta_tree.node_spec(bits, group)
    codes = torch.randint(0, 1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)
    scale = torch.rand(rows, spec.groups(columns), generator=generator) + 0.05
    return delta_tree.encode(codes, scale.half(), exponent, spec)


def run(x: torch.Tensor, nodes: list[PackedWeight], spans: list[tuple[int, int]], group: int = 64) -> torch.Tensor:
    return ops.delta_decode(
        x,
        [n.tensors["weight_packed"] for n in nodes],
        [n.tensors["weight_scale"] for n in nodes],
        torch.tensor(spans, dtype=torch.int64).reshape(-1, 2),
        [n.spec.bits for n in nodes],
        [2.0 ** int(n.tensors["weight_exponent"]) for n in nodes],
        group,
    )


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("tokens", [1, 3, 16, 17, 64])
def test_every_width_and_count(bits: int, tokens: int) -> None:
    x = torch.randn(tokens, 192, generator=torch.Generator().manual_seed(tokens))
    one = node(bits, 40, 192, bits)
    expected = x.double() @ delta_tree.decode(one).double().T
    got = run(x, [one], [(0, tokens)])
    assert torch.allclose(got.double(), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_models_of_a_tree(dtype: torch.dtype) -> None:
    """Root for all rows, a group for the first five, leaves for their own; one leaf has no rows."""
    nodes = [node(4, 32, 100, 1), node(2, 32, 100, 2, -3), node(1, 32, 100, 3, -6), node(1, 32, 100, 4, -6),
             node(1, 32, 100, 5, -6)]  # fmt: skip
    spans = [(0, 9), (0, 5), (0, 2), (2, 5), (9, 9)]
    x = torch.randn(9, 100, generator=torch.Generator().manual_seed(0)).to(dtype)
    got = run(x, nodes, spans)
    assert got.dtype == dtype
    weights = [delta_tree.decode(n) for n in nodes]
    paths = {range(0, 2): [0, 1, 2], range(2, 5): [0, 1, 3], range(5, 9): [0]}
    for rows, path in paths.items():
        expected = x[list(rows)].double() @ sum(weights[i] for i in path).double().T
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        assert torch.allclose(
            got[list(rows)].double(), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


def test_rows_below_no_node_are_zero() -> None:
    got = run(torch.ones(4, 64), [node(2, 8, 64, 0)], [(1, 3)])
    assert bool((got[[0, 3]] == 0).all())
    assert bool((got[1] == got[2]).all())


def test_schema_and_fake() -> None:
    nodes = [node(3, 16, 64, 0), node(1, 16, 64, 1)]
    arguments = (
        torch.randn(5, 64),
        [n.tensors["weight_packed"] for n in nodes],
        [n.tensors["weight_scale"] for n in nodes],
        torch.tensor([[0, 5], [2, 5]]),
        [3, 1],
        [1.0, 0.25],
        64,
    )
    torch.library.opcheck(torch.ops.llmcompress.delta_decode, arguments, test_utils=("test_schema", "test_faketensor"))
