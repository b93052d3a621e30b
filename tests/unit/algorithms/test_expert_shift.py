"""Shift metrics against brute force over sets."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.algorithms.expert_shift import (
    ShiftTally,
    kl_topk,
    tokens_per_expert,
)
from llmcompress.algorithms.routing import RouterRule

N, K, T = 12, 4, 200


@pytest.fixture
def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(T, N, generator=generator)
    noisy = logits + 0.6 * torch.randn(T, N, generator=generator)
    return logits, noisy, logits.topk(K).indices, noisy.topk(K).indices


def rates_of(reference, chosen, logits, noisy, k=K):
    tally = ShiftTally(RouterRule(reference.shape[-1]), cover=(k,))
    tally.add(reference, chosen, logits, noisy)
    return tally.rates()


def test_change_rates_match_sets(routed):
    logits, noisy, reference, chosen = routed
    distances = [K - len(set(a) & set(b)) for a, b in zip(reference.tolist(), chosen.tolist())]
    rates = rates_of(reference, chosen, logits, noisy)
    assert rates["cr_any"] == pytest.approx(sum(d >= 1 for d in distances) / T)
    assert rates["cr_half"] == pytest.approx(sum(d >= K / 2 for d in distances) / T)
    assert rates["cr_all"] == pytest.approx(sum(d == K for d in distances) / T)
    assert rates["overlap"] == pytest.approx(sum(1 - d / K for d in distances) / T)
    assert 0 < rates["cr_any"] < 1, "the example must show some change"


def test_equal_choices_in_another_order_are_no_change(routed):
    logits, _, reference, _ = routed
    rates = rates_of(reference, reference.flip(-1), logits, logits)
    assert rates["cr_any"] == rates["cr_half"] == rates["cr_all"] == 0.0
    assert rates["overlap"] == 1.0


def test_odd_k_counts_half_from_two_of_three():
    reference = torch.tensor([[0, 1, 2], [0, 1, 2]])
    chosen = torch.tensor([[0, 1, 3], [0, 4, 3]])
    logits = torch.zeros(2, 5)
    assert rates_of(reference, chosen, logits, logits)["cr_half"] == 0.5


@pytest.mark.parametrize("k", [4, 6, 8, 12])
def test_rank_cover_matches_brute_force(routed, k):
    _, noisy, reference, chosen = routed
    covered = total = 0
    for token in range(T):
        order = sorted(range(N), key=lambda e: -float(noisy[token, e]))
        for expert in set(reference[token].tolist()) - set(chosen[token].tolist()):
            total += 1
            covered += order.index(expert) < k
    assert rates_of(*routed[2:], *routed[:2], k)[f"rank_cover_{k}"] == pytest.approx(covered / total)


def test_rank_cover_without_a_loss_is_one(routed):
    logits, _, reference, _ = routed
    assert rates_of(reference, reference, logits, logits, 4)["rank_cover_4"] == 1.0


@pytest.mark.parametrize("k", [1, 5, 12])
def test_loss_share_matches_brute_force(routed, k):
    logits, noisy, reference, chosen = routed
    inside = everything = 0.0
    for token in range(T):
        top = sorted(range(N), key=lambda e: -float(logits[token, e]))[:k]
        errors = [(float(logits[token, e]) - float(noisy[token, e])) ** 2 for e in range(N)]
        inside += sum(errors[e] for e in top)
        everything += sum(errors)
    assert rates_of(reference, chosen, logits, noisy, k)[f"loss_share_{k}"] == pytest.approx(inside / everything)
    assert rates_of(reference, chosen, logits, logits, k)[f"loss_share_{k}"] == 0.0


def test_kl_topk_matches_definition_and_ignores_a_common_shift(routed):
    logits, noisy, reference, _ = routed
    top = logits[3].topk(K).indices
    p, q = logits[3][top].softmax(0), noisy[3][top].softmax(0)
    expected = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q))
    assert float(kl_topk(logits, noisy, reference)[3]) == pytest.approx(expected, rel=1e-4)
    assert float(kl_topk(logits, logits + 3.0, reference).abs().max()) < 1e-6


def test_tokens_per_expert_ignores_skipped_slots():
    assert tokens_per_expert(torch.tensor([[0, 2], [2, 3]]), 3).tolist() == [1, 0, 2]


def test_tally_over_batches_equals_one_batch(routed):
    logits, noisy, reference, chosen = routed
    whole, parts = (ShiftTally(RouterRule(K), cover=(6,)) for _ in range(2))
    whole.add(reference, chosen, logits, noisy)
    for rows in torch.arange(T).split(33):
        parts.add(reference[rows], chosen[rows], logits[rows], noisy[rows])
    assert parts.rates() == pytest.approx(whole.rates())
    assert whole.rates()["kl_topk"] == pytest.approx(float(kl_topk(logits, noisy, reference).mean()), rel=1e-5)
    assert ShiftTally(RouterRule(K)).rates() == {}


def test_a_correction_decides_which_experts_are_the_full_precision_ones():
    """The best experts of a router with a correction are those it chooses by, not those of its largest logits."""
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    noisy = torch.tensor([[2.0, 1.0, 0.0, -4.0]])
    rule = RouterRule(1, "sigmoid_group_topk", correction=torch.tensor([0.0, 0.0, 0.0, 5.0]))
    tally = ShiftTally(rule, cover=(1,))
    tally.add(rule.select(logits), rule.select(noisy), logits, noisy)
    assert tally.rates()["loss_share_1"] == 1.0
    rule = RouterRule(2, "sigmoid_group_topk", correction=rule.correction)
    tally = ShiftTally(rule)
    tally.add(rule.select(logits), rule.select(noisy), logits, noisy)
    p, q = torch.tensor([2.0, -1.0]).log_softmax(0), torch.tensor([2.0, -4.0]).log_softmax(0)
    assert tally.rates()["kl_topk"] == pytest.approx(float((p.exp() * (p - q)).sum()), rel=1e-5)
