from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli.app import invoke
from llmcompress.cli.plan import process_numbers
from llmcompress.errors import InputError
from llmcompress.pipeline.cluster import ClusterRow, predict
from llmcompress.pipeline.rates import Rates
from llmcompress.recipe.load import load_recipe

CONFIGS = Path(__file__).resolve().parents[2] / "data" / "hub_configs"
CONFIG = CONFIGS / "mixtral_8x7b.json"
FAST = ((64.0, 1e12),)
RATES: dict[str, Any] = {
    "machine": "invented", "device": "cpu", "product": FAST, "attention": ((64.0, 1e15),), "moved": ((64.0, 1e15),),
    "hessian": FAST, "factor": FAST, "columns": ((64.0, 1e11),), "fit": FAST, "squares": 1e15, "routed": 1e15,
    "select": 1e15, "rounded": 1e8, "searched": 1e8, "packed": 1e15, "memory": 1e15, "read": 1e9, "disk": 1e15,
    "cache": 1e15, "written": 1e15, "flush": 1e-9, "batch": 1e-9, "piece": 1e-9, "matrix": 1e-9, "link": 1e10,
    "message": 1e-4, "start": 2.0, "join": 1.0, "error": {"1 processes": 0.1, "2 processes": -0.2},
}  # fmt: skip


def rows(ranks: list[int], overrides: tuple[str, ...] = (), **changes: Any) -> list[ClusterRow]:
    loaded = load_recipe("eac_moe_mixtral", ["model.path=x", *overrides])
    rates = Rates(**{**RATES, **changes})
    return predict(loaded, json.loads(CONFIG.read_text()), "cpu", ranks, rates)["quantize"]


def test_work_is_divided_and_exchange_grows() -> None:
    one, two, eight, many = rows([1, 2, 8, 16])
    assert one.traffic == 0 and one.exchange == 0
    # inputs of 8 that are kept, and on one process would be computed twice, may save more than the division
    assert eight.forward == pytest.approx(many.forward * 2, rel=0.01)
    assert one.forward / 8 >= eight.forward > one.forward / 16
    assert eight.hessian == pytest.approx(one.hessian / 8, rel=0.01)
    # one expert's second moments fill what may be held at once, so experts are solved one after another
    assert two.solve == pytest.approx(one.solve, rel=0.01) and many.solve == pytest.approx(eight.solve, rel=0.01)
    assert many.exchange > eight.exchange > two.exchange > 0
    assert two.read == many.read == pytest.approx(one.read + 1)
    assert eight.ram < one.ram
    assert eight.process_hours == pytest.approx(8 * eight.seconds / 3600)


def test_traffic_is_that_of_the_hessians() -> None:
    config = json.loads(CONFIG.read_text())
    hidden, inner, layers = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    # inputs of attention, of its output, and of every expert's two projections
    sums = layers * 4 * (2 * hidden**2 + 8 * (hidden**2 + inner**2))
    packed = rows([2], ("stages.quantize.router.calibrate=false",))[0].traffic - sums
    assert 0.1 * 45e9 < packed < 0.5 * 45e9


def test_rates_must_be_rates(tmp_path: Path) -> None:
    path = tmp_path / "rates.json"
    wrong = [{"link": 0}, {"columns": []}, {"hessian": [[64, 0]]}, {"product": 1e12}, {"device": "tpu"}]
    for content in ("", "{}", *(json.dumps({**RATES, **change}) for change in wrong)):
        path.write_text(content)
        with pytest.raises(InputError, match="no file of rates"):
            Rates.load(path)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["plan", "eac_moe_mixtral", "model.path=x", "--config", str(CONFIG), "--device", "cpu"]
    for wrong in ("1,two", "0", "1..x", "4..", ".."):
        assert invoke([*words, "--cluster", wrong]) == 2
    path = tmp_path / "rates.json"
    path.write_text(json.dumps(RATES))
    capsys.readouterr()
    assert invoke([*words, "--cluster", "1,2", "--rates", str(path), "--price", "2.5"]) == 0
    said = capsys.readouterr().out
    assert "hours paid" in said and "off by +10%, -20% on 1, 2 processes" in said
    monkeypatch.setenv("COLUMNS", "80")
    assert invoke([*words, "--cluster", "1..64", "--rates", str(path), "--price", "2.5"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("hours paid"))
    assert len(row.split()) == 9 and len(row) <= 80  # nothing is folded on a terminal of the usual width
    assert invoke([*words, "--cluster", "1,2", "--rates", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cluster"]
    assert [row["ranks"] for row in found["stages"]["quantize"]] == [1, 2]
    assert invoke([*words[:-1], "cuda", "--cluster", "1", "--rates", str(path)]) == InputError.exit_code


def test_training_is_not_given_the_time_of_quantizing(capsys: pytest.CaptureFixture[str]) -> None:
    # every stage of these recipes that trains runs on several processes as well
    assert invoke(["plan", "gptq_then_s2r", "--cluster", "1", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out)["cluster"]["stages"]) == {"quantize"}
    assert invoke(["plan", "s2r_tiny", "--cluster", "1"]) == 3
    assert "the time of no stage" in capsys.readouterr().err
    # so nobody is sent there in vain
    assert invoke(["plan", "s2r_tiny"]) == 0
    assert "--cluster" not in capsys.readouterr().err
    assert invoke(["plan", "quickstart"]) == 0
    assert "--cluster 1" in capsys.readouterr().err


def test_inputs_of_calibrated_routers_travel_to_the_first_process() -> None:
    without = rows([4], ("stages.quantize.router.calibrate=false",))[0].traffic
    tokens, hidden, layers = 128 * 2048, 4096, 32
    # of both streams
    assert rows([4])[0].traffic - without == 2 * tokens * hidden * 4 * layers * 3 // 4


@pytest.mark.parametrize(
    ("recipe", "config"), [("eac_moe_mixtral_8x22b", "mixtral_8x22b"), ("eac_moe_deepseek_v3", "deepseek_v3")]
)
def test_the_shipped_rates_predict_the_largest_models(
    recipe: str, config: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["plan", recipe, "model.path=x", "--config", str(CONFIGS / f"{config}.json"), "--device", "cpu"]
    assert invoke([*words, "--cluster", "1..64", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["cluster"]
    stages = found["stages"]["quantize"]
    assert [row["ranks"] for row in stages] == [1, 2, 4, 8, 16, 32, 64]
    # more processes help until traffic takes over, and cost more hours all along
    quickest = min(stages, key=lambda row: row["seconds"])
    assert 4 < quickest["ranks"] < 64
    assert all(a["process_hours"] < b["process_hours"] for a, b in pairwise(stages))
    assert all(a["ram"] >= b["ram"] for a, b in pairwise(stages))
    assert found["rates"]["machine"] and set(found["rates"]["error"]) == {"1 processes", "2 processes", "4 processes"}


def test_processes_are_listed_or_doubled() -> None:
    assert process_numbers("1,3, 8") == [1, 3, 8]
    assert process_numbers("1..64") == [1, 2, 4, 8, 16, 32, 64]
    assert process_numbers("3..13") == [3, 6, 12]


def test_routers_are_fitted_on_one_process_whatever_their_number() -> None:
    calibrated = [row.solve for row in rows([1, 8])]
    without = [row.solve for row in rows([1, 8], ("stages.quantize.router.calibrate=false",))]
    fits = [a - b for a, b in zip(calibrated, without)]
    # K = 8 covers all experts: logits three times, one sum of moments and one factor per block
    tokens, hidden = 128 * 2048, 4096
    work = 3 * 2 * tokens * 8 * hidden + 2 * 0.9 * tokens * hidden**2 + hidden**3
    assert fits == pytest.approx([32 * work / 1e12] * 2, rel=1e-3)
