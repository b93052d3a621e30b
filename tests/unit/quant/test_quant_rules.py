from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmcompress.errors import RecipeError
from llmcompress.models.layout import Role
from llmcompress.models.registry import layout_from_config
from llmcompress.quant.rules import (
    AutoBits,
    HalfBits,
    LayerBits,
    Rule,
    auto_units,
    deciding_rules,
    problems,
    resolve,
    stand_in_widths,
)

MIXTRAL = layout_from_config(
    {"model_type": "mixtral", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 5,
     "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
)  # fmt: skip
ATTENTION = Rule("attention", None, (Role.ATTENTION,), 4, 32)
EXPERTS = Rule("experts", None, (Role.EXPERTS,), 2, 32)


def rule(name: str = "r", **values: Any) -> Rule:
    return Rule(**{"name": name, "match": None, "roles": (), "bits": 4, **values})


def test_first_match_wins_and_unmatched_stays_dense() -> None:
    plan = resolve([rule("o", match=r"o_proj$", bits=8), rule("q", match="q_proj|o_proj", bits=3)], MIXTRAL)
    assert {name.rpartition(".")[2]: spec.bits for name, spec in plan.items()} == {"o_proj": 8, "q_proj": 3}
    assert len(plan) == 10


def test_keep_shields_weights_from_later_rules() -> None:
    plan = resolve([rule("first", match=r"layers\.0\.", keep=True, bits=None), EXPERTS], MIXTRAL)
    assert sorted({int(name.split(".")[2]) for name in plan}) == [1, 2, 3, 4]


def test_half_plan_gives_the_middle_layer_to_the_first_half() -> None:
    plan = resolve([rule(roles=(Role.EXPERTS,), bits=HalfBits(3, 2))], MIXTRAL)
    assert [plan[f"model.layers.{i}.mlp.experts.down_proj"].bits for i in range(5)] == [3, 3, 3, 2, 2]


def test_layer_plan() -> None:
    plan = resolve([rule(roles=(Role.EXPERTS,), bits=LayerBits(2, {1: 4, 4: 8}))], MIXTRAL)
    assert [plan[f"model.layers.{i}.mlp.experts.gate_up_proj"].bits for i in range(5)] == [2, 4, 2, 2, 8]


def test_spec_carries_group_size_and_symmetry() -> None:
    plan = resolve([rule(roles=(Role.ATTENTION,), bits=8, group_size=-1, symmetric=True)], MIXTRAL)
    spec = plan["model.layers.0.self_attn.q_proj"]
    assert (spec.bits, spec.group_size, spec.symmetric) == (8, -1, True)


def test_rules_without_effect_are_named() -> None:
    with pytest.raises(RecipeError, match=r"rules\.typo\.match: 'q_porj' matches no weight.*q_proj"):
        resolve([rule("typo", match="q_porj")], MIXTRAL)
    with pytest.raises(RecipeError, match=r"rules\.late: every weight it matches.*'attention'"):
        resolve([ATTENTION, rule("late", match="q_proj")], MIXTRAL)
    with pytest.raises(RecipeError, match=r"rules\.none\.role: this model has no shared_experts.*attention, experts"):
        resolve([rule("none", roles=(Role.SHARED_EXPERTS,))], MIXTRAL)
    small = {"vocab_size": 64, "hidden_size": 32, "num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}
    states = layout_from_config({"model_type": "mamba2", "num_hidden_layers": 1, **small})
    with pytest.raises(RecipeError, match=r"no attention weights; roles here: ssm \(recipes q_mamba_… are for these\)"):
        resolve([ATTENTION], states)
    with pytest.raises(RecipeError, match="the model has layers 0 to 4"):
        resolve([rule(roles=(Role.EXPERTS,), bits=LayerBits(2, {7: 4}))], MIXTRAL)
    with pytest.raises(RecipeError, match="nothing would be quantized"):
        resolve([rule(roles=(Role.EXPERTS,), keep=True, bits=None)], MIXTRAL)
    assert problems([ATTENTION, EXPERTS], MIXTRAL) == []
    assert len(problems([rule("a", match="zzz"), rule("b", match="yyy")], MIXTRAL)) == 2


def test_auto_units_keep_fused_weights_together() -> None:
    auto = rule("auto", roles=(Role.ATTENTION, Role.EXPERTS), bits=AutoBits(2.5))
    units = auto_units([rule("v", match="v_proj", bits=8), auto], MIXTRAL)[auto]
    assert [name.rpartition(".")[2] for name in units[0].names] == ["q_proj", "k_proj"]
    assert [len(unit.names) for unit in units[:4]] == [2, 1, 1, 1]
    assert units[2].parameters == 4 * 96 * 32
    assert {unit.block for unit in units} == set(range(5))


@pytest.mark.parametrize("average", [2.0, 2.25, 2.5, 3.0, 3.7, 4.0])
def test_stand_in_meets_the_budget(average: float) -> None:
    auto = rule("auto", roles=(Role.EXPERTS,), bits=AutoBits(average))
    units = auto_units([auto], MIXTRAL)[auto]
    widths = stand_in_widths(AutoBits(average), units)
    assert widths == {name: spec.bits for name, spec in resolve([auto], MIXTRAL).items()}
    spent = sum(widths[unit.names[0]] * unit.parameters for unit in units)
    assert average - 0.25 <= spent / sum(unit.parameters for unit in units) <= average


def test_chosen_widths_are_used() -> None:
    auto = rule("auto", match="experts", bits=AutoBits(3.0))
    names = [name for unit in auto_units([auto], MIXTRAL)[auto] for name in unit.names]
    chosen = {name: 2 + i % 3 for i, name in enumerate(names)}
    assert {name: spec.bits for name, spec in resolve([auto], MIXTRAL, chosen).items()} == chosen


@settings(max_examples=50)
@given(
    st.lists(st.sampled_from(["q_proj", r"layers\.[0-2]\.", "experts", "down_proj$", "k|v", "self_attn"]), max_size=4)
)
def test_decisions_equal_a_plain_search(patterns: list[str]) -> None:
    rules = [rule(f"r{i}", match=pattern) for i, pattern in enumerate(patterns)]
    decided = deciding_rules(rules, MIXTRAL)
    for name, *_ in MIXTRAL.quantizable():
        expected = next((r for r, p in zip(rules, patterns) if re.search(p, name)), None)
        assert decided.get(name) == expected
