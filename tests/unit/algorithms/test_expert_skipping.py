"""Skipping decisions against brute force over tokens."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.expert_skipping import (
    SkipOptions,
    drop_slots,
    drop_weakest,
    expert_counts,
    rarely_used,
    shortest_useful,
    skip_experts,
)
from llmcompress.algorithms.routing import RouterRule

N, K, B, L = 8, 2, 3, 40


@pytest.fixture
def routing():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(B * L, N, generator=generator) + torch.linspace(0, 2.5, N)
    weights, index = logits.softmax(-1).topk(K)
    return logits, weights, index


@pytest.mark.parametrize("alpha", [0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("scope", ["sequence", "batch"])
def test_equation_6_against_brute_force(routing, alpha, scope):
    _, _, index = routing
    valid = torch.rand(B * L, generator=torch.Generator().manual_seed(1)) > 0.2
    groups = B if scope == "sequence" else 1
    group = torch.arange(B * L) // (L if scope == "sequence" else B * L)
    counts = expert_counts(index, valid, group, groups, N)
    lengths = torch.bincount(group[valid], minlength=groups)
    skipped = rarely_used(counts, lengths, K, alpha)
    for g in range(groups):
        tokens = [t for t in range(B * L) if group[t] == g and valid[t]]
        for expert in range(N):
            count = sum(expert in index[t].tolist() for t in tokens)
            assert counts[g, expert] == count
            assert bool(skipped[g, expert]) == (count < alpha * len(tokens) * K / N)
    assert not skipped.all(-1).any(), "the most used expert always stays"


def test_padding_is_not_counted(routing):
    _, _, index = routing
    valid = torch.ones(B * L, dtype=torch.bool)
    valid[L:] = False
    group = torch.zeros(B * L, dtype=torch.int64)
    counts = expert_counts(index, valid, group, 1, N)
    assert torch.equal(counts, expert_counts(index[:L], valid[:L], group[:L], 1, N))


def test_empty_slots_are_no_experts():
    """Neither the mark of an empty slot nor a negative index may count for a neighbouring sequence."""
    index = torch.tensor([[N, 1], [-1, 2], [N, N]])
    counts = expert_counts(index, torch.ones(3, dtype=torch.bool), torch.arange(3), 3, N)
    expected = torch.zeros(3, N, dtype=torch.int64)
    expected[0, 1] = expected[1, 2] = 1
    assert torch.equal(counts, expected)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
@pytest.mark.parametrize("k,n", [(2, 8), (6, 64), (4, 60), (8, 128)])
def test_shortest_useful_is_exact(alpha, k, n):
    """Up to that length a count of 1 is never below the threshold; one token more and it is."""
    length = shortest_useful(alpha, k, n)
    once = torch.ones(1, n, dtype=torch.int64)
    assert not rarely_used(once, torch.tensor([length]), k, alpha).any()
    assert rarely_used(once, torch.tensor([length + 1]), k, alpha).all()


def test_paper_lengths():
    """The thresholds derived for the paper's models at alpha 0.3."""
    assert [shortest_useful(0.3, k, n) for k, n in ((2, 8), (2, 16), (6, 64), (4, 60))] == [13, 26, 35, 50]


def test_dropped_slots_are_empty_and_the_others_untouched(routing):
    _, weights, index = routing
    drop = torch.zeros_like(index, dtype=torch.bool)
    drop[3, 1] = True
    result = drop_slots(weights, index, drop, N, SkipOptions(0.3))
    assert result.index[3, 1] == N and result.weights[3, 1] == 0
    assert torch.equal(result.index[~drop], index[~drop]) and torch.equal(result.weights[~drop], weights[~drop])


def test_renormalised_survivors_carry_the_whole_weight(routing):
    _, weights, index = routing
    drop = torch.zeros_like(index, dtype=torch.bool)
    drop[5, 0] = drop[7] = True
    result = drop_slots(weights, index, drop, N, SkipOptions(0.3, renormalize=True))
    assert torch.allclose(result.weights[5], torch.stack((torch.tensor(0.0), weights[5].sum())))
    assert torch.equal(result.weights[7], torch.zeros(K)), "a token that lost all stays at zero, not NaN"


def test_keep_top1_only_helps_tokens_that_lose_all(routing):
    _, weights, index = routing
    drop = torch.zeros_like(index, dtype=torch.bool)
    drop[0] = drop[1, 0] = True
    result = drop_slots(weights, index, drop, N, SkipOptions(0.3, keep_top1=True))
    assert result.dropped[0].tolist() == [False, True] and result.dropped[1].tolist() == [True, False]
    unsorted = drop_slots(weights.flip(-1), index.flip(-1), drop.flip(-1), N, SkipOptions(0.3, keep_top1=True))
    assert unsorted.dropped[0].tolist() == [True, False], "the strongest, wherever it stands"


@pytest.mark.parametrize("fallback", ["none", "reroute"])
def test_tokens_without_a_skipped_expert_keep_every_bit(routing, fallback):
    logits, weights, index = routing
    banned = torch.zeros(B * L, N, dtype=torch.bool)
    banned[:, 0] = True
    result = skip_experts(logits, weights, index, banned, RouterRule(K), SkipOptions(0.3, fallback))
    clean = ~(index == 0).any(-1)
    assert 0 < int(clean.sum()) < B * L
    assert torch.equal(result.weights[clean], weights[clean]) and torch.equal(result.index[clean], index[clean])
    assert not (result.index == 0).any()


def test_reroute_fills_the_slot_with_the_next_best(routing):
    logits, weights, index = routing
    banned = torch.zeros(B * L, N, dtype=torch.bool)
    banned[:, N - 1] = True
    rule = RouterRule(K, renormalizes=True)
    result = skip_experts(logits, weights, index, banned, rule, SkipOptions(0.3, "reroute"))
    for token in (index == N - 1).any(-1).nonzero().flatten().tolist():
        order = [e for e in logits[token].argsort(descending=True).tolist() if e != N - 1][:K]
        assert result.index[token].tolist() == order
        share = logits[token, order].softmax(-1)
        assert torch.allclose(result.weights[token], share, atol=1e-6)


def test_reroute_leaves_slots_empty_when_too_few_experts_are_left(routing):
    logits, weights, index = routing
    banned = torch.ones(B * L, N, dtype=torch.bool)
    banned[:, 2] = False
    result = skip_experts(logits, weights, index, banned, RouterRule(K), SkipOptions(0.3, "reroute"))
    touched = ~(index == 2).all(-1)
    assert (result.index[touched] == N).sum(-1).eq(K - 1).all()
    assert torch.isfinite(result.weights).all() and (result.weights[result.index == N] == 0).all()


def test_drop_weakest_takes_one_slot_of_every_token(routing):
    _, weights, index = routing
    for w, i in ((weights, index), (weights.flip(-1), index.flip(-1))):
        result = drop_weakest(w, i, N, SkipOptions(0.3))
        assert result.dropped.sum(-1).eq(1).all()
        assert torch.equal(w[result.dropped], w.amin(-1))
    tied = drop_weakest(torch.ones(4, 3), index[:4].repeat(1, 2)[:, :3], N, SkipOptions(0.3))
    assert tied.dropped.sum(-1).eq(1).all()
    with pytest.raises(ValueError, match="none to spare"):
        drop_weakest(weights[:, :1], index[:, :1], N, SkipOptions(0.3))
