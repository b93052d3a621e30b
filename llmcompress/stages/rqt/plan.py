"""From a survey to trees and bits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from llmcompress.algorithms.grids import distortion
from llmcompress.algorithms.residual_tree import member_importance
from llmcompress.algorithms.tree_allocation import Choice, Problem, allocate
from llmcompress.algorithms.tree_topology import aggregate, increments
from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.family import FamilyPlan
from llmcompress.quant.tree import Tree, by_level

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.family import ModelFamily
    from llmcompress.stages.rqt.importance import Felt
    from llmcompress.stages.rqt.stage import RqtConfig
    from llmcompress.stages.rqt.survey import MatrixFacts, Survey

# deltas beyond this share of the weights' energy leave little to share; below the other, a coarse root drowns them
LARGE_DELTA, SMALL_DELTA = 0.2, 1e-3


def make_plan(
    config: RqtConfig, family: ModelFamily, survey: Survey, felt: Felt | None = None
) -> tuple[FamilyPlan, dict[str, Any]]:
    """Choose trees and bits.

    Args:
        config: Settings.
        family: Base and members.
        survey: What is known of their weights.
        felt: What members' losses feel of their weights; without it errors count relative to each weight's output.

    Returns:
        The plan, and facts for the report: pairwise distances, node energies, warnings.
    """
    names = survey.members
    shapes, keys = _weights(config, family)
    trees = {
        key: _tree(config, survey, [name for name in shapes if keys[name] == key])
        for key in dict.fromkeys(keys.values())
    }
    main = trees["model"] if "model" in trees else _tree(config, survey, list(shapes))
    omega = weights_of(config, survey)
    energies = {
        name: increments(
            trees[keys[name]], names, _matrix(survey.matrices[name].gram), survey.matrices[name].energy, omega
        )
        for name in shapes
    }
    if config.bits.mode == "preset":
        bits = {name: dict(by_level(trees[keys[name]], config.bits.preset)) for name in shapes}
    else:
        bits = _allocated(config, survey, felt or {}, shapes, keys, trees, energies)
    bits = {name: {node: b for node, b in chosen.items() if b} for name, chosen in bits.items()}
    plan = FamilyPlan(main.leaves, config.group_size, trees, keys, shapes, bits)
    facts = _facts(survey, shapes, main, energies)
    facts["warnings"] = _warnings(config, survey, shapes, plan)
    return plan, facts


def _weights(config: RqtConfig, family: ModelFamily) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Shapes of the weights in the trees, and the key of each one's tree."""
    shapes, keys = {}, {}
    for block in family.layout.blocks:
        for linear in block.linears():
            shapes[linear.name] = (linear.out_features, linear.in_features)
            keys[linear.name] = {"model": "model", "layer": block.name, "matrix": linear.name}[config.tree.scope]
    return shapes, keys


def _tree(config: RqtConfig, survey: Survey, linears: list[str]) -> Tree:
    """One tree over several weights: distances are added up relative to each weight's own energy."""
    import torch

    count = len(survey.members)
    gram = torch.zeros(count, count, dtype=torch.float64)
    deltas = torch.zeros_like(gram)
    for name in linears:
        facts = survey.matrices[name]
        if facts.energy > 0:
            gram += _matrix(facts.gram) / facts.energy
            deltas += _matrix(facts.deltas) / facts.energy
    return aggregate(survey.members, gram, config.tree.linkage, deltas, weights_of(config, survey))


def weights_of(config: RqtConfig, survey: Survey) -> Tensor:
    """The recipe's weights of the members, fp64 in the survey's order."""
    import torch

    return torch.tensor([config.members[name].weight for name in survey.members], dtype=torch.float64)


def _matrix(rows: list[list[float]]) -> Tensor:
    import torch

    return torch.tensor(rows, dtype=torch.float64)


def _allocated(
    config: RqtConfig,
    survey: Survey,
    felt: Felt,
    shapes: dict[str, tuple[int, int]],
    keys: dict[str, str],
    trees: dict[str, Tree],
    energies: dict[str, dict[str, float]],
) -> dict[str, dict[str, int]]:
    members = len(survey.members)
    problems = []
    for name, (rows, columns) in shapes.items():
        tree, facts = trees[keys[name]], survey.matrices[name]
        # from the codec, so that padding of rows to whole words is paid for too
        prices = {
            width: 8.0 * delta_tree.nbytes((rows, columns), delta_tree.node_spec(width, config.group_size))
            for width in config.bits.widths
            if width
        }
        scale = 1.0 / facts.energy if facts.energy > 0 else 0.0
        energy = [energies[name][node] * scale for node in tree.ids]
        omega = dict(zip(survey.members, importance(config, survey, felt, name)))
        weight = [omega[next(iter(node))] if len(node) == 1 else 0.0 for node in tree.nodes]
        problems.append(Problem(tree, energy, weight, rows * columns, 0.0, prices))
    widths = sorted(set(config.bits.widths))
    leaf = tuple(w for w in widths if w >= config.bits.min_leaf_bits)
    phi = {width: distortion(width, config.group_size) for width in {0, *widths}}
    choice = Choice(tuple(sorted({0, *widths})), leaf, phi.__getitem__)
    budget = config.bits.budget * members * sum(n * k for n, k in shapes.values())
    found = allocate(problems, choice, budget, config.bits.solver)
    return {name: dict(zip(problem.tree.ids, bits)) for name, problem, bits in zip(shapes, problems, found)}


def importance(config: RqtConfig, survey: Survey, felt: Felt, linear: str) -> list[float]:
    """Weight of each member's error in one weight, which comes relative to the members' mean energy.

    With ``felt``: what the member's loss feels of an error relative to its own energy. Without: that error itself. Both
    times the recipe's weight.
    """
    facts = survey.matrices[linear]
    relative = member_importance(facts.member_energy)
    if felt:
        own = [facts.energy / energy if energy > 0 else 0.0 for energy in facts.member_energy]
        relative = [felt[name][linear] * share for name, share in zip(survey.members, own)]
    return [value * config.members[name].weight for name, value in zip(survey.members, relative)]


def distances(facts: list[MatrixFacts]) -> list[list[float]]:
    """Relative distance ``‖W_i - W_j‖ / ‖W‖`` over several weights, M × M."""
    import torch

    if not facts:
        return []
    gram = torch.stack([_matrix(each.plain) for each in facts]).sum(0)
    energy = sum(each.plain_energy for each in facts)
    diagonal = gram.diagonal()
    squared = (diagonal[:, None] + diagonal[None, :] - 2 * gram).clamp(min=0)
    return [[math.sqrt(float(v) / energy) if energy > 0 else 0.0 for v in row] for row in squared]


def _facts(
    survey: Survey, shapes: dict[str, tuple[int, int]], main: Tree, energies: dict[str, dict[str, float]]
) -> dict[str, Any]:
    """What the report shows."""
    import torch

    matrices = [survey.matrices[name] for name in shapes]
    deltas = torch.stack([_matrix(each.deltas) for each in matrices]).sum(0)
    size = deltas.diagonal().clamp(min=1e-300).sqrt()
    whole = sum(each.energy for each in matrices) or 1.0
    return {
        "members": list(survey.members),
        "distance": distances(matrices),
        "delta_cosine": (deltas / (size[:, None] * size[None, :])).tolist(),
        "delta_energy": (deltas.diagonal() / whole).tolist(),
        "equal_weights": [name for name in shapes if survey.matrices[name].equal],
        "tree": main.to_dict(),
        "node_energy": {
            node: sum(each.get(node, 0.0) for each in energies.values()) / whole for node in main.ids
        },
    }  # fmt: skip


def _warnings(config: RqtConfig, survey: Survey, shapes: dict[str, tuple[int, int]], plan: FamilyPlan) -> list[str]:
    found = []
    facts = _facts(survey, shapes, plan.trees.get("model") or next(iter(plan.trees.values())), {})
    for name, share in zip(survey.members, facts["delta_energy"]):
        if share > LARGE_DELTA:
            found.append(f"{name} differs from the base by {share:.0%} of its energy: sharing will save little")
        elif 0 < share < SMALL_DELTA and config.bits.mode == "preset":
            found.append(f"{name} differs from the base by {share:.2%} of its energy: give the root 5 or 6 bits")
    for index, name in enumerate(survey.members):
        ranks = [survey.matrices[linear].low_rank[index] for linear in shapes]
        smaller = [
            16 * rank * (n + k) < config.bits.min_leaf_bits * n * k
            for rank, (n, k) in zip(ranks, shapes.values()) if rank
        ]  # fmt: skip
        if smaller and len(smaller) == sum(1 for r in ranks if r) == len(ranks) and all(smaller):
            found.append(f"{name} is the base plus an adapter of rank {max(ranks)}: the adapter is smaller than a leaf")
    return found
