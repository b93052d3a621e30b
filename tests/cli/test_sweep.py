"""What ``sweep`` tells a pipeline: exit code, table, and what failed."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llmcompress.cli.app import invoke
from llmcompress.cli.look_ahead import require_sound
from llmcompress.pipeline.sweep import RunResult, Sweep

WORDS = ("sweep", "smoke/rtn_tiny", "run.seed=1,2", "--dir")
REFUSED = """warning: the tokenizer says error: nothing
error: run: this run was made with another recipe (calibrate):
  stages.calibrate.samples: 6 → 8
next: set run.dir to a new folder
"""


@pytest.fixture
def ended(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets every run of a sweep end as told: status, exit code, what it said."""

    def become(*outcomes: tuple[str, int, str]) -> None:
        def execute(self: Sweep) -> list[RunResult]:
            self.folder.mkdir(parents=True, exist_ok=True)
            return [
                RunResult(run, status, code, said, {"held.perplexity": 2.0 + n}, bytes=1000 - n)
                for n, (run, (status, code, said)) in enumerate(zip(self.runs, outcomes, strict=True))
            ]

        monkeypatch.setattr(Sweep, "execute", execute)

    return become


@pytest.mark.parametrize(
    ("outcomes", "code"),
    [
        ([("finished", 0, ""), ("finished", 0, "")], 0),
        ([("finished", 0, ""), ("gate failed", 6, "")], 0),
        ([("gate failed", 6, ""), ("gate failed", 0, "")], 6),
        ([("finished", 0, ""), ("failed", 5, "error: too large")], 5),
        ([("failed", 7, "error: no"), ("failed", 4, "error: no")], 7),
        ([("gate failed", 6, ""), ("failed", -9, "")], 4),
        ([("finished", 0, ""), ("failed", 139, "")], 1),
    ],
)
def test_the_exit_code_is_that_of_what_failed(
    ended: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], outcomes: list[Any], code: int
) -> None:
    ended(*outcomes)
    assert invoke([*WORDS, str(tmp_path / "s"), "--json"]) == code
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert [row["status"] for row in found["runs"]] == [status for status, _, _ in outcomes]
    assert ("error:" in printed.err) == (code != 0)
    # what failed is not the best of anything
    assert all(row["pareto"] for row in found["runs"] if row["status"] == "finished")
    assert not any(row["pareto"] for row in found["runs"] if row["status"] == "failed")


def test_every_figure_is_in_a_csv(ended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def execute(self: Sweep) -> list[RunResult]:
        self.folder.mkdir(parents=True)
        one, two = self.runs
        figures = {"held.perplexity": 21.5, "task,with.acc": 0.5}
        return [
            RunResult(
                one,
                "finished",
                0,
                "",
                figures,
                {"held.perplexity": 20.0},
                {"task,with.acc": 0.125},
                {"held.perplexity": 0.25},
                1000,
                1.5,
            ),
            RunResult(two, "failed", 5, "error: too large"),
        ]

    monkeypatch.setattr(Sweep, "execute", execute)
    assert invoke([*WORDS, str(tmp_path / "s")]) == 5
    rows = list(csv.DictReader((tmp_path / "s/results.csv").read_text().splitlines()))
    assert rows[0] == {
        "name": "seed=1", "status": "finished", "bytes": "1000", "seconds": "1.5", "peak_rss_bytes": "0",
        "pareto": "True", "run.seed": "1", "held.perplexity": "21.5", "held.perplexity.dense": "20.0",
        "held.perplexity.difference_stderr": "0.25", "task,with.acc": "0.5", "task,with.acc.stderr": "0.125",
    }  # fmt: skip
    assert (rows[1]["status"], rows[1]["run.seed"], rows[1]["held.perplexity"]) == ("failed", "2", "")


def test_what_cannot_be_is_refused_before_the_first_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [*WORDS, str(tmp_path / "s")]
    for more, said in (
        (["--metric", "heldout.perplexty"], "did you mean heldout.perplexity"),
        (["run.dir=a,b"], "a folder of its own"),
        (["run.dir=a"], "a folder of its own"),
        (["+host.ram=1GB,lots"], "expected a size"),
    ):
        assert invoke([*words, *more]) in (2, 3)
        assert said in capsys.readouterr().err
    assert not (tmp_path / "s").exists()


def test_runs_that_can_never_be_are_refused_before_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sweep, "execute", lambda self: pytest.fail("a run began"))
    words = ["sweep", "smoke/rtn_tiny", "--dir", str(tmp_path / "s")]
    # an export that cannot hold two of three: both are named
    assert invoke([*words, "stages.quantize.rules.experts.bits=4,3,2"]) == 7
    said = capsys.readouterr().err
    assert "bits=3: stages.export" in said and "bits=2: stages.export" in said and "bits=4:" not in said
    # a budget, and a model that is not here: the same for all, and said once
    assert invoke([*words, "run.seed=1,2", "+host.ram=1MB"]) == 5
    assert capsys.readouterr().err.count("host.ram: ") == 1
    assert invoke([*words, "run.seed=1,2", "model.path=absent"]) == 4
    assert capsys.readouterr().err.count("absent: no such model folder") == 1
    assert not (tmp_path / "s").exists()


def test_runs_of_earlier_commands_are_looked_at_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Sweep, "execute", lambda self: pytest.fail("a run began"))
    root, bits = tmp_path / "s", "stages.quantize.rules.experts.bits"
    words = ["sweep", "smoke/rtn_tiny", f"{bits}=4,8", "--dir", str(root)]
    # one that has not finished, and one that is marked so but holds nothing of this recipe
    for number, status in (("3", "running"), ("2", "finished")):
        folder = root / f"bits={number}"
        folder.mkdir(parents=True)
        record = {"name": "t", "status": status, "device": "cpu", "dtype": "float32", "threads": 1, "version": 1}
        (folder / "run.json").write_text(json.dumps({**record, "root": {}, "stages": []}))
        manifest = {"format": 1, "recipe": "smoke/rtn_tiny", "fixed": [], "runs": {folder.name: {bits: number}}}
        (root / "sweep.json").write_text(json.dumps(manifest))
        assert invoke(words) == 7
        assert f"bits={number}: stages.export" in capsys.readouterr().err
    # one that this recipe no longer knows: it is said whose it is
    manifest["runs"] = {"bots=2": {"stages.quantize.rules.experts.bots": "2"}}
    (root / "sweep.json").write_text(json.dumps(manifest))
    assert invoke(words) == 3
    said = capsys.readouterr().err
    assert "bots=2, which this sweep has from an earlier command" in said and "or another --dir" in said


def test_runs_that_do_not_fit_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmcompress.models import memory_limits
    from llmcompress.recipe.load import load_recipe

    monkeypatch.setattr(Sweep, "execute", lambda self: pytest.fail("a run began"))
    predicted, _ = require_sound(load_recipe("smoke/rtn_tiny", []))
    monkeypatch.setattr(memory_limits, "total_ram", lambda: predicted.ram * 2)
    monkeypatch.setattr("psutil.swap_memory", lambda: SimpleNamespace(total=0))
    assert invoke(["sweep", "smoke/rtn_tiny", "run.seed=1,2,3", "--dir", str(tmp_path / "s"), "--jobs", "3"]) == 5
    said = capsys.readouterr().err
    assert "--jobs 3: 3 runs at the same time" in said and "next: --jobs 2" in said


def test_what_goes_on_after_a_stop_is_the_whole_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import shlex
    import shutil

    from llmcompress.errors import Interrupted
    from llmcompress.recipe.catalog import find_recipe

    def stopped(self: Sweep) -> list[RunResult]:
        raise Interrupted("the sweep was stopped", self.again)

    monkeypatch.setattr(Sweep, "execute", stopped)
    recipe, folder = tmp_path / "my recipe.yaml", tmp_path / "a $folder"
    words = ["sweep", str(recipe), "run.seed=1,2", "+vars.x=[1, 2]", "--dir", str(folder), "--jobs", "2"]
    shutil.copytree(find_recipe("quickstart").parent / "base", tmp_path / "base")
    recipe.write_text(find_recipe("quickstart").read_text())
    assert invoke(words) == 130
    line = capsys.readouterr().err.partition("next: ")[2]
    assert shlex.split(line) == ["llmcompress", *words]


def test_a_disk_that_holds_one_run_and_not_all_is_told(
    ended: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmcompress.recipe.load import load_recipe

    predicted, _ = require_sound(load_recipe("smoke/rtn_tiny", []))
    usage = SimpleNamespace(free=predicted.disk * 3 // 2, total=1 << 40)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    ended(("finished", 0, ""), ("finished", 0, ""))
    assert invoke([*WORDS, str(tmp_path / "s")]) == 0
    assert "all runs together write" in capsys.readouterr().err
    usage.free = predicted.disk * 2
    assert invoke([*WORDS, str(tmp_path / "t")]) == 0
    assert "together" not in capsys.readouterr().err
    # not even one: what is advised are words that sweep knows
    usage.free = predicted.disk // 2
    assert invoke([*WORDS, str(tmp_path / "u")]) == 5
    said = capsys.readouterr().err
    assert "--dir" in said and "run.dir" not in said and "--no-preflight" not in said


def test_a_metric_may_be_that_of_one_run(ended: Any, tmp_path: Path) -> None:
    ended(("finished", 0, ""), ("finished", 0, ""))
    words = ["sweep", "smoke/rtn_tiny", "--dir", str(tmp_path / "s")]
    source = "{kind: jsonl, path: 'asset:text/heldout.jsonl.gz'}"
    axis = f"stages.evaluate.fidelity=null,{{source: {source}, length: 64, samples: 2}}"
    assert invoke([*words, axis, "--metric", "fidelity.kl"]) == 0
    assert invoke([*words, axis, "--metric", "fidelity.kll"]) == 2


def test_the_whole_error_of_a_run_is_told_in_a_line(
    ended: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended(("failed", 3, REFUSED), ("failed", -9, "Killed"))
    assert invoke([*WORDS, str(tmp_path / "s")]) == 3
    lines = capsys.readouterr().err.splitlines()
    refused = "run: this run was made with another recipe (calibrate): stages.calibrate.samples: 6 → 8"
    assert f"seed=1: {refused}" in lines
    assert "seed=2: Killed" in lines


def test_brackets_in_a_path_are_shown(ended: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ended(("finished", 0, ""), ("finished", 0, ""))
    assert invoke([*WORDS, str(tmp_path / "[br]")]) == 0
    assert f"plot: {tmp_path / '[br]'}" in capsys.readouterr().out
