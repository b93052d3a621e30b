from __future__ import annotations

import json
import math

import pytest
from pydantic import ValidationError

from llmcompress.errors import RecipeError
from llmcompress.evaluation.gates import GateConfig, failed, judge, unknown_metrics
from llmcompress.stages.state import Metric

METRICS = [
    Metric("heldout", "perplexity", 10.0, 10.5),
    Metric("piqa", "acc", 0.80, 0.77),
    Metric("fidelity", "kl", None, 0.04),
]


@pytest.mark.parametrize(
    ("metric", "limit", "passed"),
    [
        ("heldout.perplexity", {"max_rel_increase": 0.05}, True),
        ("heldout.perplexity", {"max_rel_increase": 0.04}, False),
        ("heldout.perplexity", {"max": 10.5}, True),
        ("heldout.perplexity", {"max": 10.4}, False),
        ("piqa.acc", {"max_abs_drop": 0.031}, True),
        ("piqa.acc", {"max_abs_drop": 0.02}, False),
        ("piqa.acc", {"min": 0.77}, True),
        ("piqa.acc", {"min": 0.78}, False),
        ("fidelity.kl", {"max": 0.03}, False),
    ],
)
def test_limits(metric, limit, passed):
    (result,) = judge({"g": GateConfig(metric=metric, **limit)}, METRICS)
    assert result.passed is passed
    assert "g" in result.message and metric in result.message


def test_improvement_always_passes_and_nan_never_does():
    better = [Metric("a", "perplexity", 10.0, 9.0), Metric("b", "perplexity", 10.0, math.nan)]
    gates = {
        "a": GateConfig(metric="a.perplexity", max_rel_increase=0),
        "b": GateConfig(metric="b.perplexity", max=1e9),
    }
    assert [r.passed for r in judge(gates, better)] == [True, False]


def test_dense_of_zero():
    metrics = [Metric("a", "kl", 0.0, 0.0), Metric("b", "kl", 0.0, 0.1)]
    gates = {n: GateConfig(metric=f"{n}.kl", max_rel_increase=0.5) for n in "ab"}
    assert [r.passed for r in judge(gates, metrics)] == [True, False]


def test_unknown_metric_is_a_recipe_error_with_a_suggestion():
    with pytest.raises(RecipeError, match=r"did you mean heldout\.perplexity") as caught:
        judge({"g": GateConfig(metric="heldout.perplexty", max=1)}, METRICS)
    assert caught.value.exit_code == 3
    assert unknown_metrics({"g": GateConfig(metric="held.ppl", max=1)}, ["heldout.perplexity"]) != []
    assert unknown_metrics({"g": GateConfig(metric="piqa.acc_norm", max=1)}, [], ["piqa"]) == []


def test_relative_gate_without_dense_value_is_refused():
    with pytest.raises(RecipeError, match="no dense value"):
        judge({"g": GateConfig(metric="fidelity.kl", max_rel_increase=0.1)}, METRICS)


def test_exactly_one_limit():
    for limits in ({}, {"max": 1.0, "min": 0.0}):
        with pytest.raises(ValidationError, match="exactly one"):
            GateConfig(metric="a.b", **limits)


def test_failed_reads_what_a_stage_recorded(tmp_path):
    assert failed(tmp_path) == []
    rows = [{"gate": "a", "passed": True, "message": "fine"}, {"gate": "b", "passed": False, "message": "too high"}]
    (tmp_path / "gates.json").write_text(json.dumps(rows))
    assert failed(tmp_path) == ["too high"]
