from __future__ import annotations

import random

from llmcompress.distributed.balance import greedy_bin_packing, shares, solve_cost


def test_load_is_within_four_thirds_of_the_best() -> None:
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.random() for _ in range(rng.randint(1, 40))]
        bins = rng.randint(1, 8)
        place = greedy_bin_packing(costs, bins)
        load = [sum(c for c, p in zip(costs, place) if p == b) for b in range(bins)]
        assert max(load) <= (4 / 3) * max(sum(costs) / bins, *costs) + max(costs) * 1e-9


def test_equal_costs_are_dealt_evenly_and_always_alike() -> None:
    place = greedy_bin_packing([1.0] * 8, 3)
    assert place == greedy_bin_packing([1.0] * 8, 3) == [0, 1, 2, 0, 1, 2, 0, 1]


def test_shares_are_contiguous_and_complete() -> None:
    for count in range(12):
        for parts in range(1, 7):
            found = shares(count, parts)
            assert [i for share in found for i in share] == list(range(count))
            assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_wide_hessian_costs_more_than_many_rows() -> None:
    assert solve_cost(10, 100) > solve_cost(1000, 10)
