from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.grids import round_to_nearest
from llmcompress.algorithms.rounding import round_weights
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec


@pytest.mark.parametrize("grid", ["minmax", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shape", [(3, 7, 40), (9, 32), (0, 32)])
def test_pieces_are_what_rounding_at_once_makes(
    monkeypatch: pytest.MonkeyPatch, grid: str, symmetric: bool, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr("llmcompress.algorithms.rounding.PIECE", 100)
    torch.manual_seed(0)
    w, spec = torch.randn(shape).to(torch.bfloat16), QuantSpec(3, 16, symmetric)
    found = round_weights(w, spec, grid, torch.bfloat16)  # type: ignore[arg-type]
    wide = w.float()
    if wide.numel():
        codes, scale, zero = round_to_nearest(wide, spec, grid)  # type: ignore[arg-type]
        values = dequantize(codes, scale, zero, spec)
        assert torch.equal(found.codes, codes)
        assert torch.equal(found.scale, scale)
        assert found.zero is None if zero is None else torch.equal(found.zero, zero)  # type: ignore[arg-type]
        assert found.quantized is not None
        assert torch.equal(found.quantized, values.to(torch.bfloat16))
        torch.testing.assert_close(found.error, (wide - values).square().sum(-1))
        torch.testing.assert_close(found.energy, wide.square().sum(-1))
    assert found.codes.shape == w.shape
    assert found.error.shape == found.energy.shape == w.shape[:-1]
    assert round_weights(w, spec, grid).quantized is None  # type: ignore[arg-type]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_shows_in_the_energy(bad: float) -> None:
    w = torch.ones(4, 32, dtype=torch.bfloat16)
    w[2, 5] = bad
    assert round_weights(w, QuantSpec(4, 16), "minmax").energy.isfinite().tolist() == [True, True, False, True]
