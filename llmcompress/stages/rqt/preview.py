"""What a tree over fine-tunes would be, from their weights alone: no text, no run, nothing is written.

Distances are plain ones and errors are the allocation's prediction, which knows Gaussian rounding and nothing of GPTQ
or activations: they rank budgets and show which members sharing will hurt. A run measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llmcompress.algorithms.grids import distortion
from llmcompress.algorithms.tree_allocation import Problem
from llmcompress.algorithms.tree_topology import increments
from llmcompress.stages.rqt.plan import make_plan, weights_of
from llmcompress.stages.rqt.survey import MatrixFacts, Survey, matrix_facts

if TYPE_CHECKING:
    from llmcompress.models.family import ModelFamily
    from llmcompress.quant.family import FamilyPlan
    from llmcompress.stages.rqt.stage import RqtConfig


@dataclass(frozen=True, slots=True)
class BudgetRow:
    """What one budget is predicted to give.

    Attributes:
        budget: Stored bits per weight and member that were allowed.
        bits: Those that the allocation takes.
        error: Member → predicted squared error of its weights, relative to their energy, mean over matrices.
        lost: Member → the same relative to the energy of its difference to the base; None without a difference. At
            1 and above little of the fine-tune is left.
    """

    budget: float
    bits: float
    error: dict[str, float]
    lost: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class Preview:
    """What is known of a family before a run.

    Attributes:
        plan: Tree and bits under the recipe's own setting.
        facts: ``distance``, ``delta_energy``, ``delta_cosine`` … as the stage keeps them.
        warnings: What the stage would warn of.
        budgets: Predictions, in order of the budgets; the recipe's own setting first.
    """

    plan: FamilyPlan
    facts: dict[str, Any]
    warnings: list[str]
    budgets: list[BudgetRow]


def survey_weights(family: ModelFamily) -> Survey:
    """Inner products between members for every linear, one matrix of all members in memory at a time."""
    names = [linear.name for block in family.layout.blocks for linear in block.linears()]
    return Survey(tuple(family.members), {name: MatrixFacts(**matrix_facts(family, name, None)) for name in names})


def preview(config: RqtConfig, family: ModelFamily, budgets: Sequence[float]) -> Preview:
    """Survey the weights and predict what budgets give.

    Args:
        config: The stage's section; its calibration is not used.
        family: Base and members.
        budgets: Stored bits per weight and member to look at beside the recipe's own setting, each above
            ``config.least_budget``.
    """
    tree = config.tree.model_copy(update={"similarity": "plain"})
    bits = config.bits.model_copy(update={"importance": "relative"})
    plain = config.model_copy(update={"tree": tree, "bits": bits})
    survey = survey_weights(family)
    plan, facts = make_plan(plain, family, survey)
    rows = [_row(plain, survey, plan, bits.budget if bits.mode == "auto" else plan.linear_bits())]
    for budget in budgets:
        other = plain.model_copy(update={"bits": bits.model_copy(update={"mode": "auto", "budget": budget})})
        rows.append(_row(other, survey, make_plan(other, family, survey)[0], budget))
    return Preview(plan, facts, facts.pop("warnings"), rows)


def _row(config: RqtConfig, survey: Survey, plan: FamilyPlan, budget: float) -> BudgetRow:
    import torch

    error = dict.fromkeys(survey.members, 0.0)
    apart = dict.fromkeys(survey.members, 0.0)
    widths = {0, *(width for chosen in plan.bits.values() for width in chosen.values())}
    phi = {width: distortion(width, config.group_size) for width in widths}
    omega = weights_of(config, survey)
    for name, (rows, columns) in plan.shapes.items():
        tree, facts = plan.tree(name), survey.matrices[name]
        if facts.energy <= 0:
            continue
        found = increments(tree, survey.members, torch.tensor(facts.gram, dtype=torch.float64), facts.energy, omega)
        energy = [found[node] / facts.energy for node in tree.ids]
        chosen = tuple(plan.bits[name].get(node, 0) for node in tree.ids)
        for index, member in enumerate(survey.members):
            weight = [float(node == frozenset({member})) for node in tree.nodes]
            error[member] += Problem(tree, energy, weight, rows * columns, 0.0).error(chosen, phi.__getitem__)
            apart[member] += facts.deltas[index][index] / facts.energy
    count = len(plan.shapes)
    lost = {name: error[name] / apart[name] if apart[name] > 0 else None for name in survey.members}
    return BudgetRow(budget, plan.linear_bits(), {name: value / count for name, value in error.items()}, lost)
