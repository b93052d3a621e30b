"""Bits of the nodes of many matrices: the budget holds, is used up, and the better of two solvers is kept."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from llmcompress.algorithms.tree_allocation import FEW, Bits, Choice, Problem, allocate, lagrangian
from llmcompress.quant.tree import Members, Tree


def phi(bits: int) -> float:
    return 0.3**bits


CHOICE = Choice((0, 1, 2, 3, 4), (1, 2, 3), phi)
OVERHEAD = 0.125


def problems(count: int, seed: int) -> list[Problem]:
    """Matrices of one to three sizes, trees of four models each, energies over three orders of magnitude."""
    draw, names = random.Random(seed), list("abcd")
    found = []
    for _ in range(count):
        sets: list[Members] = [frozenset([name]) for name in names]
        merges = []
        while len(sets) > 1:
            a, b = draw.sample(sets, 2)
            merges.append((a, b))
            sets = [*(each for each in sets if each not in (a, b)), a | b]
        tree = Tree.of(names, merges)
        energy = [10 ** draw.uniform(-3, 0) for _ in tree.ids]
        weight = [draw.uniform(0.5, 2) if tree.is_leaf(p) else 0.0 for p in tree.preorder()]
        found.append(Problem(tree, energy, weight, draw.choice((1, 2, 3)), OVERHEAD))
    return found


def budget_of(given: Sequence[Problem], average: float) -> float:
    return average * sum(4 * problem.size for problem in given)


def spent(given: Sequence[Problem], bits: Sequence[Bits]) -> float:
    return sum(problem.spent(own) for problem, own in zip(given, bits, strict=True))


def error(given: Sequence[Problem], bits: Sequence[Bits]) -> float:
    return sum(problem.error(own, phi) for problem, own in zip(given, bits, strict=True))


@pytest.mark.parametrize("solver", ["lagrange", "greedy"])
@pytest.mark.parametrize("seed", range(6))
def test_no_raise_of_a_node_that_helps_fits_into_what_is_left(solver: str, seed: int) -> None:
    given = problems(FEW + 3, seed)
    budget = budget_of(given, 1.6 + 0.17 * seed)
    bits = allocate(given, CHOICE, budget, solver)
    left = budget - spent(given, bits)
    assert left >= -1e-9 * budget
    for problem, own in zip(given, bits, strict=True):
        for position in problem.tree.preorder():
            for width in CHOICE.of(problem, position):
                raised = (*own[:position], width, *own[position + 1 :])
                extra = problem.spent(raised) - problem.spent(own)
                helps = problem.error(raised, phi) < problem.error(own, phi) * (1 - 1e-9)
                assert not (helps and 0 < extra <= left)


def test_of_two_solvers_the_better_is_kept() -> None:
    better = {"greedy": 0, "price": 0}
    for seed in range(30):
        given = problems(3, 100 + seed)
        budget = budget_of(given, 2.1)
        found = error(given, allocate(given, CHOICE, budget))
        by_gain = error(given, allocate(given, CHOICE, budget, "greedy"))
        by_price = error(given, lagrangian(given, CHOICE, budget))
        assert found <= min(by_gain, by_price) * (1 + 1e-12)
        better["price" if found < by_gain * (1 - 1e-9) else "greedy"] += 1
    # else nothing would be seen of the choice
    assert min(better.values()) > 0, better


def test_prices_of_widths_take_the_place_of_the_overhead() -> None:
    tree = Tree.star(list("ab"))
    weight = [1.0 if tree.is_leaf(p) else 0.0 for p in tree.preorder()]
    padded = Problem(tree, [1.0] * len(weight), weight, 1, OVERHEAD, {1: 2.0, 2: 2.0, 3: 10.0, 4: 10.0})
    assert padded.spent((0, *[2] * (len(weight) - 1))) == 2.0 * (len(weight) - 1)
    # two bits cost what one costs: nobody stops at one, and three have no room
    assert allocate([padded], CHOICE, 6.0) == [(2, 2, 2)]
