from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec

CASES = [(bits, symmetric) for bits in (2, 3, 4, 8) for symmetric in (True, False)]


def rounded(w: torch.Tensor, spec: QuantSpec, search: str, weights: torch.Tensor | None = None) -> torch.Tensor:
    scale, zero = find_grid(w, spec, search, weights)  # type: ignore[arg-type]
    assert scale.dtype == torch.float16
    assert bool(torch.isfinite(scale).all())
    assert bool((scale > 0).all())
    assert zero is None or int(zero.max()) < spec.levels
    return dequantize(round_codes(w, scale, zero, spec), scale, zero, spec)


def slow_minmax(group: torch.Tensor, spec: QuantSpec) -> torch.Tensor:
    """One group, straight from the definition."""
    values = group.double().tolist()
    low, high = min(0.0, *values), max(0.0, *values)
    if spec.symmetric:
        scale, zero = max(-low, high) * 2 / (spec.levels - 1), spec.midpoint
    else:
        scale, zero = (high - low) / (spec.levels - 1), None
    scale = float(torch.tensor(scale, dtype=torch.float32).half())
    zero = round(-low / scale) if zero is None else zero
    out = []
    for value in values:
        code = min(max(round(value / scale) + zero, 0), spec.levels - 1)
        out.append(scale * (code - zero))
    return torch.tensor(out)


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_minmax_equals_the_definition(bits: int, symmetric: bool) -> None:
    torch.manual_seed(bits)
    spec = QuantSpec(bits, 16, symmetric)
    w = torch.randn(2, 3, 40)
    result = rounded(w, spec, "minmax")
    for e in range(2):
        for n in range(3):
            for start in range(0, 40, 16):
                torch.testing.assert_close(
                    result[e, n, start : start + 16], slow_minmax(w[e, n, start : start + 16], spec)
                )


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
def test_search_never_loses_and_wins_at_low_bits(bits: int, symmetric: bool) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(bits, 32, symmetric)
    w = torch.randn(20, 100)
    plain = (rounded(w, spec, "minmax") - w).square().sum()
    searched = (rounded(w, spec, "mse") - w).square().sum()
    assert searched <= plain
    if bits <= 3:
        assert searched < 0.97 * plain


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("tails", [0.0, -0.3])
def test_search_finds_what_trying_every_range_finds(bits: int, symmetric: bool, tails: float) -> None:
    torch.manual_seed(0)
    spec = QuantSpec(bits, 32, symmetric)
    w = torch.randn(64, 32) * torch.rand(64, 32).pow(tails)
    found = (rounded(w, spec, "mse") - w).square().sum(-1)
    best = torch.full_like(found, torch.inf)
    low, high = w.amin(-1, keepdim=True).clamp(max=0), w.amax(-1, keepdim=True).clamp(min=0)
    for fraction in torch.linspace(0.3, 1.0, 281):
        # the extremes of a row of two give its grid by the definition
        grid = find_grid(fraction * torch.cat((low, high), -1), QuantSpec(bits, 2, symmetric), "minmax")
        error = (dequantize(round_codes(w, *grid, spec), *grid, spec) - w).square().sum(-1)
        best = torch.minimum(best, error)
    assert found.sum() <= 1.003 * best.sum()


def test_search_heeds_column_weights() -> None:
    torch.manual_seed(0)
    spec = QuantSpec(2, 32)
    w, weights = torch.randn(16, 80), torch.rand(80) ** 4
    error = lambda q: ((q - w).square() * weights).sum()  # noqa: E731
    assert error(rounded(w, spec, "mse", weights)) < error(rounded(w, spec, "mse"))


@pytest.mark.parametrize(("bits", "symmetric"), CASES)
@pytest.mark.parametrize("search", ["minmax", "mse"])
def test_extreme_groups(bits: int, symmetric: bool, search: str) -> None:
    spec = QuantSpec(bits, 8, symmetric)
    zeros = torch.zeros(1, 8)
    assert torch.equal(rounded(zeros, spec, search), zeros)
    assert float(find_grid(zeros, spec, search)[0]) == 1.0  # type: ignore[arg-type]
    assert bool(torch.isfinite(rounded(torch.full((1, 8), 1e30), spec, search)).all())
    tiny = rounded(torch.full((1, 8), 1e-9), spec, search)
    assert bool((tiny.abs() <= 1e-6).all())
    for value in (0.75, -0.75):
        constant = torch.full((1, 8), value)
        result = rounded(constant, spec, search)
        assert (result - constant).abs().max() <= (1e-3 if not symmetric else 0.34 * 0.75)
    outlier = torch.full((1, 8), 0.01)
    outlier[0, 3] = 5.0
    assert abs(float(rounded(outlier, spec, "minmax")[0, 3]) - 5.0) <= 5.0 / spec.levels * (2 if symmetric else 1)


def test_one_group_per_row_and_short_tail() -> None:
    torch.manual_seed(0)
    w = torch.randn(4, 50)
    scale, zero = find_grid(w, QuantSpec(4, -1), "minmax")
    assert scale.shape == (4, 1)
    assert zero is not None
    assert zero.shape == (4, 1)
    scale, _ = find_grid(w, QuantSpec(4, 32), "mse")
    alone, _ = find_grid(w[:, 32:], QuantSpec(4, 32), "mse")
    assert torch.equal(scale[:, 1:], alone)
