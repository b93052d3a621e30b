"""Spend an average-bit budget where it lowers the measured error most.

Minimise ``Σ_u error[u][b_u]`` subject to ``Σ_u size_u · b_u ≤ budget · Σ_u size_u``: a multiple-choice
knapsack. Small problems are solved exactly by dynamic programming; larger ones by Lagrangian greedy steps along each
unit's lower convex hull, which is optimal up to the last step. No commercial solver.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from itertools import pairwise
from math import gcd

# states times units above which dynamic programming gives way to the greedy method
EXACT_LIMIT = 2_000_000


def allocate(
    errors: Sequence[Sequence[float]], sizes: Sequence[int], choices: Sequence[int], average: float
) -> list[int]:
    """Choose a width for every unit.

    Args:
        errors: ``errors[u][c]`` is the error of unit u at width ``choices[c]``.
        sizes: Number of weights of each unit.
        choices: Widths, ascending.
        average: Budget in bits per weight.

    Returns:
        One of ``choices`` per unit; the weighted average never exceeds the budget.

    Raises:
        ValueError: The budget is below the smallest width, or the inputs do not fit together.
    """
    if list(choices) != sorted(set(choices)) or not choices:
        raise ValueError("choices must be ascending and distinct")
    if len(errors) != len(sizes) or any(len(row) != len(choices) for row in errors):
        raise ValueError("one error per unit and choice is needed")
    if average < choices[0]:
        raise ValueError(f"a budget of {average} bits is below the smallest width {choices[0]}")
    if not sizes:
        return []
    unit = reduce(gcd, sizes)
    weights = [size // unit for size in sizes]
    budget = int(average * sum(weights) + 1e-9)
    spare = budget - choices[0] * sum(weights)
    if (spare + 1) * len(sizes) * len(choices) <= EXACT_LIMIT:
        return _exact(errors, weights, choices, spare)
    return _greedy(errors, weights, choices, spare)


def _exact(errors: Sequence[Sequence[float]], weights: Sequence[int], choices: Sequence[int], spare: int) -> list[int]:
    """Dynamic programming over the bits spent above the smallest width."""
    infinity = float("inf")
    cost = [0.0] + [infinity] * spare
    picks: list[list[int]] = []
    for row, weight in zip(errors, weights):
        fresh, pick = [infinity] * (spare + 1), [0] * (spare + 1)
        for index, bits in enumerate(choices):
            price = (bits - choices[0]) * weight
            for used in range(price, spare + 1):
                candidate = cost[used - price] + row[index]
                if candidate < fresh[used]:
                    fresh[used], pick[used] = candidate, index
        cost = fresh
        picks.append(pick)
    used = min(range(spare + 1), key=lambda s: cost[s])
    found = []
    for pick, weight in zip(reversed(picks), reversed(weights)):
        bits = choices[pick[used]]
        found.append(bits)
        used -= (bits - choices[0]) * weight
    return found[::-1]


def _greedy(errors: Sequence[Sequence[float]], weights: Sequence[int], choices: Sequence[int], spare: int) -> list[int]:
    """Take hull steps in order of error saved per bit while they fit."""
    steps = []
    for unit, (row, weight) in enumerate(zip(errors, weights)):
        hull = _lower_hull(row, choices)
        for here, there in pairwise(hull):
            price = (choices[there] - choices[here]) * weight
            steps.append(((row[here] - row[there]) / price, unit, here, there, price))
    steps.sort(key=lambda step: (-step[0], step[1], step[2]))
    found = [0] * len(weights)
    for _, unit, here, there, price in steps:
        # a unit that could not afford a step must not take a later one
        if found[unit] == here and price <= spare:
            found[unit], spare = there, spare - price
    return [choices[index] for index in found]


def _lower_hull(row: Sequence[float], choices: Sequence[int]) -> list[int]:
    """Indices of the choices on the lower convex hull of (bits, error), as long as the error falls."""
    hull: list[int] = []
    for index in range(len(choices)):
        while len(hull) >= 2:
            first, second = hull[-2], hull[-1]
            old = (row[first] - row[second]) / (choices[second] - choices[first])
            new = (row[second] - row[index]) / (choices[index] - choices[second])
            if new > old:
                hull.pop()
            else:
                break
        hull.append(index)
    while len(hull) > 1 and row[hull[-1]] >= row[hull[-2]]:
        hull.pop()
    return hull
