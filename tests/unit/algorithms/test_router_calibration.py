"""Router solvers against direct minimisation, and the rules around them."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms import router_calibration
from llmcompress.algorithms.router_calibration import (
    SolverOptions,
    auto_k,
    calibrate_router,
    solve_adam,
    solve_ridge,
    top_mask,
    topk_mse,
)
from llmcompress.algorithms.routing import RouterRule

N, H, T = 8, 16, 600


@pytest.fixture
def streams() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full-precision inputs, disturbed inputs, router weight."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=generator) @ torch.randn(H, H, generator=generator) / H**0.5
    mix = torch.eye(H) + 0.25 * torch.randn(H, H, generator=generator)
    x_hat = x @ mix + 0.1 * torch.randn(T, H, generator=generator)
    return x, x_hat, torch.randn(N, H, generator=generator) / H**0.5


def normal_equations(x_hat, target, token_weights, w0, ridge):
    """One row of the ridge solution in float64, written the direct way."""
    x, m = x_hat.double(), token_weights.double()
    gram = (m[:, None] * x).T @ x
    damp = ridge * gram.trace() / H
    right = (m[:, None] * x).T @ target.double() + damp * w0.double()
    return torch.linalg.solve(gram + damp * torch.eye(H, dtype=torch.float64), right)


@pytest.mark.parametrize("k", [3, 8])
@pytest.mark.parametrize("off", [0.0, 0.3, 1.0])
def test_ridge_equals_normal_equations(streams, k, off):
    x, x_hat, w0 = streams
    target = x @ w0.T
    mask = top_mask(target, k)
    solved = solve_ridge(x_hat, target, mask, w0, ridge=1e-2, off_topk_weight=off)
    for expert in range(N):
        m = torch.where(mask[:, expert], 1.0, off)
        expected = normal_equations(x_hat, target[:, expert], m, w0[expert], 1e-2)
        assert torch.allclose(solved[expert].double(), expected, atol=1e-4), expert


def test_ridge_is_the_same_in_small_chunks(streams, monkeypatch):
    x, x_hat, w0 = streams
    target = x @ w0.T
    mask = top_mask(target, 3)
    whole = solve_ridge(x_hat, target, mask, w0)
    monkeypatch.setattr("llmcompress.algorithms.router_calibration.GRAM_BUDGET", 3 * 4 * H * H)
    assert torch.allclose(solve_ridge(x_hat, target, mask, w0), whole, atol=1e-6)


@pytest.mark.parametrize("shared", [True, False])
def test_rows_with_fewer_tokens_than_features_equal_normal_equations(streams, shared, monkeypatch):
    x, x_hat, w0 = (each[:30] for each in streams)
    target = x @ w0.T
    mask = top_mask(target, 3)
    mask[:, 7] = True  # one row has enough
    mask[3:, 5] = False  # and one is held
    mask[:3, 5] = True
    if not shared:
        monkeypatch.setattr("llmcompress.algorithms.router_calibration.GRAM_BUDGET", 4 * 29 * 30)
    made = []
    whole = router_calibration._lower_products
    monkeypatch.setattr(router_calibration, "_lower_products", lambda x: made.append(1) or whole(x))
    monkeypatch.setattr(router_calibration, "PRODUCT_ROWS", 8)
    solved = solve_ridge(x_hat, target, mask, w0, ridge=1e-2)
    assert bool(made) == shared
    assert 2 <= int(mask[:, 5].sum()) < H / 8 + 2
    for expert in range(N):
        m, ridge = mask[:, expert].float(), 1.0 if mask[:, expert].sum() < H / 8 else 1e-2
        expected = normal_equations(x_hat, target[:, expert], m, w0[expert], ridge)
        assert torch.allclose(solved[expert].double(), expected, atol=1e-4), expert


def test_rows_without_tokens_do_not_move_and_rare_rows_are_held(streams):
    x, x_hat, w0 = streams
    target = x @ w0.T
    mask = top_mask(target, 3)
    mask[:, 0] = False
    mask[1:, 1] = False
    mask[0, 1] = True
    solved = solve_ridge(x_hat, target, mask, w0, ridge=1e-4)
    assert torch.equal(solved[0], w0[0])
    one = normal_equations(x_hat, target[:, 1], mask[:, 1].float(), w0[1], 1.0)
    assert torch.allclose(solved[1].double(), one, atol=1e-4)


def test_float64_takes_over_where_float32_does_not_factorise():
    x_hat = torch.ones(50, H) * 1e3  # rank one
    target = torch.randn(50, N, generator=torch.Generator().manual_seed(0))
    solved = solve_ridge(x_hat, target, torch.ones(50, N, dtype=torch.bool), torch.zeros(N, H), ridge=1e-9)
    assert torch.isfinite(solved).all()
    assert torch.allclose(x_hat[0] @ solved.T, target.mean(0), atol=1e-2)


def test_adam_lowers_the_loss_and_repeats_itself(streams):
    x, x_hat, w0 = streams
    target = x @ w0.T
    mask = top_mask(target, 3)
    options = SolverOptions(solver="adam", epochs=10, tokens_per_batch=64, seed=3)
    first, second = (solve_adam(x_hat, target, mask, w0, options) for _ in range(2))
    assert torch.equal(first, second)
    before = topk_mse(target, x_hat @ w0.T, mask)
    best = topk_mse(target, x_hat @ solve_ridge(x_hat, target, mask, w0, 1e-6).T, mask)
    reached = topk_mse(target, x_hat @ first.T, mask)
    assert best <= reached < 0.5 * before


def test_auto_k_is_the_smallest_that_covers():
    scores = torch.arange(16.0).flip(0).repeat(10, 1)  # expert e has rank e
    chosen = torch.tensor([[0, 1]]).repeat(10, 1)
    reference = torch.tensor([[0, 5]]).repeat(10, 1)
    assert auto_k(scores, reference, chosen) == 8
    reference[0, 1] = 13  # one of ten losses lies further out
    assert auto_k(scores, reference, chosen) == 16
    assert auto_k(scores, reference, chosen, cover=0.9) == 8
    assert auto_k(scores, chosen, chosen) == 4, "nothing lost: the least K, 2k"
    assert auto_k(scores[:, :8], chosen, chosen) == 8, "with eight experts all are used"


def test_guard_keeps_the_original_when_held_out_tokens_disagree(streams):
    x, _, w0 = streams
    generator = torch.Generator().manual_seed(5)
    held = torch.arange(T) % 2 == 0
    target = x @ w0.T
    x_hat = x.clone()
    x_hat[~held] = torch.randn(int((~held).sum()), H, generator=generator)  # fitting these teaches nonsense
    rule = RouterRule(2)
    guarded = calibrate_router(target, x_hat, w0, None, rule, SolverOptions(k=8), held)
    assert not guarded.kept and torch.equal(guarded.weight, w0)
    assert guarded.record["after"] == guarded.record["before"]
    free = calibrate_router(target, x_hat, w0, None, rule, SolverOptions(k=8, guard=False), held)
    assert free.kept and not torch.equal(free.weight, w0)
    assert free.record["after"]["overlap"] < free.record["before"]["overlap"]


def test_fit_is_judged_after_rounding_to_the_stored_dtype(streams):
    x, x_hat, w0 = streams
    stored = w0.bfloat16()
    fit = calibrate_router(x @ stored.float().T, x_hat, stored, None, RouterRule(2), SolverOptions(k=8))
    assert fit.weight.dtype == torch.bfloat16 and fit.kept
    rates = fit.record["after"]
    chosen = RouterRule(2).select(x_hat @ fit.weight.float().T)
    reference = RouterRule(2).select(x @ stored.float().T)
    same = (reference.sort(-1).values == chosen.sort(-1).values).all(-1).float().mean()
    assert rates["cr_any"] == pytest.approx(1 - float(same), abs=1e-6)


def test_bias_is_trained_with_the_weight(streams):
    x, _, w0 = streams
    offset = torch.linspace(-1, 1, H)
    x_hat = x + offset  # a constant disturbance is exactly what a bias can undo
    bias = torch.linspace(0, 1, N)
    fit = calibrate_router(x @ w0.T + bias, x_hat, w0, bias, RouterRule(2), SolverOptions(k=8, ridge=1e-6))
    assert fit.bias is not None
    assert torch.allclose(x_hat @ fit.weight.T + fit.bias, x @ w0.T + bias, atol=0.01)
    assert fit.record["after"]["cr_any"] < 0.02 < fit.record["before"]["cr_any"]


def test_k_outside_its_range_is_refused(streams):
    x, x_hat, w0 = streams
    for k in (1, N + 1):
        with pytest.raises(ValueError, match="K must lie between 2 and 8"):
            calibrate_router(x @ w0.T, x_hat, w0, None, RouterRule(2), SolverOptions(k=k))
