"""When a difference is noise, and which recorded figures may be compared row by row."""

from __future__ import annotations

import json
import random
import statistics
from pathlib import Path
from typing import Any

import pytest

from llmcompress.evaluation.ledger import Ledger
from llmcompress.evaluation.significance import (
    Recorded,
    asked_otherwise,
    difference_stderr,
    recorded,
    stages_of,
    within_noise,
)


@pytest.mark.parametrize(
    ("difference", "stderr", "expected"),
    [(1.0, 0.5, False), (0.9, 0.5, True), (-0.9, 0.5, True), (0.0, 0.0, False), (1.0, None, None), (None, 1.0, None)],
)
def test_the_bound(difference: float | None, stderr: float | None, expected: bool | None) -> None:
    assert within_noise(difference, stderr) is expected


def test_what_both_models_find_hard_drops_out_and_one_pair_in_twenty_is_wrong() -> None:
    rng, wrong = random.Random(0), 0
    for _ in range(400):
        hard = [rng.gauss(0, 10) for _ in range(50)]
        changes = [rng.gauss(0, 1) for _ in hard]
        rows = [h + c for h, c in zip(hard, changes)]
        error = statistics.stdev(changes) / 50**0.5
        mean = statistics.fmean(rows) - statistics.fmean(hard)
        wrong += within_noise(mean, error) is False
    assert 8 <= wrong <= 40


def _stage(
    folder: Path, side: str = "compressed", sha: str = "1", nll: tuple[float, ...] = (1.0, 2.0, 4.0),
    name: str = "held", path: str = "here/held.jsonl", asked: str = "a",
) -> Path:  # fmt: skip
    ledger = Ledger(folder / "parts")
    source = {"kind": "jsonl", "path": path, "files": [{"name": "held.jsonl", "sha256": sha}]}
    (folder / "texts.json").write_text(json.dumps({name: source}))
    part: dict[str, Any] = {"perplexity": 2.0, "tokens": 9, "windows": 3, "text_bytes": 40, "window_nll": nll}
    ledger.put(f"{side}.perplexity.{name}", part)
    ledger.put(f"{side}.task.t", [{"task": "t", "metric": "acc", "n": 3, "rows": [1, 0, 1], "asked": asked}])
    return folder


def test_only_the_same_rows_of_the_same_text_pair_up(tmp_path: Path) -> None:
    one, two = recorded(_stage(tmp_path / "a")), recorded(_stage(tmp_path / "b", nll=(1.5, 2.0, 4.0)))
    assert set(one) == {"held.perplexity", "t.acc"}
    expected = statistics.stdev([1.0, 0.0, 0.0]) / 3**0.5
    assert difference_stderr(one["held.perplexity"], two["held.perplexity"]) == pytest.approx(expected)
    assert difference_stderr(one["t.acc"], two["t.acc"]) == 0
    other = recorded(_stage(tmp_path / "c", sha="2"))
    assert difference_stderr(one["held.perplexity"], other["held.perplexity"]) is None
    assert difference_stderr(one["held.perplexity"], None) is None


def test_as_many_rows_of_another_file_do_not_pair_up(tmp_path: Path) -> None:
    one, two = recorded(_stage(tmp_path / "a")), recorded(_stage(tmp_path / "b", asked="b"))
    assert len(one["t.acc"].rows) == len(two["t.acc"].rows)
    assert difference_stderr(one["t.acc"], two["t.acc"]) is None
    # which is said of figures that both have row by row
    assert asked_otherwise(one["t.acc"], two["t.acc"]) and not asked_otherwise(one["t.acc"], None)
    assert not asked_otherwise(one["held.perplexity"], two["held.perplexity"])


def test_means_over_other_tasks_are_told_apart(tmp_path: Path) -> None:
    def mean(folder: str, asked: dict[str, str]) -> Recorded:
        for task, sample in asked.items():
            row = {"task": task, "metric": "acc", "n": 2, "rows": [1, 0], "asked": sample}
            Ledger(_stage(tmp_path / folder) / "parts").put(f"compressed.task.{task}", [row])
        return recorded(tmp_path / folder)["tasks.mean_acc"]

    one, same = mean("a", {"b": "x", "c": "y"}), mean("b", {"c": "y", "b": "x"})
    assert not asked_otherwise(one, same) and difference_stderr(one, same) is None
    assert asked_otherwise(one, mean("c", {"b": "x"})) and asked_otherwise(one, mean("d", {"b": "x", "c": "z"}))


def test_the_compressed_side_counts_and_damage_is_no_error(tmp_path: Path) -> None:
    stage = _stage(tmp_path / "stages" / "evaluate")
    _stage(stage, "dense", nll=(9.0, 9.0, 9.0))
    assert stages_of(tmp_path, ["load", "evaluate"])["held.perplexity"].rows == (2.0, 4.0, 8.0)
    for path in (stage / "parts").glob("compressed.*"):
        path.write_text("{")
    assert recorded(stage)["held.perplexity"].rows == (18.0, 18.0, 18.0)
    (stage / "texts.json").unlink()
    assert set(recorded(stage)) == {"t.acc"}


@pytest.mark.parametrize("name", ["held out", "prosa/übung", "50 %", "a:b"])
def test_any_name_of_a_text_pairs_up(tmp_path: Path, name: str) -> None:
    one, two = (recorded(_stage(tmp_path / side, nll=(n, 2.0, 4.0), name=name)) for side, n in (("a", 1.0), ("b", 1.5)))
    assert difference_stderr(one[f"{name}.perplexity"], two[f"{name}.perplexity"]) == pytest.approx(1 / 3)


def test_the_same_file_in_two_checkouts_pairs_up(tmp_path: Path) -> None:
    one, two = (recorded(_stage(tmp_path / side, path=f"/{side}/held.jsonl")) for side in "ab")
    assert difference_stderr(one["held.perplexity"], two["held.perplexity"]) == 0


def test_of_several_stages_the_last_counts(tmp_path: Path) -> None:
    for name, nll in (("rounded", (1.0, 1.0, 1.0)), ("after", (3.0, 3.0, 3.0))):
        _stage(tmp_path / "stages" / name, nll=nll)
    assert stages_of(tmp_path, ["rounded", "after"])["held.perplexity"].rows == (6.0, 6.0, 6.0)
