"""Recipe fields that all quantizing stages share: rules with their bit plans."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, field_validator, model_validator

from llmcompress.models.layout import Role
from llmcompress.quant.rules import AutoBits, BitPlan, HalfBits, LayerBits, Rule
from llmcompress.section import Section

Width = Literal[2, 3, 4, 8]


class HalfBitsConfig(Section):
    """Two widths: "2.5 bit" of the EAC-MoE paper is ``{first_half: 3, second_half: 2}``."""

    first_half: Width
    """Bits in the first half of the layers (the middle layer included)."""
    second_half: Width
    """Bits in the other layers."""


class LayerBitsConfig(Section):
    """A default width and exceptions by layer."""

    default: Width
    """Bits of the layers that are not listed."""
    layers: dict[Annotated[int, Field(ge=0)], Width]
    """Layer index → bits."""


class AutoBitsConfig(Section):
    """An average-bit budget that is spent where measured error falls most."""

    auto: Annotated[float, Field(ge=2, le=8)]
    """Average code bits over all weights of the rule (scales and zero points come on top)."""
    choices: tuple[Width, ...] = (2, 3, 4)
    """Widths to choose from."""

    @model_validator(mode="after")
    def _reachable(self) -> Self:
        if not self.choices or not min(self.choices) <= self.auto <= max(self.choices):
            raise ValueError(f"an average of {self.auto:g} bits cannot be made of choices {list(self.choices)}")
        return self


def _bit_plan_kind(value: Any) -> str:
    """Which form of bit plan a recipe value is, so that messages speak of that form only."""
    keys = set(value) if isinstance(value, dict) else set(getattr(value, "model_fields_set", ()))
    if not keys:
        return "width"
    if keys & {"auto", "choices"}:
        return "auto"
    # numbers were meant as layers
    return "layers" if keys & {"default", "layers"} or all(isinstance(key, int) for key in keys) else "halves"


def _whole(value: Any) -> Any:
    """Widths as they are; half a bit is a plan, and this says which.

    Raises:
        ValueError: The value is a fraction.
    """
    if isinstance(value, float) and not value.is_integer():
        raise ValueError(f"{value:g} bits are an average: {{auto: {value:g}}} spends them where errors fall most")
    return value


BitsField = Annotated[
    Annotated[Width, Tag("width")]
    | Annotated[HalfBitsConfig, Tag("halves")]
    | Annotated[LayerBitsConfig, Tag("layers")]
    | Annotated[AutoBitsConfig, Tag("auto")],
    Discriminator(_bit_plan_kind),
    BeforeValidator(_whole),
]


class RuleConfig(Section):
    """Which weights, and how they are quantized. The first rule that matches a weight decides about it."""

    match: str | None = None
    """Regular expression searched in the weight's run-time name, e.g. ``layers\\.0\\.mlp``."""
    role: Role | tuple[Role, ...] | None = None
    """Role or roles of the weights: attention, mlp, experts, shared_experts, ssm."""
    bits: BitsField | None = None
    """Code width: 2, 3, 4, 8, or a plan over the layers."""
    group_size: Annotated[int, Field(ge=-1)] = 128
    """Columns that share a scale; -1 for one scale per row."""
    symmetric: bool = False
    """Centred grid without zero points."""
    keep: bool = False
    """Leave these weights dense."""

    @field_validator("match")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        if value is not None:
            try:
                re.compile(value)
            except re.error as error:
                raise ValueError(f"not a regular expression: {error}") from error
        return value

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("group_size must be positive, or -1 for one group per row")
        return value

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if (self.match is None) == (self.role is None):
            raise ValueError("give either match or role")
        if (self.bits is None) != self.keep:
            raise ValueError("give bits, or keep: true to leave the weights dense")
        return self

    def rule(self, name: str) -> Rule:
        """This rule as the plain value that ``quant.rules`` works with."""
        roles = () if self.role is None else (self.role,) if isinstance(self.role, Role) else tuple(self.role)
        return Rule(name, self.match, roles, _plain(self.bits), self.group_size, self.symmetric, self.keep)


RulesField = Annotated[dict[str, RuleConfig], Field(min_length=1)]


def plain_rules(rules: dict[str, RuleConfig]) -> tuple[Rule, ...]:
    """The rules of a stage in recipe order."""
    return tuple(config.rule(name) for name, config in rules.items())


def _plain(bits: BitsField | None) -> BitPlan | None:
    if isinstance(bits, HalfBitsConfig):
        return HalfBits(bits.first_half, bits.second_half)
    if isinstance(bits, LayerBitsConfig):
        return LayerBits(bits.default, dict(bits.layers))
    if isinstance(bits, AutoBitsConfig):
        return AutoBits(bits.auto, tuple(sorted(set(bits.choices))))
    return bits
