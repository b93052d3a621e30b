"""EAC-MoE tests 1, 2 and 8: the TopK-MSE loss, no disturbance, and a disturbance that can be undone."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.expert_shift import ShiftTally
from llmcompress.algorithms.router_calibration import SolverOptions, calibrate_router, solve_ridge, top_mask, topk_mse
from llmcompress.algorithms.routing import RouterRule

N, H, T = 16, 48, 4000


@pytest.fixture
def model():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=generator)
    return x, torch.randn(N, H, generator=generator) / H**0.5, generator


def test_topk_mse_by_hand():
    target = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]])
    logits = torch.tensor([[2.0, 9.0, 2.5], [7.0, 5.0, 1.0]])
    # top 2 are experts 0 and 2, then 1 and 2: ((1 + 0.25)/2 + (0 + 9)/2) / 2
    assert topk_mse(target, logits, top_mask(target, 2)) == pytest.approx(2.5625)


def test_k_equal_to_all_experts_is_plain_mse(model):
    x, w0, generator = model
    target = x @ w0.T
    logits = target + torch.randn(target.shape, generator=generator)
    full = topk_mse(target, logits, top_mask(target, N))
    assert full == pytest.approx(float((target - logits).square().mean()), rel=1e-6)


@pytest.mark.parametrize("solver", ["ridge", "adam"])
@pytest.mark.parametrize("k", [4, 8, 16])
def test_solvers_reach_a_lower_loss_than_the_original_router(model, solver, k):
    x, w0, generator = model
    x_hat = x + 0.5 * torch.randn(x.shape, generator=generator) + 0.3 * x.roll(1, -1)
    options = SolverOptions(k=k, solver=solver, guard=False, tokens_per_batch=512)
    record = calibrate_router(x @ w0.T, x_hat, w0, None, RouterRule(2), options).record
    assert record["loss_after"] < 0.8 * record["loss_before"]


def test_experts_without_tokens_keep_their_row(model):
    x, w0, generator = model
    target = x @ w0.T
    mask = top_mask(target, 4)
    mask[:, 5] = False
    solved = solve_ridge(x + torch.randn(x.shape, generator=generator), target, mask, w0)
    assert torch.equal(solved[5], w0[5]) and not torch.equal(solved[4], w0[4])


@pytest.mark.parametrize("k", [4, 16])
def test_without_a_disturbance_nothing_changes(model, k):
    x, w0, _ = model
    fit = calibrate_router(x @ w0.T, x, w0, None, RouterRule(2), SolverOptions(k=k, guard=False))
    assert torch.allclose(fit.weight, w0, atol=1e-4)
    assert fit.record["before"]["cr_any"] == 0 and fit.record["after"]["cr_any"] == 0


@pytest.mark.parametrize("k", [8, 16])
def test_a_linear_disturbance_is_undone_on_unseen_tokens(model, k):
    x, w0, generator = model
    mix = torch.eye(H) + 0.5 * torch.randn(H, H, generator=generator) / H**0.5
    fitted, unseen = x[: T // 2], x[T // 2 :]
    rule = RouterRule(2)
    fit = calibrate_router(fitted @ w0.T, fitted @ mix, w0, None, rule, SolverOptions(k=k, ridge=1e-4))
    target = unseen @ w0.T
    before, after = ShiftTally(rule), ShiftTally(rule)
    for tally, weight in ((before, w0), (after, fit.weight)):
        logits = unseen @ mix @ weight.T
        tally.add(rule.select(target), rule.select(logits), target, logits)
    assert before.rates()["cr_any"] > 0.3
    assert after.rates()["overlap"] > 0.95
