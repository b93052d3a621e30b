from __future__ import annotations

import json
from pathlib import Path

import pytest

from llmcompress.report.data import collect, number, read_events, safetensors_header


def test_everything_is_found(run_dir: Path) -> None:
    data = collect(run_dir)
    assert data.name == "eac_moe_reference"
    assert data.model == "reference-moe"
    assert data.finished
    assert [stage.name for stage in data.stages] == ["load", "calibrate", "quantize", "skip", "evaluate", "export"]
    quantize = data.stages[2]
    assert [block.index for block in quantize.blocks] == list(range(12))
    assert quantize.seconds == pytest.approx(27.4)
    assert quantize.peak_bytes == 612e6
    assert len(quantize.blocks[0].errors) == 6
    assert data.metrics[0].relative == pytest.approx(25.961 / 24.118 - 1)
    assert [gate["gate"] for gate in data.gates] == ["quality"]
    assert len(data.samples) == 2
    assert [(row["stage"], row["side"]) for row in data.decoding] == [
        ("evaluate", "dense"), ("evaluate", "compressed"), ("evaluate", "compressed"),
    ]  # fmt: skip
    assert data.pesf[0]["slots_dropped"] == 0.062
    assert data.forced_routing[0]["dense_shifted"] == 24.9
    assert data.warnings == ["layer 11: expert 3 saw no token, RTN"]


def test_bits_and_bytes_by_hand(run_dir: Path) -> None:
    size = collect(run_dir).size
    assert size is not None
    attention, experts, router = 4 * 128 * 128, 16 * (2 * 192 + 192) * 128, 16 * 128
    weights = attention + experts
    assert size.quantized_values == 12 * weights
    assert size.code_average == pytest.approx((4 * attention + 2 * experts + 16 * router) / (weights + router))
    # one fp16 scale per 64 columns adds a quarter of a bit to every quantized weight
    scales = 16 / 64 * weights
    assert size.all_in_average == pytest.approx(size.code_average + scales / (weights + router))
    assert size.stored == 12 * (attention // 2 + experts // 4 + weights // 64 * 2 + 2 * router)


def test_the_last_line_of_a_killed_run_is_dropped(run_dir: Path) -> None:
    assert [event["kind"] for event in read_events(run_dir / "events.jsonl")] == ["run_start", "warning", "run_end"]


def test_an_unfinished_run_is_not_called_finished(run_dir: Path) -> None:
    path = run_dir / "stages" / "evaluate" / "state.json"
    path.write_text(json.dumps({"status": "running"}))
    data = collect(run_dir)
    assert not data.finished
    assert data.stages[4].status == "running"


def test_metrics_come_from_events_when_nothing_else_is_there(tmp_path: Path) -> None:
    event = {"kind": "metric", "stage": "evaluate", "data": {"name": "piqa.acc", "dense": 0.6, "compressed": 0.5}}
    (tmp_path / "events.jsonl").write_text(json.dumps(event) + "\n")
    (row,) = collect(tmp_path).metrics
    assert (row.task, row.metric) == ("piqa", "acc")
    assert row.difference == pytest.approx(-0.1)


@pytest.mark.parametrize("content", ["", "{", "[1, 2]", "null", '{"stages": 3, "recipe": []}'])
def test_damaged_files_are_skipped(run_dir: Path, content: str) -> None:
    for path in [*run_dir.rglob("*.json"), *run_dir.rglob("*.safetensors")]:
        path.write_text(content)
    data = collect(run_dir)
    assert data.metrics == []
    assert data.size is None


def test_only_finite_numbers_count() -> None:
    assert number(float("nan")) is None
    assert number(True) is None
    assert number("3") is None
    assert number(3) == 3.0


def test_a_header_that_claims_to_be_huge_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert safetensors_header(path) == {}
