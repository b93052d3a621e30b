"""The pesf stage: what it accepts for which model, and the policy it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from llmcompress.errors import RecipeError
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.skipping import SkippingPolicy
from llmcompress.stages.pesf import Pesf, PesfConfig
from llmcompress.stages.state import RunState

CONFIGS = Path(__file__).parents[2] / "data" / "hub_configs"


def layout(name):
    return layout_from_config(json.loads((CONFIGS / f"{name}.json").read_text()))


def stage(**fields):
    return Pesf("prune", PesfConfig(**fields))


def run(which, model_layout):
    events = []
    state = RunState(model=SimpleNamespace(layout=model_layout))
    which.run(state, SimpleNamespace(emit=lambda kind, **data: events.append((kind, data))))
    return state, events


@pytest.mark.parametrize("alpha", [0.0, -0.1, 1.01])
def test_alpha_outside_its_range_is_refused(alpha):
    with pytest.raises(ValidationError, match="alpha"):
        PesfConfig(alpha=alpha)


def test_mixtral_rule():
    mixtral, olmoe = layout("mixtral_8x7b"), layout("olmoe_1b_7b")
    assert stage(alpha=0.3).check(mixtral) == [] and stage(alpha=0.3).warnings(mixtral) == []
    assert stage(alpha=0.5).check(mixtral) == [] and "0.5" in stage(alpha=0.5).warnings(mixtral)[0]
    assert "force: true" in stage(alpha=0.7).check(mixtral)[0]
    assert stage(alpha=0.7, force=True).check(mixtral) == []
    assert stage(alpha=0.7).check(olmoe) == [] and stage(alpha=0.7).warnings(olmoe) == []
    assert stage(alpha=0.7, method="top_k_minus_one").check(mixtral) == []


def test_a_model_without_experts_is_refused_before_and_at_run_time():
    dense = layout("smollm2_135m")
    assert "no experts" in stage().check(dense)[0]
    with pytest.raises(RecipeError, match="no experts"):
        run(stage(), dense)


def test_policy_is_plain_data_that_the_run_time_understands():
    state, events = run(stage(alpha=0.4, decode="sticky", keep_top1=True), layout("mixtral_8x7b"))
    policy = state.policies["pesf"]
    assert json.loads(json.dumps(policy)) == policy
    assert SkippingPolicy.from_dict(policy) == SkippingPolicy(alpha=0.4, decode="sticky", keep_top1=True)
    assert [kind for kind, _ in events] == ["warning"]


def test_restore_gives_the_same_policy():
    state, _ = run(stage(alpha=0.2), layout("olmoe_1b_7b"))
    again = RunState()
    stage(alpha=0.2).restore(again, SimpleNamespace())
    assert again.policies == state.policies


def test_words_that_yaml_reads_as_booleans():
    config = PesfConfig.model_validate({"decode": False, "renormalize": True})
    assert config.decode == "off" and config.renormalize == "yes"
    assert PesfConfig.model_validate({"renormalize": False}).renormalize == "no"
    with pytest.raises(ValidationError):
        PesfConfig.model_validate({"decode": True})
