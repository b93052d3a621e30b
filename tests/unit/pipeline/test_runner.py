from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from llmcompress import plugins
from llmcompress.distributed.world import World
from llmcompress.errors import EnvironmentProblem, GateFailed, InputError, Interrupted, RecipeError, UsageError
from llmcompress.events import Event
from llmcompress.pipeline.device import stage_seed
from llmcompress.pipeline.followers import follow
from llmcompress.pipeline.run_dir import RunDir
from llmcompress.pipeline.runner import Job, Outcome, Runner, RunOptions
from llmcompress.stages.base import Kind, Stage, StageConfig
from llmcompress.stages.state import Metric, RunContext, RunState

Behaviour = Callable[["Fake", RunState, RunContext], None]


class FakeConfig(StageConfig):
    type: Literal["fake"] = "fake"
    value: int = 0
    path: str | None = None


class Fake(Stage):
    """Does what the test tells it to and keeps a diary."""

    Config: ClassVar[type[StageConfig]] = FakeConfig
    diary: ClassVar[list[str]] = []
    behaviour: ClassVar[dict[str, Behaviour]] = {}
    kinds: ClassVar[dict[str, frozenset[Kind]]] = {}

    def __init__(self, name: str, config: Any) -> None:
        super().__init__(name, config)
        self.produces = self.kinds.get(name, frozenset({Kind.PACKED}))  # type: ignore[misc]

    def run(self, state: RunState, ctx: RunContext) -> None:
        self.diary.append(f"run {self.name}")
        if self.name in self.behaviour:
            self.behaviour[self.name](self, state, ctx)
        (ctx.stage_dir / "result.txt").write_text(str(self.config.value))

    def restore(self, state: RunState, ctx: RunContext) -> None:
        self.diary.append(f"restore {self.name}")


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "diary", [])
    monkeypatch.setattr(Fake, "behaviour", {})
    cheap = {"evaluate": frozenset({Kind.METRICS}), "export": frozenset({Kind.ARTIFACT})}
    monkeypatch.setattr(Fake, "kinds", cheap)


def job(folder: Path, stages: dict[str, dict[str, Any]] | None = None, **run: Any) -> Job:
    stages = stages if stages is not None else {"load": {}, "quantize": {"value": 3}, "evaluate": {}}
    recipe = {
        "name": "demo",
        "model": {"path": "asset-free"},
        "run": {"dir": str(folder / "run"), "seed": 0, "device": "cpu", "compute_dtype": "auto", "threads": 1, **run},
        "stages": {name: {"type": "fake", **config} for name, config in stages.items()},
    }
    built = [Fake(name, FakeConfig(**config)) for name, config in stages.items()]
    return Job(recipe, built, "name: demo\n", lambda: {"recipe": recipe})


def execute(made: Job, sinks: Any = (), **options: Any) -> Outcome:
    return Runner(made, RunOptions(**options), sinks).execute()


def state(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / "run" / "stages" / name / "state.json").read_text()))


def test_a_run_leaves_its_records(tmp_path: Path) -> None:
    def measure(stage: Fake, run: RunState, ctx: RunContext) -> None:
        assert ctx.seed == stage_seed(0, "evaluate")
        assert (ctx.device, ctx.dtype) == ("cpu", "float32")
        run.metrics.append(Metric("heldout", "perplexity", 10.0, 11.0))

    Fake.behaviour["evaluate"] = measure
    outcome = execute(job(tmp_path))
    assert outcome.status == "finished"
    assert Fake.diary == ["run load", "run quantize", "run evaluate"]
    assert [m.name for m in outcome.metrics] == ["heldout.perplexity"]
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"recipe.yaml", "recipe.lock.json", "run.json", "events.jsonl", "log.txt", "stages", "report.html"}
    found = state(tmp_path, "quantize")
    assert found["status"] == "finished"
    assert found["peak_rss_bytes"] > 10 << 20
    assert found["seconds"] >= 0
    assert found["attempts"] == 1
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert kinds[0] == "run_start"
    assert kinds[-1] == "run_end"
    assert kinds.count("stage_start") == 3


def test_a_finished_run_is_left_alone_unless_forced(tmp_path: Path) -> None:
    assert not Runner(job(tmp_path), RunOptions()).up_to_date() and not (tmp_path / "run").exists()
    execute(job(tmp_path), until="quantize")
    assert not Runner(job(tmp_path), RunOptions()).up_to_date()
    execute(job(tmp_path))
    assert Runner(job(tmp_path), RunOptions()).up_to_date()
    assert not Runner(job(tmp_path, {"load": {}, "quantize": {"value": 4}, "evaluate": {}}), RunOptions()).up_to_date()
    # the folder holds more than this recipe makes
    assert not Runner(job(tmp_path, {"load": {}, "quantize": {"value": 3}}), RunOptions()).up_to_date()
    before = (tmp_path / "run" / "run.json").stat().st_mtime_ns
    Fake.diary.clear()
    assert execute(job(tmp_path)).status == "nothing to do"
    assert Fake.diary == []
    assert (tmp_path / "run" / "run.json").stat().st_mtime_ns == before
    assert execute(job(tmp_path), force=True).status == "finished"
    assert Fake.diary == ["run load", "run quantize", "run evaluate"]


def test_resume_restores_what_is_finished(tmp_path: Path) -> None:
    def fail(stage: Fake, run: RunState, ctx: RunContext) -> None:
        (ctx.stage_dir / "partial").write_text("kept")
        raise InputError("the text is missing")

    Fake.behaviour["quantize"] = fail
    with pytest.raises(InputError, match="missing"):
        execute(job(tmp_path))
    assert state(tmp_path, "quantize")["status"] == "running"
    del Fake.behaviour["quantize"]
    Fake.diary.clear()
    assert execute(job(tmp_path)).status == "finished"
    assert Fake.diary == ["restore load", "run quantize", "run evaluate"]
    assert (tmp_path / "run" / "stages" / "quantize" / "partial").exists()
    assert state(tmp_path, "quantize")["attempts"] == 2


def test_every_stage_begins_with_its_own_seed_whatever_was_drawn_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    drawn: dict[str, list[float]] = {}

    def draw(stage: Fake, run: RunState, ctx: RunContext) -> None:
        drawn.setdefault(stage.name, []).append(float(torch.rand(1)))

    Fake.behaviour.update(load=draw, quantize=draw, evaluate=draw)
    monkeypatch.setattr(Fake, "restore", draw)
    execute(job(tmp_path), until="quantize")
    # others draw in between, as they do in a process that goes on with a run
    torch.manual_seed(99)
    execute(job(tmp_path))
    assert drawn["load"][0] == drawn["load"][1] and drawn["quantize"][0] == drawn["quantize"][1]
    execute(job(tmp_path / "alone", {"load": {}, "evaluate": {}}))
    assert drawn["evaluate"][0] == drawn["evaluate"][1]
    assert len({values[0] for values in drawn.values()}) == 3


def test_time_and_peaks_are_kept_over_all_attempts(tmp_path: Path) -> None:
    def fail(stage: Fake, run: RunState, ctx: RunContext) -> None:
        raise InputError("not yet")

    Fake.behaviour["quantize"] = fail
    with pytest.raises(InputError):
        execute(job(tmp_path))
    del Fake.behaviour["quantize"]
    first = {**state(tmp_path, "quantize"), "seconds": 1000.0, "peak_rss_bytes": 1 << 50}
    (tmp_path / "run" / "stages" / "quantize" / "state.json").write_text(json.dumps(first))
    execute(job(tmp_path))
    found = state(tmp_path, "quantize")
    assert found["seconds"] >= 1000 and found["peak_rss_bytes"] == 1 << 50
    run = RunDir(tmp_path / "run").read_run()
    assert run is not None and run.peak_rss_bytes == 1 << 50
    assert run.seconds == pytest.approx(sum(state(tmp_path, n)["seconds"] for n in ("load", "quantize", "evaluate")))


def test_runs_that_are_to_be_deterministic_compute_with_one_thread_unless_told_otherwise(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        for threads, expected in ((None, 1), (2, 2)):
            folder = tmp_path / str(threads)
            torch.set_num_threads(3)
            execute(job(folder, {"load": {}}, threads=threads, deterministic=True))
            run = RunDir(folder / "run").read_run()
            assert run is not None and run.threads == expected == torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def test_until_and_only(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="not finished"):
        execute(job(tmp_path), only="evaluate")
    assert execute(job(tmp_path), until="quantize").status == "stopped"
    assert Fake.diary == ["run load", "run quantize"]
    assert not (tmp_path / "run" / "stages" / "evaluate").exists()
    Fake.diary.clear()
    assert execute(job(tmp_path), until="quantize").status == "nothing to do"
    assert execute(job(tmp_path), only="evaluate").status == "finished"
    assert Fake.diary == ["restore load", "restore quantize", "run evaluate"]
    with pytest.raises(UsageError, match="no such stage"):
        execute(job(tmp_path), until="prune")
    with pytest.raises(UsageError, match="exclude"):
        execute(job(tmp_path), until="load", only="load")


def test_a_changed_finished_stage_is_refused_with_the_difference(tmp_path: Path) -> None:
    execute(job(tmp_path))
    changed = {"load": {}, "quantize": {"value": 2}, "evaluate": {}}
    with pytest.raises(RecipeError) as caught:
        execute(job(tmp_path, changed))
    assert "stages.quantize.value: 3 → 2" in caught.value.message
    assert "--redo quantize" in str(caught.value.hint)
    # nothing was touched
    assert execute(job(tmp_path)).status == "nothing to do"
    Fake.diary.clear()
    execute(job(tmp_path, changed), redo="quantize")
    assert Fake.diary == ["restore load", "run quantize", "run evaluate"]
    assert (tmp_path / "run" / "stages" / "quantize" / "result.txt").read_text() == "2"


def test_a_changed_seed_or_model_is_refused(tmp_path: Path) -> None:
    execute(job(tmp_path))
    with pytest.raises(RecipeError, match=r"run\.seed: 0 → 1"):
        execute(job(tmp_path, seed=1))


def test_redo_does_not_excuse_changes_before_it(tmp_path: Path) -> None:
    execute(job(tmp_path))
    with pytest.raises(RecipeError, match=r"stages\.load\.value"):
        execute(job(tmp_path, {"load": {"value": 9}, "quantize": {"value": 3}, "evaluate": {}}), redo="quantize")


def test_changed_measuring_and_unfinished_stages_are_done_again(tmp_path: Path) -> None:
    execute(job(tmp_path))
    Fake.diary.clear()
    execute(job(tmp_path, {"load": {}, "quantize": {"value": 3}, "evaluate": {"value": 7}}))
    assert Fake.diary == ["restore load", "restore quantize", "run evaluate"]
    # a removed measuring stage is forgotten, an added one is run
    Fake.diary.clear()
    execute(job(tmp_path, {"load": {}, "quantize": {"value": 3}, "export": {}}))
    assert Fake.diary == ["restore load", "restore quantize", "run export"]
    assert not (tmp_path / "run" / "stages" / "evaluate").exists()
    with pytest.raises(RecipeError, match=r"stages\.quantize: removed or renamed"):
        execute(job(tmp_path, {"load": {}, "other": {}, "export": {}}))


def test_another_gate_judges_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Fake, "judging", frozenset({"value"}))
    Fake.kinds["quantize"] = frozenset({Kind.METRICS})

    def judge(stage: Fake, run: RunState, ctx: RunContext) -> None:
        (ctx.stage_dir / "measured").touch(exist_ok=stage.config.value == 3)
        if stage.config.value < 5:
            raise GateFailed("gate ppl: too high")

    Fake.behaviour["quantize"] = judge
    strict, lax = ({"load": {}, "quantize": {"value": value}, "export": {}} for value in (3, 7))
    assert execute(job(tmp_path, strict)).gate_failures == ["gate ppl: too high"]
    assert Runner(job(tmp_path, strict), RunOptions()).up_to_date()
    assert not Runner(job(tmp_path, lax), RunOptions()).up_to_date()
    Fake.behaviour["quantize"] = lambda stage, run, ctx: None
    measured = tmp_path / "run" / "stages" / "quantize" / "measured"
    before = measured.stat().st_mtime_ns
    Fake.diary.clear()
    outcome = execute(job(tmp_path, lax))
    # the stage looks at its own files again, those after it stay as they are
    assert (outcome.status, outcome.gate_failures) == ("finished", [])
    assert Fake.diary == ["restore load", "run quantize", "restore export"]
    assert measured.stat().st_mtime_ns == before
    assert Runner(job(tmp_path, lax), RunOptions()).up_to_date()
    assert execute(job(tmp_path, lax)).status == "nothing to do"


def test_partial_work_of_a_changed_stage_is_not_continued(tmp_path: Path) -> None:
    def fail(stage: Fake, run: RunState, ctx: RunContext) -> None:
        (ctx.stage_dir / "partial").write_text("of the old recipe")
        raise InputError("stopped")

    Fake.behaviour["quantize"] = fail
    with pytest.raises(InputError):
        execute(job(tmp_path))
    del Fake.behaviour["quantize"]
    execute(job(tmp_path, {"load": {}, "quantize": {"value": 2}, "evaluate": {}}))
    assert not (tmp_path / "run" / "stages" / "quantize" / "partial").exists()


def test_what_a_discarded_stage_has_left_behind_is_not_continued(tmp_path: Path) -> None:
    """A kill while its folder is deleted can leave blocks without the record that says of which recipe they are."""
    execute(job(tmp_path))
    folder = tmp_path / "run" / "stages" / "quantize"
    (folder / "partial").write_text("of nobody knows which recipe")
    (folder / "state.json").unlink()
    Fake.diary.clear()
    execute(job(tmp_path, {"load": {}, "quantize": {"value": 2}, "evaluate": {}}))
    assert Fake.diary == ["restore load", "run quantize", "run evaluate"]
    assert not (folder / "partial").exists()


def test_finished_blocks_of_a_stopped_stage_are_not_thrown_away_unasked(tmp_path: Path) -> None:
    def stop(stage: Fake, run: RunState, ctx: RunContext) -> None:
        (ctx.stage_dir / "blocks").mkdir(exist_ok=True)
        (ctx.stage_dir / "blocks" / "00000.safetensors").write_bytes(b"hours of work")
        raise Interrupted("stopped")

    Fake.behaviour["quantize"] = stop
    with pytest.raises(Interrupted):
        execute(job(tmp_path))
    changed = {"load": {}, "quantize": {"value": 2}, "evaluate": {}}
    with pytest.raises(RecipeError, match=r"finished work \(quantize: 1 block\)") as caught:
        execute(job(tmp_path, changed))
    assert "--redo quantize" in str(caught.value.hint)
    assert (tmp_path / "run" / "stages" / "quantize" / "blocks" / "00000.safetensors").exists()
    del Fake.behaviour["quantize"]
    assert execute(job(tmp_path, changed), redo="quantize").status == "finished"
    assert not (tmp_path / "run" / "stages" / "quantize" / "blocks").exists()


def test_changed_contents_of_a_file_count_as_a_changed_recipe(tmp_path: Path) -> None:
    text = tmp_path / "calibration.txt"
    text.write_text("one")
    stages = {"calibrate": {"path": str(text)}, "quantize": {}}
    execute(job(tmp_path, stages))
    assert execute(job(tmp_path, stages)).status == "nothing to do"
    text.write_text("two")
    with pytest.raises(RecipeError, match="or its contents have changed"):
        execute(job(tmp_path, stages))


def test_gates_fail_only_after_everything_else(tmp_path: Path) -> None:
    def judge(stage: Fake, run: RunState, ctx: RunContext) -> None:
        (ctx.stage_dir / "metrics.json").write_text("[]")
        raise GateFailed("gate ppl: heldout.perplexity is 20, at most 15")

    Fake.behaviour["evaluate"] = judge
    stages: dict[str, dict[str, Any]] = {"load": {}, "quantize": {}, "evaluate": {}, "export": {}}
    outcome = execute(job(tmp_path, stages))
    assert outcome.status == "finished"
    assert outcome.gate_failures == ["gate ppl: heldout.perplexity is 20, at most 15"]
    assert Fake.diary[-1] == "run export"
    assert (tmp_path / "run" / "report.html").exists()
    # asking again gives the same verdict
    assert execute(job(tmp_path, stages)).gate_failures == outcome.gate_failures


def test_recorded_gate_files_count_too(tmp_path: Path) -> None:
    def judge(stage: Fake, run: RunState, ctx: RunContext) -> None:
        (ctx.stage_dir / "gates.json").write_text(json.dumps([{"passed": False, "message": "gate kl: too high"}]))

    Fake.behaviour["evaluate"] = judge
    assert execute(job(tmp_path)).gate_failures == ["gate kl: too high"]


def test_sigterm_waits_for_the_block(tmp_path: Path) -> None:
    def blocks(stage: Fake, run: RunState, ctx: RunContext) -> None:
        for index in range(3):
            ctx.emit("block_start", index=index, total=3)
            if index == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            (ctx.stage_dir / f"block{index}").write_text("done")
            ctx.emit("block_end", index=index, total=3)

    Fake.behaviour["quantize"] = blocks
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        execute(job(tmp_path))
    assert caught.value.hint == f"llmcompress resume {tmp_path / 'run'}"
    folder = tmp_path / "run" / "stages" / "quantize"
    assert sorted(p.name for p in folder.glob("block*")) == ["block0", "block1"]
    assert signal.getsignal(signal.SIGTERM) == before
    last = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[-1])
    assert last["data"]["status"] == "interrupted"


def test_a_second_sigterm_does_not_wait_for_the_block(tmp_path: Path) -> None:
    def stubborn(stage: Fake, run: RunState, ctx: RunContext) -> None:
        ctx.emit("block_start", index=0, total=1)
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the block went on")

    Fake.behaviour["quantize"] = stubborn
    with pytest.raises(Interrupted):
        execute(job(tmp_path))


def test_sigterm_between_two_stages_with_blocks_stops_at_once(tmp_path: Path) -> None:
    def broken_off(stage: Fake, run: RunState, ctx: RunContext) -> None:
        # a block that never says that it ended: the stage has
        ctx.emit("block_start", index=0, total=1)

    def stop(stage: Fake, run: RunState, ctx: RunContext) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("the stage went on")

    Fake.behaviour.update(load=broken_off, quantize=stop)
    with pytest.raises(Interrupted):
        execute(job(tmp_path))


def test_sigterm_outside_a_block_and_ctrl_c_stop_at_once(tmp_path: Path) -> None:
    def swallow(stage: Fake, run: RunState, ctx: RunContext) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            for _ in range(10_000):
                pass
        except Exception:
            pytest.fail("libraries that catch Exception must not keep a run alive")
        pytest.fail("the signal was ignored")

    Fake.behaviour["load"] = swallow
    with pytest.raises(Interrupted):
        execute(job(tmp_path))

    def press(stage: Fake, run: RunState, ctx: RunContext) -> None:
        raise KeyboardInterrupt

    Fake.behaviour["load"] = press
    with pytest.raises(Interrupted, match="Ctrl-C"):
        execute(job(tmp_path))


def test_a_full_disk_leaves_nothing_that_looks_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import llmcompress.pipeline.run_dir as module

    real = module.write_durably
    writes = 0
    execute(job(tmp_path / "count"))

    for allowed in range(12):
        folder = tmp_path / f"full{allowed}"
        writes = 0

        def limited(path: Path, data: bytes, allowed: int = allowed) -> None:
            nonlocal writes
            writes += 1
            if writes > allowed:
                raise OSError(28, "No space left on device", str(path))
            real(path, data)

        monkeypatch.setattr(module, "write_durably", limited)
        try:
            outcome = execute(job(folder))
        except OSError as error:
            assert error.errno == 28
            run = RunDir(folder / "run").read_run()
            assert run is None or run.status == "running"
        else:
            assert outcome.status == "finished"
        monkeypatch.setattr(module, "write_durably", real)
        assert execute(job(folder)).status in ("finished", "nothing to do")
        results = [p.read_text() for p in sorted((folder / "run" / "stages").glob("*/result.txt"))]
        assert results == ["0", "0", "3"]
    assert writes <= 12


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    def again(stage: Fake, run: RunState, ctx: RunContext) -> None:
        with pytest.raises(EnvironmentProblem, match="running in this folder"):
            execute(job(tmp_path))

    Fake.behaviour["quantize"] = again
    assert execute(job(tmp_path)).status == "finished"


def test_a_resumed_run_keeps_the_threads_it_began_with(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        execute(job(tmp_path, threads=2), until="load")
        torch.set_num_threads(1)
        execute(job(tmp_path, threads=None))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_a_run_that_began_on_the_cpu_stays_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device computes other numbers: it would be another run, which is refused."""
    from llmcompress.pipeline import device

    monkeypatch.setattr(device, "resolve_device", lambda _: "cpu")
    execute(job(tmp_path, device="auto"), until="quantize")
    monkeypatch.setattr(device, "resolve_device", lambda _: "cuda")
    assert execute(job(tmp_path, device="auto")).status == "finished"
    run = RunDir(tmp_path / "run").read_run()
    assert run is not None and run.device == "cpu"


def test_processes_that_share_a_machine_take_no_number_of_threads_from_one_that_had_it_alone(tmp_path: Path) -> None:
    import torch

    before = torch.get_num_threads()
    try:
        execute(job(tmp_path, threads=2), until="load")
        torch.set_num_threads(3)
        heard.clear()
        Runner(job(tmp_path, threads=None), RunOptions(), world=Told(size=2)).execute()
        assert torch.get_num_threads() == heard[0]["threads"] == 3
    finally:
        torch.set_num_threads(before)


def test_restored_state_for_a_step_outside_the_recipe(tmp_path: Path) -> None:
    runner = Runner(job(tmp_path), RunOptions())
    (tmp_path / "run").mkdir()
    with pytest.raises(UsageError, match="no stage"), runner.restored("export"):
        pass
    execute(job(tmp_path), until="quantize")
    Fake.diary.clear()
    with Runner(job(tmp_path), RunOptions()).restored("export") as (_, ctx):
        assert ctx.stage_dir == tmp_path / "run" / "extra" / "export"
    assert Fake.diary == ["restore load", "restore quantize"]
    # and the run goes on undisturbed
    assert execute(job(tmp_path)).status == "finished"
    # an artifact that has gone is no obstacle to another one
    execute(job(tmp_path, {"load": {}, "quantize": {"value": 3}, "evaluate": {}, "export": {}}))
    Fake.diary.clear()
    exporting = job(tmp_path, {"load": {}, "quantize": {"value": 3}, "evaluate": {}, "export": {}})
    with Runner(exporting, RunOptions()).restored("again"):
        assert Fake.diary == ["restore load", "restore quantize", "restore evaluate"]


def test_warnings_and_logs_end_up_in_the_log(tmp_path: Path) -> None:
    import logging
    import warnings

    def talk(stage: Fake, run: RunState, ctx: RunContext) -> None:
        logging.getLogger("llmcompress.test").info("from us")
        logging.getLogger("elsewhere").warning("from others")
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("old option", stacklevel=1)

    Fake.behaviour["load"] = talk
    execute(job(tmp_path))
    text = (tmp_path / "run" / "log.txt").read_text()
    assert "from us" in text
    assert "from others" in text
    assert "old option" in text


def test_displays_see_every_event(tmp_path: Path) -> None:
    seen: list[str] = []

    class Sink:
        def __call__(self, event: Event) -> None:
            seen.append(event.kind)

        def close(self) -> None:
            seen.append("closed")

    execute(job(tmp_path), [Sink()])
    assert seen[0] == "run_start"
    assert seen[-2:] == ["run_end", "closed"]


class Collector:
    """A sink that keeps what it is told."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass


class Told(World):
    """Two ranks of which the second is a list of what it was told."""

    def tell(self, message: Any = None, source: int = 0) -> Any:
        heard.append(message)
        return message


heard: list[Any] = []


@pytest.mark.parametrize("shared", [True, False])
def test_only_stages_that_processes_share_see_the_other_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    """One that asked the others for anything would hear them wait for another message."""
    heard.clear()
    sizes = []
    monkeypatch.setattr(Fake, "distributed", shared)
    Fake.behaviour["quantize"] = lambda stage, run, ctx: sizes.append(ctx.world.size)
    Runner(job(tmp_path), RunOptions(), world=Told(size=2)).execute()
    assert sizes == [2 if shared else 1]
    doing = [message["do"] for message in heard if message and message.get("stage") == "quantize"]
    assert doing == ["run" if shared else "restore"]


@pytest.mark.parametrize("shared", [True, False])
def test_a_follower_restores_alone_what_the_first_did_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    said = [
        {"do": "begin", "dir": str(tmp_path), "device": "cpu", "dtype": "float32", "threads": 1, "seed": 0},
        {"do": "restore", "stage": "quantize"}, {"do": "end"},
    ]  # fmt: skip
    sizes = []
    monkeypatch.setattr(World, "tell", lambda self: said.pop(0))
    monkeypatch.setattr(Fake, "distributed", shared)
    monkeypatch.setattr(Fake, "restore", lambda stage, state, ctx: sizes.append(ctx.world.size))
    made = job(tmp_path)
    follow(made.stages, made.recipe, World(rank=1, size=2))
    assert sizes == [2 if shared else 1]


def test_a_follower_computes_as_the_first_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another seed, type or folder would make other weights of its share."""
    import torch

    said: list[Any] = [
        {"do": "begin", "dir": str(tmp_path), "device": "cpu", "dtype": "bfloat16", "threads": 2, "seed": 7},
        {"do": "restore", "stage": "load"}, {"do": "run", "stage": "quantize"}, {"do": "end"},
    ]  # fmt: skip
    seen = {}

    def look(stage: Fake, run: RunState, ctx: RunContext) -> None:
        seen[stage.name] = (ctx.seed, torch.initial_seed(), ctx.dtype, ctx.stage_dir, torch.get_num_threads())

    def look_and_fail(stage: Fake, run: RunState, ctx: RunContext) -> None:
        look(stage, run, ctx)
        raise GateFailed("said by the first already")

    monkeypatch.setattr(World, "tell", lambda self: said.pop(0))
    monkeypatch.setattr(Fake, "distributed", True)
    monkeypatch.setattr(Fake, "restore", look_and_fail)
    Fake.behaviour["quantize"] = look
    made, before = job(tmp_path), torch.get_num_threads()
    (tmp_path / "stages" / "quantize").mkdir(parents=True)
    try:
        follow(made.stages, made.recipe, World(rank=1, size=2))
    finally:
        torch.set_num_threads(before)
    for name in ("load", "quantize"):
        seed = stage_seed(7, name)
        assert seen[name] == (seed, seed, "bfloat16", tmp_path / "stages" / name, 2)
    assert not said and Fake.diary == ["run quantize"]


def test_followers_find_the_folder_from_wherever_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard.clear()
    monkeypatch.chdir(tmp_path)
    made = job(Path("here"))
    Runner(made, RunOptions(), world=Told(size=2)).execute()
    assert heard[0]["do"] == "begin" and heard[0]["dir"] == str(tmp_path / "here" / "run")


def test_a_report_that_cannot_be_written_undoes_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Path) -> Path:
        raise KeyError("a figure nobody has")

    monkeypatch.setattr("llmcompress.report.build.build_report", broken)
    seen = Collector()
    outcome = execute(job(tmp_path), [seen])
    assert (outcome.status, outcome.report) == ("finished", None)
    (said,) = [event.data["text"] for event in seen.events if event.kind == "warning"]
    assert f"llmcompress report {tmp_path / 'run'}" in said
    assert "a figure nobody has" in (tmp_path / "run" / "log.txt").read_text()
    assert execute(job(tmp_path)).status == "nothing to do"


def test_a_plug_in_of_another_version_is_named_on_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Fake.behaviour["evaluate"] = lambda *_: (_ for _ in ()).throw(InputError("not yet"))
    monkeypatch.setattr(plugins, "packages", lambda: {"my-stages": "1.0"})
    with pytest.raises(InputError):
        execute(job(tmp_path))
    Fake.behaviour.clear()
    monkeypatch.setattr(plugins, "packages", lambda: {"my-stages": "2.0"})
    seen = Collector()
    execute(job(tmp_path), [seen])
    assert any("my-stages 1.0 → 2.0" in e.data["text"] for e in seen.events if e.kind == "warning")


def test_a_stray_file_among_the_stages_is_left_alone(tmp_path: Path) -> None:
    execute(job(tmp_path))
    (tmp_path / "run" / "stages" / ".DS_Store").write_text("")
    assert execute(job(tmp_path)).status == "nothing to do"
    assert execute(job(tmp_path), redo="evaluate").status == "finished"
