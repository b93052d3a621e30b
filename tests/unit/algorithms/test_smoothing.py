"""Factors of SmoothQuant: the formula, powers of two, and what they do to an outlier."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.smoothing import LIMIT, smoothing_factors, spread
from llmcompress.nn.activations import round_per_token


def test_factors_are_those_of_the_formula() -> None:
    """By hand: sqrt(16 / 1), sqrt(1 / 1), sqrt(1 / 4), sqrt(4 / 1) over their geometric mean, to powers of two."""
    inputs = torch.tensor([16.0, 1.0, 1.0, 4.0])
    weights = [torch.tensor([[1.0, -1.0, 0.5, 0.1]]), torch.tensor([[-0.2, 0.0, -4.0, 1.0]])]
    # 4, 1, 0.5, 2 over sqrt(2): 2^1.5, 2^-0.5, 2^-1.5, 2^0.5; halves go to the even exponent
    assert smoothing_factors(inputs, weights, 0.5).tolist() == [4.0, 1.0, 0.25, 1.0]


@pytest.mark.parametrize(("alpha", "columns"), [(0.0, "weights"), (1.0, "inputs")])
def test_the_ends_of_alpha_level_one_side(alpha: float, columns: str) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.exp2(torch.randint(-3, 4, (64,), generator=generator).float())
    weight = torch.exp2(torch.randint(-3, 4, (1, 64), generator=generator).float())
    factors = smoothing_factors(inputs, [weight], alpha)
    levelled = weight[0] * factors if columns == "weights" else inputs / factors
    # exact but for the rounding of a common factor
    assert levelled.unique().numel() == 1


def test_powers_of_two_within_limits_and_ones_where_nothing_is_known() -> None:
    inputs = torch.tensor([0.0, 1e-30, 1e30, 3.0, float(2**20)])
    weight = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0]])
    factors = smoothing_factors(inputs, [weight], 1.0)
    assert factors[0] == factors[3] == 1
    assert torch.equal(factors, torch.exp2(factors.log2().round()))
    assert factors.max() == 2**LIMIT and factors.min() == 2**-LIMIT


def test_an_outlier_costs_less_after_smoothing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 48, generator=generator)
    x[:, 7] *= 100
    weight = torch.randn(32, 48, generator=generator)
    exact = x @ weight.T
    largest = x.abs().amax(0)
    factors = smoothing_factors(largest, [weight], 0.5)
    assert torch.equal((x / factors) @ (weight * factors).T, exact), "powers of two change no bit"
    plain = (round_per_token(x) @ weight.T - exact).norm()
    smoothed = (round_per_token(x / factors) @ (weight * factors).T - exact).norm()
    assert smoothed < 0.2 * plain
    assert spread(largest / factors) < 0.2 * spread(largest)
    assert spread(torch.zeros(4)) == 1.0
