"""Who does what: greedy bin packing of work, and contiguous shares of shards. Torch-free."""

from __future__ import annotations

from collections.abc import Sequence


def greedy_bin_packing(costs: Sequence[float], bins: int) -> list[int]:
    """Bin of each item: the most costly first, each into the bin that holds least.

    The fullest bin holds at most 4/3 of what the best packing has (Graham, 1969). Ties go to the lower number, so every
    process that packs the same costs packs alike.

    Args:
        costs: Non-negative cost of each item.
        bins: Number of bins.
    """
    load = [0.0] * bins
    place = [0] * len(costs)
    for item in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        lightest = min(range(bins), key=lambda b: (load[b], b))
        place[item] = lightest
        load[lightest] += costs[item]
    return place


def solve_cost(rows: int, columns: int) -> float:
    """Work of one GPTQ solve, ``K³ + N K²``: factor of the Hessian and updates of ``N x K`` weights."""
    return float(columns) ** 3 + float(rows) * float(columns) ** 2


def shares(count: int, parts: int) -> list[range]:
    """Contiguous, nearly equal shares of ``count`` things; some are empty where there are more parts than things."""
    return [range(count * part // parts, count * (part + 1) // parts) for part in range(parts)]
