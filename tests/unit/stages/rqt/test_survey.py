"""What the survey of a family tells of one weight."""

from __future__ import annotations

import torch

from llmcompress.algorithms.tree_topology import inner_products
from llmcompress.stages.rqt.survey import _adapter_ranks


def test_ranks_of_adapters_and_of_full_differences() -> None:
    generator = torch.Generator().manual_seed(0)

    def thin(rank: int) -> torch.Tensor:
        return torch.randn(96, rank, generator=generator) @ torch.randn(rank, 64, generator=generator) / 100

    full = torch.randn(96, 64, generator=generator) / 100
    assert _adapter_ranks(torch.stack([thin(3), thin(8), full, torch.zeros(96, 64)])) == [3, 8, 0, 0]
    # a little noise on top of an adapter, as rounding to bf16 leaves, makes it full
    assert _adapter_ranks((thin(3) + full / 50)[None]) == [0]
    assert _adapter_ranks(torch.randn(2, 4, 4, generator=generator)) == [0, 0]


def test_inner_products_of_stacks() -> None:
    first, second = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    expected = torch.tensor([[float((a.double() * b.double()).sum()) for b in second] for a in first])
    torch.testing.assert_close(inner_products(first, second).float(), expected)
