from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import UsageError
from llmcompress.pipeline import sweep
from llmcompress.pipeline.run_dir import RunDir, RunRecord
from llmcompress.pipeline.sweep import Sweep, SweepRun, combinations, pareto, parse_axes, result_of

AGAIN = "llmcompress sweep recipe n=1,2"


def asked(
    fixed: list[str], runs: list[SweepRun], folder: Path, jobs: int, tell: Any, holds: Any = lambda _: True
) -> Sweep:
    return Sweep("recipe", fixed, runs, folder, jobs, tell, holds, AGAIN)


def test_axes_and_settings_are_told_apart() -> None:
    axes, fixed = parse_axes(
        ["a.bits=2,3", "run.seed=1", "b={x: 1, y: 2},null", "c=[1,2]", "stages.prune~", "d='x,y'", "+e=1,2"]
    )
    assert axes == {"a.bits": ["2", "3"], "b": ["{x: 1, y: 2}", "null"], "+e": ["1", "2"]}
    assert fixed == ["run.seed=1", "c=[1,2]", "stages.prune~", "d='x,y'"]


@pytest.mark.parametrize("words", [[], ["a=1"], ["a=1,2", "a=3,4"], ["a=1,,2"], ["a=1,1"]])
def test_nonsense_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        parse_axes(words)


def test_every_combination_has_a_name_of_its_own(tmp_path: Path) -> None:
    runs = combinations({"x.bits": ["2", "3"], "y.bits": ["4"], "run.seed": ["0", "1"]}, tmp_path)
    assert [run.name for run in runs] == [
        f"x.bits={a},y.bits=4,seed={b}" for a in (2, 3) for b in (0, 1)
    ]  # fmt: skip
    odd = combinations({"a": ["x/y", "x:y"]}, tmp_path)
    assert len({run.folder for run in odd}) == 2
    assert all(run.folder.parent == tmp_path for run in odd)


def test_a_run_keeps_its_folder_when_values_that_read_alike_are_added(tmp_path: Path) -> None:
    def claimed(*values: str) -> dict[str, str]:
        sweep = asked([], combinations({"a": list(values)}, tmp_path), tmp_path, 1, lambda _: None)
        sweep._claim()
        assert all(run.folder == tmp_path / run.name for run in sweep.runs)
        assert json.loads((tmp_path / "sweep.json").read_text())["runs"] == {r.name: r.values for r in sweep.runs}
        return {run.values["a"]: run.name for run in sweep.runs}

    assert claimed("x/y") == {"x/y": "a=x_y"}
    # alone, it would have the same name
    assert claimed("x:y") == {"x/y": "a=x_y", "x:y": "000,a=x_y"}
    three = claimed("x:y", "x/y", "x y")
    assert three == {"x/y": "a=x_y", "x:y": "000,a=x_y", "x y": "002,a=x_y"}
    assert claimed("x/y", "z") == {**three, "z": "a=z"}


@pytest.mark.parametrize("rising", [False, True])
def test_the_front_is_what_no_other_beats(rising: bool) -> None:
    sign = -1 if rising else 1
    points = [(1.0, 9.0), (2.0, 5.0), (2.0, 6.0), (3.0, 5.0), (4.0, 4.0), (4.0, 4.0)]
    assert pareto([(x, sign * y) for x, y in points], rising) == [True, True, False, False, True, True]


SCRIPT = """
import json, os, pathlib, sys, time
words = dict(word.split("=", 1) for word in sys.argv[3:] if "=" in word)
folder = pathlib.Path(json.loads(words["run.dir"]))
folder.mkdir(parents=True, exist_ok=True)
with (folder / "began").open("a") as handle:
    handle.write("x")
(folder / "threads").write_text(os.environ.get("OMP_NUM_THREADS", ""))
if words["n"] == "2" and not (folder / "second").exists():
    (folder / "second").touch()
    print("error: the first time fails", file=sys.stderr)
    sys.exit(4)
time.sleep(float(words.get("pause", 0)))
record = {"name": "t", "status": "finished", "device": "cpu", "dtype": "float32", "threads": 1}
record |= {"root": {}, "stages": []}
(folder / "run.json").write_text(json.dumps({**record, "version": 1}))
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A command that stands in for ``python -m llmcompress run``; returns the sweep's folder."""
    script = tmp_path / "fake.py"
    script.write_text(SCRIPT)
    real = subprocess.Popen

    def popen(command: list[str], **options: Any) -> Any:
        assert command[1:4] == ["-m", "llmcompress", "run"]
        return real([sys.executable, str(script), *command[3:]], **options)

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    return tmp_path / "sweep"


def test_a_failed_run_is_noted_and_done_again(fake: Path) -> None:
    def execute() -> list[Any]:
        return asked([], combinations({"n": ["1", "2", "3"]}, fake), fake, 2, lambda _: None).execute()

    first = execute()
    assert [result.status for result in first] == ["finished", "failed", "finished"]
    assert (first[1].error, first[1].code) == ("error: the first time fails", 4)
    second = execute()
    assert [result.status for result in second] == ["finished"] * 3
    assert [len((fake / f"n={n}" / "began").read_text()) for n in (1, 2, 3)] == [1, 2, 1]


def test_a_finished_run_of_another_recipe_is_not_passed_on(fake: Path) -> None:
    def execute(changed: bool) -> list[Any]:
        runs = combinations({"n": ["1", "3"]}, fake)
        return asked([], runs, fake, 1, lambda _: None, lambda run: run.name != "n=1" or not changed).execute()

    execute(False)
    execute(False)
    assert [len((fake / f"n={n}" / "began").read_text()) for n in (1, 3)] == [1, 1]
    execute(True)
    assert [len((fake / f"n={n}" / "began").read_text()) for n in (1, 3)] == [2, 1]
    # what the run itself then refuses is no result
    run = combinations({"n": ["1"]}, fake)[0]
    kept = run.folder / "stages" / "evaluate"
    kept.mkdir(parents=True)
    record = json.loads((run.folder / "run.json").read_text())
    (run.folder / "run.json").write_text(json.dumps({**record, "stages": ["evaluate"]}))
    (kept / "metrics.json").write_text(json.dumps([{"task": "t", "metric": "perplexity", "compressed": 3.0}]))
    assert result_of(run).metrics == {"t.perplexity": 3.0}
    refused = result_of(run, 3, "error: another recipe")
    assert (refused.status, refused.metrics) == ("failed", {})


def test_values_may_be_added_and_other_settings_are_refused(fake: Path) -> None:
    asked([], combinations({"n": ["1"]}, fake), fake, 1, lambda _: None).execute()
    wider = asked([], combinations({"n": ["3"]}, fake), fake, 1, lambda _: None).execute()
    assert [result.run.name for result in wider] == ["n=1", "n=3"]
    with pytest.raises(UsageError, match="holds a sweep with other settings"):
        asked(["run.seed=1"], combinations({"n": ["1"]}, fake), fake, 1, lambda _: None).execute()


def test_a_sweep_goes_on_with_more_runs_at_a_time(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    for jobs, numbers in ((1, ["1"]), (4, ["1", "3"])):
        results = asked([], combinations({"n": numbers}, fake), fake, jobs, lambda _: None).execute()
        assert [result.status for result in results] == ["finished"] * len(numbers)
    # one at a time has all processors; of four at a time each has its share
    assert [(fake / f"n={n}" / "threads").read_text() for n in (1, 3)] == ["", "2"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_stop_ends_the_children(fake: Path, number: signal.Signals) -> None:
    from llmcompress.errors import Interrupted

    def stop() -> None:
        while not (fake / "n=4" / "threads").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    said: list[str] = []
    # the tests themselves may run under nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    threading.Thread(target=stop, daemon=True).start()
    try:
        with pytest.raises(Interrupted, match="sweep was stopped") as stopped:
            runs = combinations({"n": ["4", "5"]}, fake)
            asked(["pause=300"], runs, fake, 1, said.append).execute()
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stopped.value.hint == AGAIN
    assert said == ["n=4: begins", f"n=4: ended with exit code {-signal.SIGTERM}"]
    assert not (fake / "n=5").exists()


def test_under_nohup_a_sweep_outlives_its_terminal(fake: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        run = combinations({"n": ["4"]}, fake)
        seen: list[object] = []
        asked([], run, fake, 1, lambda _: seen.append(signal.getsignal(signal.SIGHUP))).execute()
        assert set(seen) == {signal.SIG_IGN}
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stop_while_a_run_is_being_started_reaches_it(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompress.errors import Interrupted

    start = sweep.subprocess.Popen

    def slow(*words: Any, **options: Any) -> Any:
        child = start(*words, **options)
        os.kill(os.getpid(), signal.SIGTERM)
        while not seen:
            time.sleep(0.01)
        return child

    seen: list[int] = []
    said: list[str] = []
    stop = Sweep._stop
    monkeypatch.setattr(Sweep, "_stop", lambda self, *told: (stop(self, *told), seen.append(1)))
    monkeypatch.setattr(sweep.subprocess, "Popen", slow)
    with pytest.raises(Interrupted, match="sweep was stopped"):
        asked(["pause=300"], combinations({"n": ["4"]}, fake), fake, 1, said.append).execute()
    assert said == ["n=4: begins", f"n=4: ended with exit code {-signal.SIGTERM}"]


def test_results_are_read_from_the_folder(tmp_path: Path) -> None:
    stage = tmp_path / "r" / "stages" / "evaluate"
    stage.mkdir(parents=True)
    rows = [{"task": "heldout", "metric": "perplexity", "dense": 3.0, "compressed": 4.0}]
    (stage / "metrics.json").write_text(json.dumps(rows))
    (tmp_path / "r" / "artifact").mkdir()
    (tmp_path / "r" / "artifact" / "model.safetensors").write_bytes(bytes(77))
    found = result_of(SweepRun("r", {}, tmp_path / "r"), 5, "error: too large")
    assert (found.status, found.error, found.bytes) == ("failed", "error: too large", 77)
    assert (found.metrics, found.dense) == ({"heldout.perplexity": 4.0}, {"heldout.perplexity": 3.0})


def test_the_size_is_that_of_one_format(tmp_path: Path) -> None:
    sizes = {"artifact-compressed-tensors/a.safetensors": 10, "artifact-compressed-tensors/b.safetensors": 5,
             "artifact-dense/model.safetensors": 100, "stages/quantize/blocks/00000.safetensors": 7}  # fmt: skip
    for name, size in sizes.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert result_of(SweepRun("r", {}, tmp_path)).bytes == 15
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact/model.safetensors").write_bytes(bytes(8))
    assert result_of(SweepRun("r", {}, tmp_path)).bytes == 8


def test_of_several_evaluations_the_last_in_the_recipe_counts(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "r")
    folder.create()
    for name, value in (("rounded", 9.0), ("after", 4.0)):
        folder.stage_dir(name).mkdir()
        rows = [{"task": "heldout", "metric": "perplexity", "dense": 3.0, "compressed": value, "stderr": value / 4}]
        rows[0]["difference_stderr"] = 0.5 if name == "rounded" else None
        (folder.stage_dir(name) / "metrics.json").write_text(json.dumps(rows))
    folder.write_run(RunRecord("r", "finished", "cpu", "float32", 1, {}, ["rounded", "after"]))
    found = result_of(SweepRun("r", {}, folder.root))
    assert (found.metrics, found.stderr) == ({"heldout.perplexity": 4.0}, {"heldout.perplexity": 1.0})
    assert found.difference_stderr == {}
