from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli.app import invoke
from llmcompress.errors import InputError
from llmcompress.pipeline.cluster import ClusterRow, Rates, predict
from llmcompress.recipe.load import load_recipe

CONFIG = Path(__file__).resolve().parents[2] / "data" / "hub_configs" / "mixtral_8x7b.json"
RATES: dict[str, Any] = {
    "machine": "invented", "forward": 1e12, "hessian": 1e12, "solve": 1e11, "weights": 1e8, "read": 1e9, "link": 1e10,
    "message": 1e-4, "error": {"1": 0.1, "2": -0.2},
}  # fmt: skip


def rows(ranks: list[int], **changes: Any) -> list[ClusterRow]:
    loaded = load_recipe("eac_moe_mixtral", ["model.path=x"])
    rates = Rates(**{**RATES, **changes})
    return predict(loaded, json.loads(CONFIG.read_text()), "cpu", ranks, rates)["quantize"]


def test_work_is_divided_and_exchange_grows() -> None:
    one, two, eight, many = rows([1, 2, 8, 16])
    assert one.traffic == 0 and one.exchange == 0
    assert two.forward == pytest.approx(one.forward / 2) and eight.hessian == pytest.approx(one.hessian / 8)
    # 8 experts: a ninth process has none
    assert one.solve > two.solve > eight.solve
    assert many.solve == pytest.approx(eight.solve, rel=0.02)
    assert many.exchange > eight.exchange > two.exchange > 0
    assert one.read == many.read
    assert eight.ram < one.ram
    assert eight.process_hours == pytest.approx(8 * eight.seconds / 3600)


def test_traffic_is_that_of_the_hessians() -> None:
    config = json.loads(CONFIG.read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    # inputs of attention, of its output, and of every expert's two projections
    sums = layers * 4 * (2 * hidden**2 + 8 * (hidden**2 + inner**2))
    packed = rows([2])[0].traffic - sums
    assert 0.1 * 45e9 < packed < 0.5 * 45e9


def test_rates_must_be_rates(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    for content in ("", "{}", json.dumps({**RATES, "link": 0})):
        path.write_text(content)
        with pytest.raises(InputError, match="no file of rates"):
            Rates.load(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "eac_moe_mixtral", "model.path=x", "--config", str(CONFIG), "--device", "cpu"]
    assert invoke([*words, "--cluster", "1,two"]) == 2
    assert invoke([*words, "--cluster", "1,2"]) == 2
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(RATES))
    capsys.readouterr()
    assert invoke([*words, "--cluster", "1,2", "--rates", str(path), "--price", "2.5"]) == 0
    said = capsys.readouterr().out
    assert "hours paid" in said and "off by up to 20%" in said
    assert invoke([*words, "--cluster", "1,2", "--rates", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cluster"]
    assert [row["ranks"] for row in found["stages"]["quantize"]] == [1, 2]
