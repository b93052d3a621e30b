"""S2R test 2: advantages, baselines, surrogate, KL and offline filters against hand-computed or brute-force answers."""

from __future__ import annotations

import itertools
import json
import math

import pytest
import torch

from llmcompress.algorithms import rl_objectives
from llmcompress.algorithms.rl_objectives import (
    GroupBaseline,
    accuracy_bin,
    balanced,
    bonus_factors,
    clipped_loss,
    confirmed_end,
    context_values,
    contexts,
    full_kl,
    keep_problem,
    leave_one_out,
    piecewise_logp,
    returns,
    token_logp,
    unit_sums,
)


def test_rloo_by_hand():
    rewards = torch.tensor([[1.0, -1.0, -1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    expected = torch.tensor([[4 / 3, -4 / 3, -4 / 3, 4 / 3], [0.0, 0.0, 0.0, 0.0]])
    torch.testing.assert_close(leave_one_out(rewards), expected)


def test_rloo_by_brute_force():
    rewards = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    slow = torch.empty_like(rewards)
    for p, m in itertools.product(range(5), range(6)):
        others = [rewards[p, j] for j in range(6) if j != m]
        slow[p, m] = rewards[p, m] - sum(others) / 5
    torch.testing.assert_close(leave_one_out(rewards), slow)


@pytest.mark.parametrize("reward", [0.9, -1.05, 0.7])
def test_rloo_of_samples_that_agree_is_nothing(reward):
    for samples in range(2, 9):
        assert torch.equal(leave_one_out(torch.full((1, samples), reward)), torch.zeros(1, samples))


def test_rloo_refuses_one_sample():
    with pytest.raises(ValueError, match="two samples"):
        leave_one_out(torch.ones(3, 1))


def test_reward_contexts():
    assert contexts([-1, 1, 1]) == [(), (-1,), (-1, 1)]


def test_context_baseline_over_a_pool_by_hand():
    """Three responses; the first actions share a group, the second split by what came before."""
    pool = [[1, 1], [-1, 1, 1, 1], [-1, -1]]
    keys = [c for rewards in pool for c in contexts(rewards)]
    values = [r for rewards in pool for r in rewards]
    found = dict(zip(keys, GroupBaseline(min_group=1).values(keys, values)))
    assert found[()] == pytest.approx(-1 / 3)
    assert found[(1,)] == 1
    assert found[(-1,)] == 0
    assert found[(-1, 1)] == 1
    assert GroupBaseline(min_group=3).values(keys, values)[1] == 0


def test_what_a_context_lets_expect_by_hand():
    prefixes = [[(), (1,)], [(), (-1,), (-1, 1), (-1, 1, -1)], [(), (-1,), (-1, 1), (-1, 1, 1)]]
    values = context_values(prefixes, [1.0, -1.0, 1.0])
    start = 1 / (3 + 4)
    wrong = (0 + 4 * start) / (2 + 4)
    told = (0 + 4 * wrong) / (2 + 4)
    assert values == pytest.approx(
        {
            (): start, (1,): (1 + 4 * start) / 5, (-1,): wrong, (-1, 1): told,
            (-1, 1, -1): (-1 + 4 * told) / 5, (-1, 1, 1): (1 + 4 * told) / 5,
        }
    )  # fmt: skip


def test_running_baseline_is_read_before_the_batch_is_added():
    baseline = GroupBaseline("running", min_group=2)
    assert baseline.values(["a", "a"], [1, 1]) == [0, 0]
    assert baseline.values(["a", "a"], [-1, -1]) == [1, 1]
    assert baseline.values(["a"], [1]) == [0]
    assert baseline.table["a"] == (1, 5)


def test_ema_baseline_forgets():
    baseline = GroupBaseline("ema", min_group=1, decay=0.5)
    baseline.values(["a"] * 4, [1] * 4)
    baseline.values(["a"] * 4, [-1] * 4)
    # (0.5 * 4 - 4) / (0.5 * 4 + 4)
    assert baseline.values(["a"], [0]) == [pytest.approx(-1 / 3)]


def test_softmax_baseline_by_hand():
    found = GroupBaseline(min_group=1, softmax=2.0).values(["a", "a"], [1, -1])
    assert found[0] == pytest.approx(2 * math.log((math.exp(0.5) + math.exp(-0.5)) / 2))


def test_baseline_table_survives_json():
    baseline = GroupBaseline("running", min_group=1)
    baseline.values([("context", -1, 1), ("position", 3, 0)], [1, -1])
    copy = GroupBaseline("running", min_group=1)
    copy.restore(json.loads(json.dumps(baseline.state())))
    assert copy.table == baseline.table


def test_returns_and_bonuses():
    assert returns([1, -1, 1], 0) == [1, -1, 1]
    assert returns([1, -1, 1], 0.5) == [1 + 0.5 * (-1 + 0.5), -1 + 0.5, 1]
    # s wrong, v, s right (flip), v of a right attempt
    assert bonus_factors([-1, 1, 1, 1], flip=2, verify_correct=3) == [1, 1, 2, 3]
    assert bonus_factors([1, -1, -1, 1], flip=2, verify_correct=3) == [1, 3, 2, 1]
    assert bonus_factors([1, 1, 1, 1]) == [1, 1, 1, 1]


def test_unit_sums():
    sums, sizes = unit_sums(torch.tensor([[1.0, 2.0, 3.0, 9.0]]), torch.tensor([[0, 0, 1, -1]]), 3)
    assert sums.tolist() == [[3, 3, 0]]
    assert sizes.tolist() == [[2, 1, 0]]


def brute_loss(logp, old, units, advantages, clip, ratio):
    """The formula, one token after another."""
    losses = []
    for row in range(len(logp)):
        gains = []
        for unit in range(advantages.shape[1]):
            tokens = [t for t in range(logp.shape[1]) if units[row, t] == unit]
            if not tokens:
                continue
            logs = [(logp[row, t] - old[row, t]).item() for t in tokens]
            if ratio == "token":
                rhos = [math.exp(x) for x in logs]
            else:
                rhos = [math.exp(sum(logs) / (len(logs) if ratio == "mean" else 1))]
            a = advantages[row, unit].item()
            parts = [min(r * a, min(max(r, 1 - clip), 1 + clip) * a) for r in rhos]
            gains.append(sum(parts) / len(parts))
        losses.append(-sum(gains) / max(1, len(gains)))
    return losses


@pytest.mark.parametrize("ratio", ["mean", "sum", "token"])
def test_clipped_loss_by_brute_force(ratio):
    generator = torch.Generator().manual_seed(1)
    logp = torch.randn(4, 9, generator=generator).double() * 0.3
    old = torch.randn(4, 9, generator=generator).double() * 0.3
    units = torch.randint(-1, 3, (4, 9), generator=generator)
    advantages = torch.randn(4, 3, generator=generator).double()
    found, _ = clipped_loss(logp, old, units, advantages, 0.2, ratio)
    assert found.tolist() == pytest.approx(brute_loss(logp, old, units, advantages, 0.2, ratio))


def test_gradient_of_one_unit_equals_that_of_the_outcome_level():
    logp = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    old = torch.randn(2, 5, dtype=torch.float64)
    advantages = torch.tensor([[0.7], [-1.2]], dtype=torch.float64)
    one = clipped_loss(logp, old, torch.zeros(2, 5, dtype=torch.int64), advantages, 0.2)[0].sum()
    (first,) = torch.autograd.grad(one, logp)
    # the same response cut in two units of equal advantage at ratio 1 pulls its tokens equally in total
    same = logp.detach().clone().requires_grad_(True)
    halves = torch.tensor([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]])
    two = clipped_loss(same, same.detach(), halves, advantages.expand(2, 2), 0.2)[0].sum()
    (second,) = torch.autograd.grad(two, same)
    whole = logp.detach().clone().requires_grad_(True)
    base = clipped_loss(whole, whole.detach(), torch.zeros(2, 5, dtype=torch.int64), advantages, 0.2)[0].sum()
    (third,) = torch.autograd.grad(base, whole)
    torch.testing.assert_close(second.sum(1), third.sum(1))
    assert first.shape == third.shape


def test_at_the_first_update_the_gradient_is_that_of_reinforce():
    logits = torch.randn(1, 4, 6, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([[0, 3, 2, 5]])
    logp = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss, outside = clipped_loss(
        logp, logp.detach(), torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[2.0]]).double(), 0.2
    )
    (found,) = torch.autograd.grad(loss.sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad(-2 * logp.mean(), logits)
    torch.testing.assert_close(found, expected)
    assert outside == 0


@pytest.mark.parametrize(
    ("advantage", "shift", "moves"), [(1, 0.3, False), (1, -0.3, True), (-1, 0.3, True), (-1, -0.3, False)]
)
def test_clip_stops_exactly_what_went_too_far_already(advantage, shift, moves):
    logp = torch.full((1, 3), shift, requires_grad=True)
    units = torch.zeros(1, 3, dtype=torch.int64)
    loss, outside = clipped_loss(logp, torch.zeros(1, 3), units, torch.tensor([[float(advantage)]]), 0.2)
    loss.sum().backward()
    assert (logp.grad.abs().sum() > 0).item() is moves
    assert outside == 1


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probabilities_in_pieces_equal_the_plain_ones_and_so_do_their_gradients(temperature, monkeypatch):
    monkeypatch.setattr(rl_objectives, "PIECE", 3)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=generator, dtype=torch.float32) * 4
    ids = torch.randint(7, (2, 5), generator=generator)
    weights = torch.randn(2, 5, generator=generator)
    plain, pieces = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    expected = token_logp(plain, ids, temperature)
    found = piecewise_logp(pieces.flatten(0, 1), ids.flatten(), temperature).view(2, 5)
    torch.testing.assert_close(found, expected)
    (expected * weights).sum().backward()
    (found * weights).sum().backward()
    torch.testing.assert_close(pieces.grad, plain.grad)
    half = logits.bfloat16().requires_grad_()
    piecewise_logp(half.flatten(0, 1), ids.flatten(), temperature).sum().backward()
    assert half.grad.dtype == torch.bfloat16


def test_token_logp_and_kl_by_hand():
    logits = torch.tensor([[[0.0, math.log(3.0)]]])
    assert token_logp(logits, torch.tensor([[1]])).item() == pytest.approx(math.log(0.75))
    assert token_logp(logits, torch.tensor([[1]]), 0.5).item() == pytest.approx(math.log(0.9))
    reference = torch.zeros(1, 1, 2)
    expected = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert full_kl(logits, reference).item() == pytest.approx(expected)
    assert full_kl(logits, logits).item() == pytest.approx(0, abs=1e-7)


def test_prompt_filter_includes_both_ends():
    assert keep_problem(1, 10, 0.1, 0.7)
    assert keep_problem(7, 10, 0.1, 0.7)
    assert not keep_problem(0, 8, 0.1, 0.7)
    assert not keep_problem(6, 8, 0.1, 0.7)


def test_accuracy_bins_tell_every_count_apart():
    assert [accuracy_bin(right, 8, 9) for right in range(9)] == list(range(9))
    assert [accuracy_bin(right, 8, 2) for right in (0, 3, 4, 8)] == [0, 0, 1, 1]
    assert [accuracy_bin(right, 100, 100) for right in range(100)] == list(range(100))


def test_truncation_after_the_first_confirmed_answer():
    assert confirmed_end([-1, 1, 1, 1, -1, 1]) == 4
    assert confirmed_end([1, 1]) == 2
    # right but not accepted, then wrong and accepted: nothing was confirmed
    assert confirmed_end([1, -1, -1, -1]) is None
    assert confirmed_end([1]) is None


def test_balance_keeps_no_more_wrong_than_right_ones():
    assert balanced([False, False, True, False]) == [0, 2]
    assert balanced([False, False]) == []
    assert balanced([True, True]) == [0, 1]
