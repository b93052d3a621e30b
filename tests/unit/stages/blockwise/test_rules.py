from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from llmcompress.models.layout import Role
from llmcompress.quant.rules import AutoBits, HalfBits, LayerBits
from llmcompress.stages.blockwise.rules import RuleConfig, plain_rules


def bits(value: Any) -> Any:
    return RuleConfig.model_validate({"role": "experts", "bits": value}).rule("x").bits


def test_bit_plans_become_plain_values() -> None:
    assert bits(3) == 3
    assert bits({"first_half": 3, "second_half": 2}) == HalfBits(3, 2)
    assert bits({"default": 2, "layers": {"0": 4, 3: 8}}) == LayerBits(2, {0: 4, 3: 8})
    assert bits({"auto": 2.5}) == AutoBits(2.5, (2, 3, 4))
    assert bits({"auto": 3, "choices": [4, 2, 4]}) == AutoBits(3.0, (2, 4))


def test_roles_and_names() -> None:
    one, many, regex = plain_rules(
        {
            "one": RuleConfig(role=Role.MLP, bits=4),
            "many": RuleConfig.model_validate({"role": ["attention", "mlp"], "bits": 8, "symmetric": True}),
            "regex": RuleConfig(match=r"down_proj$", keep=True),
        }
    )
    assert (one.name, one.roles, one.match, one.group_size) == ("one", (Role.MLP,), None, 128)
    assert (many.roles, many.symmetric) == ((Role.ATTENTION, Role.MLP), True)
    assert (regex.match, regex.keep, regex.bits) == (r"down_proj$", True, None)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"role": "experts"}, "give bits"),
        ({"role": "experts", "bits": 4, "keep": True}, "give bits"),
        ({"bits": 4}, "either match or role"),
        ({"bits": 4, "role": "mlp", "match": "x"}, "either match or role"),
        ({"bits": 4, "match": "("}, "not a regular expression"),
        ({"bits": 5, "role": "mlp"}, "2, 3, 4 or 8"),
        ({"bits": 4, "role": "mlp", "group_size": 0}, "group_size must be positive"),
        ({"bits": 4, "role": "mlp", "group_size": -2}, "greater than or equal to -1"),
        ({"bits": 4, "role": "heads"}, "attention"),
        ({"bits": {"auto": 5}, "role": "mlp"}, "cannot be made of choices"),
        ({"bits": {"first_half": 3}, "role": "mlp"}, "second_half"),
        ({"bits": {0: 3, 1: 2}, "role": "mlp"}, r"layers\n +Field required"),
        ({"bits": 2.5, "role": "mlp"}, r"\{auto: 2.5\} spends them"),
        ({"bits": {"default": 2, "layers": {"-1": 4}}, "role": "mlp"}, "greater than or equal to 0"),
        ({"bits": 4, "role": "mlp", "bit": 3}, "Extra inputs"),
    ],
)
def test_mistakes_are_explained(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RuleConfig.model_validate(values)
