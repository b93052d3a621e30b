from __future__ import annotations

import itertools
import random

import pytest

from llmcompress.algorithms import bit_allocation
from llmcompress.algorithms.bit_allocation import allocate


def brute_force(errors: list[list[float]], sizes: list[int], choices: list[int], average: float) -> float:
    best = float("inf")
    for pick in itertools.product(range(len(choices)), repeat=len(sizes)):
        spent = sum(size * choices[c] for size, c in zip(sizes, pick))
        if spent <= average * sum(sizes) + 1e-9:
            best = min(best, sum(row[c] for row, c in zip(errors, pick)))
    return best


def total(errors: list[list[float]], choices: list[int], widths: list[int]) -> float:
    return sum(row[choices.index(bits)] for row, bits in zip(errors, widths))


def random_problem(seed: int) -> tuple[list[list[float]], list[int]]:
    rng = random.Random(seed)
    errors = []
    for _ in range(6):
        start = rng.uniform(0.1, 10)
        errors.append([start, start * rng.uniform(0.2, 0.6), start * rng.uniform(0.01, 0.2)])
    return errors, [rng.choice([64, 128, 384]) for _ in range(6)]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("average", [2.0, 2.3, 3.0, 3.7, 4.0])
def test_exact_is_optimal_and_greedy_is_near(seed: int, average: float, monkeypatch: pytest.MonkeyPatch) -> None:
    choices = [2, 3, 4]
    errors, sizes = random_problem(seed)
    best = brute_force(errors, sizes, choices, average)
    widths = allocate(errors, sizes, choices, average)
    assert sum(s * b for s, b in zip(sizes, widths)) <= average * sum(sizes) + 1e-9
    assert total(errors, choices, widths) == pytest.approx(best)
    monkeypatch.setattr(bit_allocation, "EXACT_LIMIT", 0)
    widths = allocate(errors, sizes, choices, average)
    assert sum(s * b for s, b in zip(sizes, widths)) <= average * sum(sizes) + 1e-9
    # at most about one unit's step is left on the table
    slack = max(row[0] - row[-1] for row in errors)
    assert best - 1e-9 <= total(errors, choices, widths) <= best + slack


def test_the_unit_that_gains_most_is_served_first() -> None:
    errors = [[1.0, 0.9, 0.8], [9.0, 2.0, 0.5], [1.0, 0.9, 0.8]]
    assert allocate(errors, [10, 10, 10], [2, 3, 4], 2.34) == [2, 3, 2]
    assert allocate(errors, [10, 10, 10], [2, 3, 4], 2.67) == [2, 4, 2]


@pytest.mark.parametrize("limit", [0, 10**7])
def test_error_that_rises_with_width_is_not_bought(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bit_allocation, "EXACT_LIMIT", limit)
    assert allocate([[1.0, 0.5, 0.7]], [10], [2, 3, 4], 4.0) == [3]


def test_bad_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="below the smallest"):
        allocate([[1.0, 0.5]], [4], [3, 4], 2.5)
    with pytest.raises(ValueError, match="ascending"):
        allocate([[1.0, 0.5]], [4], [4, 3], 3.5)
    with pytest.raises(ValueError, match="one error per unit"):
        allocate([[1.0]], [4], [3, 4], 3.5)
    assert allocate([], [], [2, 3], 2.5) == []
