from __future__ import annotations

import json

import pytest

from llmcompress.errors import InputError
from llmcompress.models.quantization_config import from_json, to_json
from llmcompress.quant.spec import QuantSpec

PLAN = {"b": QuantSpec(4, 64, True), "a": QuantSpec(2, 128), "c": QuantSpec(2, 128)}
POLICIES = {"pesf": {"alpha": 0.3}}


def test_there_and_back() -> None:
    data = json.loads(json.dumps(to_json(PLAN, POLICIES)))
    assert from_json(data) == (PLAN, POLICIES)
    assert len(data["specs"]) == 2


def test_order_does_not_matter() -> None:
    assert json.dumps(to_json(PLAN, {})) == json.dumps(to_json(dict(reversed(PLAN.items())), {}))


def test_specs_that_differ_only_in_dense_rows_have_an_order() -> None:
    """The order of a set depends on the process: an artifact's bytes did, too."""
    plan = {str(rows): QuantSpec(8, -1, True, dense_rows=rows) for rows in (5, 0, 7, 2, 6, 1, 4, 3)}
    assert [spec.get("dense_rows", 0) for spec in to_json(plan, {})["specs"]] == list(range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"version": 2}, "version 2"),
        ({"version": None}, "version None"),
        ({"specs": [{"bits": 5}]}, "malformed"),
        ({"modules": {"a": 7}}, "malformed"),
        ({"modules": None}, "malformed"),
        ({"policies": {"pesf": 3}}, "malformed"),
    ],
)
def test_damage_is_named(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_json({**to_json(PLAN, POLICIES), **change})
