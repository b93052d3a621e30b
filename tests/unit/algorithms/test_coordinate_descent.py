"""Sweeps of coordinate descent: never worse, and at rest only where no single code can be changed for the better."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.coordinate_descent import sweep
from llmcompress.algorithms.gptq import GptqOptions, solve
from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.quant.codecs.delta_tree import node_spec
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec

SPECS = [node_spec(1, 16), node_spec(2, 24), QuantSpec(2, 16), QuantSpec(3, 12, True)]
DAMP = 0.01


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4 * columns, columns, generator=generator)
    x = x @ torch.randn(1, columns, columns, generator=generator)
    return torch.randn(1, rows, columns, generator=generator), 2 * x.transpose(1, 2) @ x / x.shape[1]


def damped_error(w: torch.Tensor, q: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """``[N]`` in fp64."""
    h = hessian[0].double()
    h = h + DAMP * h.diagonal().mean() * torch.eye(len(h))
    delta = (w - q)[0].double()
    return ((delta @ h) * delta).sum(-1)


@pytest.mark.parametrize("spec", SPECS)
def test_no_row_gets_worse_and_at_rest_no_single_code_helps(spec: QuantSpec) -> None:
    w, hessian = problem(6, 40)
    scale, zero = find_grid(w, spec)
    codes = round_codes(w, scale, zero, spec)
    before = damped_error(w, dequantize(codes, scale, zero, spec), hessian)
    first = before
    for _ in range(50):
        found = sweep(w, hessian, codes, scale, zero, spec, DAMP)
        after = damped_error(w, dequantize(found, scale, zero, spec), hessian)
        assert bool((after <= before * (1 + 1e-5)).all())
        if torch.equal(found, codes):
            break
        codes, before = found, after
    assert bool((before < 0.9 * first).any())
    for column in range(w.shape[-1]):
        for code in range(spec.levels):
            other = codes.clone()
            other[:, :, column] = code
            assert bool((damped_error(w, dequantize(other, scale, zero, spec), hessian) >= before * (1 - 1e-5)).all())


def test_without_second_moments_codes_are_the_nearest_ones() -> None:
    spec = node_spec(2, 16)
    w, _ = problem(5, 32)
    scale, zero = find_grid(w, spec)
    codes = round_codes(w, scale, zero, spec)
    found = sweep(w, torch.zeros(1, 32, 32), torch.zeros_like(codes), scale, zero, spec, DAMP)
    assert torch.equal(found, codes)


def test_experts_do_not_depend_on_their_company() -> None:
    spec = node_spec(1, 16)
    (w, hessian), (other, moments) = problem(4, 32), problem(4, 32, seed=1)
    options = GptqOptions(act_order="groups", refit=True, sweeps=2)
    together = solve(torch.cat([w, other]), torch.cat([hessian, moments]), spec, options)
    for expert, (weights, curvature) in enumerate([(w, hessian), (other, moments)]):
        assert torch.equal(together.codes[expert], solve(weights, curvature, spec, options).codes[0])


@pytest.mark.parametrize(("bits", "gain"), [(1, 0.8), (2, 0.9)])
def test_sweeps_after_gptq(bits: int, gain: float) -> None:
    """At one and two bits clipped columns leave much behind; the reported error is that of what is returned."""
    w, hessian = problem(64, 96)
    spec = node_spec(bits, 96)
    plain = solve(w, hessian, spec, GptqOptions(act_order="groups", refit=True))
    swept = solve(w, hessian, spec, GptqOptions(act_order="groups", refit=True, sweeps=4))
    assert float(swept.error.sum()) < gain * float(plain.error.sum())
    delta = (w - dequantize(swept.codes, swept.scale, swept.zero, spec))[0].double()
    exact = ((delta @ hessian[0].double()) * delta).sum(-1)
    torch.testing.assert_close(swept.error[0].double(), exact, rtol=1e-3, atol=1e-6)
