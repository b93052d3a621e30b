"""GPTQ, arXiv 2210.17323: the equations on problems small enough for exact answers."""

from __future__ import annotations

import torch

from llmcompress.algorithms.gptq import GptqOptions, solve
from llmcompress.algorithms.hessian import inverse_factor
from llmcompress.quant.spec import QuantSpec


def least_squares_update(w: torch.Tensor, hessian: torch.Tensor, fixed: int, value: float) -> torch.Tensor:
    """Minimise (v-w)ᵀ H (v-w) with v[fixed] = value and earlier entries frozen: a linear system."""
    free = torch.arange(fixed + 1, len(w))
    step = value - w[fixed]
    out = w.clone()
    out[fixed] = value
    out[free] = w[free] - torch.linalg.solve(hessian[free][:, free], hessian[free, fixed] * step)
    return out


def curvature(columns: int) -> torch.Tensor:
    x = torch.randn(60, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = x @ torch.randn(columns, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return 2 * x.T @ x / 60


def test_compensation_is_the_constrained_optimum() -> None:
    """Equation 2: after fixing a column, moving the rest by -err/U_qq · U_q,: is the best that can be done."""
    hessian = curvature(6)
    factor, _ = inverse_factor(hessian.float()[None], 1e-9)
    upper = factor[0].double()
    w = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    exact, by_factor = w.clone(), w.clone()
    for column in range(5):
        value = float(torch.round(by_factor[column]))
        error = (by_factor[column] - value) / upper[column, column]
        by_factor[column:] -= error * upper[column, column:]
        exact = least_squares_update(exact, hessian, column, value)
        torch.testing.assert_close(by_factor, exact, rtol=1e-3, atol=1e-3)


def test_sum_of_squared_errors_is_the_layer_loss() -> None:
    """The scaled errors of the columns, squared and added, are (w-q)ᵀ H (w-q) for the damped H."""
    hessian = curvature(24).float()
    spec, options = QuantSpec(3, 8), GptqOptions(damp=0.05, grid="minmax")
    w = torch.randn(1, 5, 24, generator=torch.Generator().manual_seed(3))
    solution = solve(w, hessian[None], spec, options)
    factor, _ = inverse_factor(hessian[None], options.damp)
    damped = hessian + options.damp * hessian.diagonal().mean() * torch.eye(24)
    difference = (w - solution.quantized)[0]
    loss = (difference @ damped * difference).sum(-1)
    # (w-q) = err · U, hence err = (w-q) · R with R = U⁻¹
    errors = torch.linalg.solve_triangular(factor[0].T, difference.T, upper=False)
    torch.testing.assert_close(errors.square().sum(0), loss, rtol=1e-3, atol=1e-4)


def test_lazy_blocks_change_nothing() -> None:
    """Section 3.3, step 2: updating in blocks is a reordering of the same sums."""
    hessian = curvature(48).float()[None]
    w = torch.randn(1, 7, 48, generator=torch.Generator().manual_seed(4))
    made = [solve(w, hessian, QuantSpec(4, 8), GptqOptions(block=block)) for block in (8, 16, 48)]
    for other in made[1:]:
        assert (made[0].codes == other.codes).float().mean() > 0.99


def test_two_columns_by_hand() -> None:
    """H = [[2, 1], [1, 2]], w = (0.4, 0.4), grid of whole numbers: rounding 0.4 to 0 moves the other to 0.6, then 1."""
    hessian = torch.tensor([[[2.0, 1.0], [1.0, 2.0]]])
    w = torch.tensor([[[0.4, 0.4], [0.0, 3.0]]])
    # static grid from the second row's range would differ per row; use one group per row and 2 bits
    spec, options = QuantSpec(2, -1, symmetric=True), GptqOptions(damp=1e-7, static_groups=True, grid="minmax")
    solution = solve(w, hessian, spec, options)
    scale = float(solution.scale[0, 0, 0])
    first = round(0.4 / scale) * scale
    moved = 0.4 + (0.4 - first) * 0.5
    expected = max(-2, min(1, round(moved / scale))) * scale
    torch.testing.assert_close(solution.quantized[0, 0], torch.tensor([max(-2 * scale, min(scale, first)), expected]))
