"""Rules: which weight gets how many bits. The only place that matches names, for recipes and estimates alike.

Rules are tried in order and the first that matches a weight decides about it; a weight that no rule
matches stays dense. Torch-free.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING

from llmcompress.errors import RecipeError
from llmcompress.quant.spec import QuantPlan, QuantSpec

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout, Role


@dataclass(frozen=True, slots=True)
class HalfBits:
    """One width for the first half of the layers, another for the rest (EAC-MoE, appendix A.5).

    With an odd number of layers the middle one belongs to the first half.
    """

    first_half: int
    second_half: int


@dataclass(frozen=True, slots=True)
class LayerBits:
    """A default width and exceptions by layer index."""

    default: int
    layers: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class AutoBits:
    """An average-bit budget spent by measured error.

    Attributes:
        average: Mean code bits per weight over everything the rule matches.
        choices: Allowed widths.
    """

    average: float
    choices: tuple[int, ...] = (2, 3, 4)


BitPlan = int | HalfBits | LayerBits | AutoBits


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        name: Key in the recipe, used in messages.
        match: Regular expression searched in the plan name, or None.
        roles: Roles that match, empty when ``match`` is used.
        bits: Bit plan; None with ``keep``.
        group_size, symmetric: As in :class:`QuantSpec`.
        keep: Leave the matched weights dense.
    """

    name: str
    match: str | None
    roles: tuple[Role, ...]
    bits: BitPlan | None
    group_size: int = 128
    symmetric: bool = False
    keep: bool = False

    def matches(self, name: str, role: Role) -> bool:
        """Whether this rule applies to the weight ``name``."""
        if self.match is not None:
            return re.search(self.match, name) is not None
        return role in self.roles

    def spec(self, bits: int) -> QuantSpec:
        """Spec with the given width."""
        return QuantSpec(bits=bits, group_size=self.group_size, symmetric=self.symmetric)


@dataclass(frozen=True, slots=True)
class AutoUnit:
    """Weights that must get the same width, because run times fuse them (q, k, v; gate, up; one expert bank).

    Attributes:
        names: Plan names.
        parameters: Number of weights.
        block: Index of their block.
    """

    names: tuple[str, ...]
    parameters: int
    block: int


def deciding_rules(rules: Sequence[Rule], layout: ModelLayout) -> dict[str, Rule]:
    """Plan name → the rule that decides about it, for every weight that some rule matches."""
    decided = {}
    for name, role, _, _ in layout.quantizable():
        rule = next((r for r in rules if r.matches(name, role)), None)
        if rule is not None:
            decided[name] = rule
    return decided


def problems(rules: Sequence[Rule], layout: ModelLayout) -> list[str]:
    """Rules that cannot take effect on this model, one message each; empty when all is well."""
    weights = [(name, role) for name, role, _, _ in layout.quantizable()]
    decided = deciding_rules(rules, layout)
    used = {rule.name for rule in decided.values()}
    found = []
    for rule in rules:
        if rule.name not in used:
            found.append(_why_unused(rule, rules, weights))
        if isinstance(rule.bits, LayerBits):
            beyond = sorted(i for i in rule.bits.layers if not 0 <= i < len(layout.blocks))
            if beyond:
                found.append(
                    f"rules.{rule.name}.bits.layers: the model has layers 0 to {len(layout.blocks) - 1}, no {beyond}"
                )
    if rules and all(rule.keep for rule in rules):
        found.append("rules: every rule keeps its weights dense, so nothing would be quantized")
    return found


def resolve(rules: Sequence[Rule], layout: ModelLayout, chosen: Mapping[str, int] | None = None) -> QuantPlan:
    """The spec of every weight that is to be quantized.

    Args:
        rules: Rules in order, first match wins.
        layout: The model.
        chosen: Plan name → width for weights under an ``auto`` plan. Where it is None, a stand-in
            assignment of the same size is used (wider codes in the first layers), good enough for estimates.

    Raises:
        RecipeError: A rule matches nothing; the message names it and the nearest weights.
    """
    found = problems(rules, layout)
    if found:
        raise RecipeError("\n".join(found), "llmcompress inspect MODEL lists the names of all weights")
    decided = deciding_rules(rules, layout)
    if chosen is None:
        chosen = {}
        for rule, units in auto_units(rules, layout).items():
            chosen.update(stand_in_widths(_auto(rule), units))
    plan: QuantPlan = {}
    kept_rows = layout.kept_rows
    for name, _, _, block in layout.quantizable():
        rule_here = decided.get(name)
        if rule_here is None or rule_here.keep:
            continue
        spec = rule_here.spec(_width(rule_here, name, block, len(layout.blocks), chosen))
        plan[name] = replace(spec, dense_rows=kept_rows.get(name, 0))
    return plan


def auto_units(rules: Sequence[Rule], layout: ModelLayout) -> dict[Rule, list[AutoUnit]]:
    """Rules with an ``auto`` bit plan and the units whose width is to be chosen, in block order."""
    decided = deciding_rules(rules, layout)
    sizes = {name: prod(shape) for name, _, shape, _ in layout.quantizable()}
    found: dict[Rule, list[AutoUnit]] = {r: [] for r in rules if isinstance(r.bits, AutoBits)}
    for block in layout.blocks:
        fused = [tuple(linear.name for linear in group.linears) for sub in block.sublayers for group in sub.groups]
        if block.bank is not None:
            fused += [(block.bank.gate_up,), (block.bank.down,)]
        for names in fused:
            for rule, units in found.items():
                mine = tuple(name for name in names if decided.get(name) == rule)
                if mine:
                    units.append(AutoUnit(mine, sum(sizes[name] for name in mine), block.index))
    return found


def stand_in_widths(auto: AutoBits, units: Iterable[AutoUnit]) -> dict[str, int]:
    """Widths that meet the budget as closely as possible without any measurement: wider codes first in order."""
    units = list(units)
    total = sum(unit.parameters for unit in units)
    narrow = max((c for c in auto.choices if c <= auto.average), default=min(auto.choices))
    wide = min((c for c in auto.choices if c >= auto.average), default=max(auto.choices))
    spare = (auto.average - narrow) * total
    widths = {}
    for unit in units:
        extra = (wide - narrow) * unit.parameters
        width = wide if 0 < extra <= spare else narrow
        spare -= extra if width == wide else 0
        widths.update(dict.fromkeys(unit.names, width))
    return widths


def _auto(rule: Rule) -> AutoBits:
    assert isinstance(rule.bits, AutoBits)
    return rule.bits


def _width(rule: Rule, name: str, block: int, blocks: int, chosen: Mapping[str, int]) -> int:
    bits = rule.bits
    if isinstance(bits, int):
        return bits
    if isinstance(bits, HalfBits):
        return bits.first_half if 2 * block < blocks else bits.second_half
    if isinstance(bits, LayerBits):
        return bits.layers.get(block, bits.default)
    return chosen[name]


def _why_unused(rule: Rule, rules: Sequence[Rule], weights: Sequence[tuple[str, Role]]) -> str:
    mine = [name for name, role in weights if rule.matches(name, role)]
    if mine:
        earlier = next(r.name for r in rules if any(r.matches(n, role) for n, role in weights if n == mine[0]))
        return (
            f"rules.{rule.name}: every weight it matches is already decided by rule {earlier!r}: move it further up "
            f"(on the command line: +stages.STAGE.rules.{rule.name}@{earlier}=…)"
        )
    if rule.match is None:
        present = sorted({role.value for _, role in weights})
        wanted = ", ".join(role.value for role in rule.roles)
        text = f"rules.{rule.name}.role: this model has no {wanted} weights; roles here: {', '.join(present)}"
        return f"{text} (recipes q_mamba_… are for these)" if present == ["ssm"] else text
    literal = re.sub(r"\\(.)|[\^$*+?()\[\]{}|]", lambda m: m.group(1) or "", rule.match)
    shapes = dict.fromkeys(re.sub(r"\.\d+\.", ".N.", name) for name, _ in weights)
    near = sorted(shapes, key=lambda s: -_similarity(literal, s))[:3]
    return f"rules.{rule.name}.match: {rule.match!r} matches no weight; the nearest are {', '.join(near)}"


def _similarity(wanted: str, name: str) -> float:
    """Similarity of a pattern to a name or to any dotted tail of it."""
    parts = name.split(".")
    tails = [".".join(parts[i:]) for i in range(len(parts))] + parts
    return max(difflib.SequenceMatcher(None, wanted.strip("."), tail).ratio() for tail in tails)
