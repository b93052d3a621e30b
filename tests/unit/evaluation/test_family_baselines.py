"""Other ways to store a difference, against their definitions."""

from __future__ import annotations

import pytest
import torch

from llmcompress.evaluation.family_baselines import low_rank, min_max, rank_of, sign_delta


def test_signs_with_the_scale_of_least_error() -> None:
    delta = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    delta[2, 3] = 0.0
    found = sign_delta(delta)
    assert float(found[2, 3]) > 0
    assert torch.equal(found.sign()[delta != 0], delta.sign()[delta != 0])
    scale = float(found.abs().max())
    assert torch.equal(found.abs(), torch.full_like(delta, scale))
    # along the signs the best factor is 1
    assert float((found * delta).sum() / found.square().sum()) == pytest.approx(1.0)


@pytest.mark.parametrize("shape", [(64, 64), (128, 512), (300, 70), (2, 3)])
def test_factors_take_a_bit_per_weight(shape: tuple[int, int]) -> None:
    rows, columns = shape
    rank = rank_of(shape)
    bits = 16 * (rows + columns)
    assert rank == 1 or rank * bits <= rows * columns
    assert (rank + 1) * bits > rows * columns


def test_low_rank_leaves_the_smallest_singular_values() -> None:
    delta = torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(delta)
    for rank in (1, 7):
        found = low_rank(delta, rank)
        assert int(torch.linalg.matrix_rank(found, rtol=1e-4)) == rank
        assert float((delta - found).square().sum()) == pytest.approx(float(values[rank:].square().sum()), rel=1e-2)


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_one_range_for_a_whole_tensor(bits: int) -> None:
    values = torch.randn(40, 50, generator=torch.Generator().manual_seed(2))
    found = min_max(values, bits)
    step = (values.max() - values.min()) / ((1 << bits) - 1)
    assert len(found.unique()) == 1 << bits
    assert float((found - values).abs().max()) <= float(step) / 2 * 1.0001
    torch.testing.assert_close(found.max(), values.max())
    torch.testing.assert_close(found.min(), values.min())
    assert torch.equal(min_max(torch.full((3, 4), 0.7), bits), torch.full((3, 4), 0.7))
