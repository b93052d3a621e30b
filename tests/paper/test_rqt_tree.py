"""Our RQT variant: identities of aggregation, quality of the greedy tree, optimality of the allocation."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest
import torch

from llmcompress.algorithms.grids import distortion
from llmcompress.algorithms.tree_allocation import Choice, Problem, allocate, best_for_price
from llmcompress.algorithms.tree_topology import (
    aggregate,
    centred_gram,
    hessian_mean,
    increments,
    merge_cost,
)
from llmcompress.quant.tree import Members, Tree


def moments(count: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, 4 * columns, columns, generator=generator, dtype=torch.float64)
    return 2 * inputs.transpose(1, 2) @ inputs / (4 * columns)


def family(count: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    common = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return common + 0.3 * torch.randn(count, rows, columns, generator=generator, dtype=torch.float64)


def cost_of_one_weight(weights: torch.Tensor, hessians: torch.Tensor) -> float:
    """J(C) directly: the error that is left with the best common weight."""
    best, _ = hessian_mean(weights, hessians, torch.ones(len(weights), dtype=weights.dtype))
    apart = weights - best
    return float(torch.einsum("mnk,mkl,mnl->", apart, hessians, apart))


def generalised_merge_cost(
    first: tuple[torch.Tensor, torch.Tensor], second: tuple[torch.Tensor, torch.Tensor]
) -> float:
    """Increase of the error when two clusters with second moments of their own share one weight.

    ``tr((A_A - A_B) (P_A⁻¹ + P_B⁻¹)⁻¹ (A_A - A_B)ᵀ)``. The tree is built with one shared moment; this form says what
    that leaves out.
    """
    (mean_a, sum_a), (mean_b, sum_b) = first, second
    apart = mean_a - mean_b
    # (P_A⁻¹ + P_B⁻¹)⁻¹ = P_A (P_A + P_B)⁻¹ P_B
    return float(((apart @ sum_a @ torch.linalg.solve(sum_a + sum_b, sum_b)) * apart).sum())


def cluster_cost(gram: torch.Tensor, members: list[int]) -> float:
    """``J(C) = Σ_i G_ii - (1/|C|) Σ_ij G_ij``: error of the models in C around their mean."""
    part = gram[members][:, members]
    return float(part.diagonal().sum() - part.sum() / len(members))


def test_merge_cost_is_exact_with_a_moment_per_model() -> None:
    weights, hessians = family(5, 6, 8, 0), moments(5, 8, 1)
    ones = torch.ones(5, dtype=torch.float64)
    first, second = [0, 1, 4], [2, 3]
    whole = cost_of_one_weight(weights, hessians)
    parts = sum(cost_of_one_weight(weights[c], hessians[c]) for c in (first, second))
    sides = [hessian_mean(weights[c], hessians[c], ones[: len(c)]) for c in (first, second)]
    assert generalised_merge_cost(sides[0], sides[1]) == pytest.approx(whole - parts, rel=1e-10)


def test_merge_cost_is_ward_with_one_moment() -> None:
    weights, shared = family(5, 6, 8, 2), moments(1, 8, 3)
    first, second = [0, 3], [1, 2, 4]
    gram, energy = centred_gram(weights, shared[0])
    hessians = shared.expand(5, -1, -1)
    for members in ([0], first, second, list(range(5))):
        assert cluster_cost(gram, members) == pytest.approx(
            cost_of_one_weight(weights[members], hessians[members]), rel=1e-9, abs=1e-9
        )
    increase = cluster_cost(gram, first + second) - cluster_cost(gram, first) - cluster_cost(gram, second)
    assert merge_cost(gram, first, second) == pytest.approx(increase, rel=1e-10)
    direct = torch.einsum("mnk,kl,mnl->", weights, shared[0], weights) / 5
    assert energy == pytest.approx(float(direct), rel=1e-10)


def test_members_weigh_in_the_tree_as_they_do_in_its_nodes() -> None:
    """With weights, Ward's cost is the exact one of the weighted problem, and energies are those of its means."""
    weights, shared = family(4, 6, 8, 2), moments(1, 8, 3)
    omega, first, second = torch.tensor([3.0, 0.5, 1.0, 2.0], dtype=torch.float64), [0, 2], [1, 3]
    gram, energy = centred_gram(weights, shared[0])
    sides = [hessian_mean(weights[own], shared.expand(2, -1, -1), omega[own]) for own in (first, second)]
    exact = generalised_merge_cost(sides[0], sides[1])
    assert merge_cost(gram, first, second, omega) == pytest.approx(exact, rel=1e-9)
    assert merge_cost(gram, first, second) != pytest.approx(exact, rel=1e-2)
    tree = Tree.of(list("abcd"), [(frozenset("a"), frozenset("c")), (frozenset("b"), frozenset("d")),
                                  (frozenset("ac"), frozenset("bd"))])  # fmt: skip
    found = increments(tree, list("abcd"), gram, energy, omega)
    whole, own = hessian_mean(weights, shared.expand(4, -1, -1), omega)[0], sides[0][0]
    for node, apart in (("a", weights[0] - own), (tree.ids[tree.nodes.index(frozenset("ac"))], own - whole)):
        assert found[node] == pytest.approx(float(((apart @ shared[0]) * apart).sum()), rel=1e-9)


def test_quantizing_a_node_for_all_models_is_one_weighted_problem() -> None:
    weights, hessians = family(4, 6, 8, 4), moments(4, 8, 5)
    omega = torch.tensor([1.0, 0.5, 2.0, 1.5], dtype=torch.float64)
    target, total = hessian_mean(weights, hessians, omega)

    def error(candidate: torch.Tensor) -> float:
        apart = weights - candidate
        return float(torch.einsum("m,mnk,mkl,mnl->", omega, apart, hessians, apart))

    def reduced(candidate: torch.Tensor) -> float:
        return float((((target - candidate) @ total) * (target - candidate)).sum())

    one, other = torch.randn(6, 8, dtype=torch.float64), torch.zeros(6, 8, dtype=torch.float64)
    assert error(one) - error(other) == pytest.approx(reduced(one) - reduced(other), rel=1e-10)
    assert error(target) == pytest.approx(error(one) - reduced(one), rel=1e-9)


def test_increments_add_up_to_each_model() -> None:
    weights, shared = family(5, 6, 8, 6), moments(1, 8, 7)[0]
    names = list("abcde")
    gram, energy = centred_gram(weights, shared)
    tree = aggregate(names, gram)
    found = increments(tree, names, gram, energy)
    mean = weights.mean(0)
    assert found["root"] == pytest.approx(float(((mean @ shared) * mean).sum()), rel=1e-9)
    # Huygens: what the leaves and nodes add, weighted by their models, is the spread around the mean
    spread = sum(len(node) * found[tree.ids[p]] for p, node in enumerate(tree.nodes) if p)
    assert spread == pytest.approx(float(gram.diagonal().sum()), rel=1e-9)


def clustered_gram(generator: random.Random, count: int) -> torch.Tensor:
    """A family with a random hierarchy of differences, 4 x 12 weights each."""
    torch.manual_seed(generator.randrange(1 << 30))
    weights = torch.randn(4, 12, dtype=torch.float64).expand(count, -1, -1).clone()
    groups = [list(range(count))]
    while groups:
        group = groups.pop()
        weights[group] += 10 ** generator.uniform(-1.7, -0.4) * torch.randn(4, 12, dtype=torch.float64)
        if len(group) > 1:
            generator.shuffle(group)
            cut = generator.randrange(1, len(group))
            groups += [group[:cut], group[cut:]]
    return weights


def all_trees(names: list[str]) -> Iterator[Tree]:
    """Every rooted binary tree: 1, 1, 3, 15, 105 of them for 1 to 5 models."""

    def merges(sets: list[Members]) -> Iterator[list[tuple[Members, Members]]]:
        if len(sets) == 1:
            yield []
            return
        for a, b in itertools.combinations(sets, 2):
            rest = [s for s in sets if s not in (a, b)]
            for later in merges([*rest, a | b]):
                yield [(a, b), *later]

    seen = set()
    for each in merges([frozenset([name]) for name in names]):
        tree = Tree.of(names, each)
        if tree.nodes not in seen:
            seen.add(tree.nodes)
            yield tree


def phi(bits: int) -> float:
    return distortion(bits, 128)


CHOICE = Choice((0, 1, 2, 3, 4, 5, 6), (1, 2, 3, 4), phi)


def problem(tree: Tree, energy: dict[str, float]) -> Problem:
    weight = [1.0 if tree.is_leaf(p) else 0.0 for p in range(len(tree.nodes))]
    return Problem(tree, [energy[node] for node in tree.ids], weight, 1, 0.125)


def test_number_of_trees() -> None:
    assert [len(list(all_trees(list("abcde"[:m])))) for m in (1, 2, 3, 4, 5)] == [1, 1, 3, 15, 105]


@pytest.mark.parametrize("count", [3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_greedy_topology_is_within_three_percent_of_the_best(count: int) -> None:
    generator, names, ratios = random.Random(count), list("abcde"[:count]), []
    for _ in range(6 if count < 5 else 3):
        gram, energy = centred_gram(clustered_gram(generator, count), None)
        budget = 2.4 * count

        def value(tree: Tree, gram: torch.Tensor = gram, energy: float = energy, budget: float = budget) -> float:
            p = problem(tree, increments(tree, names, gram, energy))
            return p.error(allocate([p], CHOICE, budget)[0], phi)

        best = min(value(tree) for tree in all_trees(names))
        ratios.append(value(aggregate(names, gram)) / best)
    assert sum(ratios) / len(ratios) <= 1.03, ratios
    assert max(ratios) <= 1.06, ratios


@pytest.mark.parametrize("count", [2, 3, 4])
def test_allocation_is_optimal(count: int) -> None:
    """Against every allocation: exactly for a price, and for a budget within a thousandth."""
    generator, names = random.Random(10 + count), list("abcde"[:count])
    narrow = Choice((0, 1, 2, 3, 4), (1, 2, 3), phi)
    for _ in range(3):
        gram, energy = centred_gram(clustered_gram(generator, count), None)
        tree = aggregate(names, gram)
        p = problem(tree, increments(tree, names, gram, energy))
        widths = [narrow.of(p, position) for position in tree.preorder()]
        every = [(p.spent(bits), p.error(bits, phi)) for bits in itertools.product(*widths)]
        for price in (1e-3, 1e-2, 1e-1, 1.0):
            found = best_for_price(p, narrow, price)
            best = min(error + price * spent for spent, error in every)
            assert p.error(found, phi) + price * p.spent(found) == pytest.approx(best, rel=1e-9)
        for average in (2.0, 2.5, 3.2):
            best = min(error for spent, error in every if spent <= average * count * (1 + 1e-12))
            for solver in ("lagrange", "greedy"):
                (solved,) = allocate([p], narrow, average * count, solver)
                assert p.spent(solved) <= average * count * (1 + 1e-9)
                assert best / p.error(solved, phi) >= 0.999


def test_allocation_is_optimal_for_five_models() -> None:
    names = list("abcde")
    gram, energy = centred_gram(clustered_gram(random.Random(3), 5), None)
    tree = aggregate(names, gram)
    p = problem(tree, increments(tree, names, gram, energy))
    narrow = Choice((0, 2, 4), (1, 2), phi)
    widths = [narrow.of(p, position) for position in tree.preorder()]
    every = [(p.spent(bits), p.error(bits, phi)) for bits in itertools.product(*widths)]
    for average in (2.0, 2.4):
        best = min(error for spent, error in every if spent <= average * 5 * (1 + 1e-12))
        assert best / p.error(allocate([p], narrow, average * 5)[0], phi) >= 0.999


def test_without_a_floor_small_differences_are_merged_away() -> None:
    """Why ``min_leaf_bits`` is 1: error alone drops the leaves of close models."""
    names = list("abcd")
    tree = Tree.star(names)
    energy = {
        node: 1.0 if node == "root" else 1e-3 if len(tree.nodes[p]) == 1 else 0.0 for p, node in enumerate(tree.ids)
    }
    p = problem(tree, energy)
    free = allocate([p], Choice((0, 1, 2, 3, 4, 5, 6), (0, 1, 2, 3, 4), phi), 2.0 * 4)[0]
    leaves = [b for position, b in enumerate(free) if tree.is_leaf(position)]
    assert 0 in leaves
    held = allocate([p], CHOICE, 2.0 * 4)[0]
    assert all(b >= 1 for position, b in enumerate(held) if tree.is_leaf(position))


def test_a_model_whose_leaf_is_merged_away_keeps_the_root() -> None:
    """A matrix that hardly counts gets what is left over, and that is at least a bit at the root."""
    tree = Tree.star(list("abc"))
    leaf = [tree.is_leaf(p) for p in tree.preorder()]
    energy = [1.0 if p == 0 else 1e-3 if leaf[p] else 0.0 for p in tree.preorder()]
    cheap, dear = (
        Problem(tree, energy, [weight if each else 0.0 for each in leaf], 1, 0.125) for weight in (1e-9, 1.0)
    )
    choice = Choice((0, 1, 2, 4), (0, 1, 2), phi)
    for solver in ("lagrange", "greedy"):
        least, most = allocate([cheap, dear], choice, 2 * (1 + 0.125) + 2, solver)
        assert sum(least) == least[0] >= 1 and most[0] > 1
    with pytest.raises(ValueError, match="the smallest widths"):
        allocate([cheap, dear], choice, 2.0)


def test_order_of_models_does_not_matter() -> None:
    weights = clustered_gram(random.Random(7), 5)
    names = list("abcde")
    gram, _ = centred_gram(weights, None)
    for seed in range(4):
        order = random.Random(seed).sample(range(5), 5)
        shuffled, _ = centred_gram(weights[order], None)
        for linkage in ("ward", "average"):
            mixed = aggregate([names[i] for i in order], shuffled, linkage)  # type: ignore[arg-type]
            assert mixed == aggregate(names, gram, linkage)  # type: ignore[arg-type]


def test_clusters_are_found_by_every_linkage() -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 16, dtype=torch.float64)
    ways = [torch.randn(6, 16, dtype=torch.float64) for _ in range(2)]
    weights = torch.stack([base + 0.3 * ways[i % 2] + 0.05 * torch.randn(6, 16, dtype=torch.float64) for i in range(6)])
    gram, _ = centred_gram(weights, None)
    apart = (weights - base).flatten(1)
    for linkage in ("ward", "average", "cosine"):
        tree = aggregate(list("abcdef"), gram, linkage, apart @ apart.T)  # type: ignore[arg-type]
        assert {frozenset("ace"), frozenset("bdf")} <= set(tree.nodes)
