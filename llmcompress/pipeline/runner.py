"""Runs the stages of a recipe in a run folder: resume, gates, signals, records, report.

Every stage runs at most once to its end. What a stage depended on is recorded as a fingerprint,
so that a later start knows which stages still hold, which must be done again, and when
continuing would silently mix two recipes (then it refuses and shows the difference).
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from llmcompress.distributed.world import ALONE, World
from llmcompress.errors import GateFailed, Interrupted, RecipeError, UsageError, command_line
from llmcompress.evaluation.gates import failed as failed_gates
from llmcompress.events import Event
from llmcompress.models.heap import give_back_memory, keep_freed_memory
from llmcompress.pipeline import device as devices
from llmcompress.pipeline.fingerprint import difference, digest, inputs_of, with_contents
from llmcompress.pipeline.followers import END, policy
from llmcompress.pipeline.preflight import Extent
from llmcompress.pipeline.run_dir import RunDir, RunLock, RunRecord, StageRecord
from llmcompress.pipeline.sinks import Fanout, JsonlSink, Sink
from llmcompress.quant.store import PackedStore
from llmcompress.recipe.lock import versions as installed_versions
from llmcompress.stages.base import Kind, Stage
from llmcompress.stages.state import Metric, RunContext, RunState

# a changed stage of these kinds is done again without asking: nothing costly is thrown away
CHEAP_KINDS = frozenset({Kind.METRICS, Kind.ARTIFACT, Kind.POLICY})


@dataclass(frozen=True, slots=True)
class Job:
    """A validated recipe, ready to run.

    Attributes:
        recipe: The resolved recipe as plain data (sections ``model``, ``run``, ``stages``).
        stages: Its stages, built, in order.
        source: Text of the recipe file as given.
        lock: Makes the content of ``recipe.lock.json``; called when it is written, because it hashes every input file.
    """

    recipe: dict[str, Any]
    stages: Sequence[Stage]
    source: str
    lock: Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class RunOptions(Extent):
    """How far to go, and who looks on.

    Attributes:
        trackers: Builds further sinks once the folder exists.
    """

    trackers: Callable[[Path], list[Sink]] | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run came to.

    Attributes:
        run_dir: Its folder.
        status: ``finished``, ``stopped`` (``until`` or ``only``) or ``nothing to do``.
        stages: Records of the stages that have begun, in order.
        metrics: Everything measured, by this command or before.
        artifacts: Format → folder.
        report: The report, None if it was not written.
    """

    run_dir: Path
    status: Literal["finished", "stopped", "nothing to do"]
    stages: tuple[StageRecord, ...]
    metrics: tuple[Metric, ...] = ()
    artifacts: dict[str, Path] = field(default_factory=dict)
    report: Path | None = None

    @property
    def gate_failures(self) -> list[str]:
        """What the quality gates said, empty when all held."""
        return [record.gate_failure for record in self.stages if record.gate_failure]


class StopRequested(KeyboardInterrupt):
    """SIGTERM arrived. Like Ctrl-C it passes through libraries that catch ``Exception``."""


class Stopper:
    """Turns SIGTERM into :class:`StopRequested` at the next moment where nothing is lost.

    Between ``block_start`` and ``block_end`` it waits for the block; elsewhere, and at the second
    signal, it stops at once. That is safe at any moment; waiting only saves the block's work.
    """

    def __init__(self) -> None:
        self._in_block = False
        self._asked = False

    def __call__(self, event: Event) -> None:
        """Watch blocks go by; the last sink of a run.

        Raises:
            StopRequested: A stop was asked for and the block has ended.
        """
        if event.kind == "block_start":
            self._in_block = True
        elif event.kind in ("block_end", "stage_end"):
            self._in_block = False
            if self._asked:
                raise StopRequested(f"stopped by a signal after a block of stage {event.stage}")

    def close(self) -> None:
        """Nothing to release."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle SIGTERM inside the block; outside the main thread signals cannot be handled and are left alone."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = signal.signal(signal.SIGTERM, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._asked or not self._in_block:
            raise StopRequested("stopped by a signal")
        self._asked = True


class Runner:
    """Executes one job.

    Args:
        job: What to run.
        options: How far.
        sinks: Displays; ``events.jsonl`` is added here.
        world: The processes that work on it; this one has rank 0.
    """

    def __init__(self, job: Job, options: RunOptions, sinks: Sequence[Sink] = (), world: World = ALONE) -> None:
        self.world = world
        self.job = job
        self.options = options
        self.dir = RunDir(Path(job.recipe["run"]["dir"]))
        self.state = RunState()
        self._displays = sinks
        self._emit = Fanout(())
        self._names = [stage.name for stage in job.stages]

    def execute(self) -> Outcome:
        """Run what is not done yet.

        Returns:
            What was done. Quality gates that failed are in it, not raised.

        Raises:
            UsageError: The options name no stage, or the folder is not a run's.
            RecipeError: The recipe changed in a way that would throw finished work away.
            EnvironmentProblem: The folder cannot be used, or is in use.
            Interrupted: Ctrl-C or SIGTERM; resume continues.
            LLMCompressError: Whatever a stage raises.
        """
        self._check_options()
        self.dir.create()
        with RunLock(self.dir.root):
            if self.options.force:
                self.dir.clear()
            record = self._policy()
            prints = self._fingerprints(record.root)
            settled = self._settle(prints, record.root)
            if settled and self._already_finished():
                self.world.tell(END)
                return self._recorded()
            self.dir.write_run(record)
            self.dir.write_recipe(self.job.source, self.job.lock())
            return self._run(prints, record)

    def up_to_date(self) -> bool:
        """Whether the folder holds this very run, finished: recipe, model and texts as they are now. Only reads."""
        if not self.dir.is_run() or not self._already_finished():
            return False
        prints = self._fingerprints(self._policy().root)
        kept = {path.parent.name for path in self.dir.root.glob("stages/*/state.json")}
        same = all((record.fingerprint, record.inputs) == prints[record.name] for record in self._records())
        return same and kept == set(self._names)

    @contextmanager
    def restored(self, name: str) -> Iterator[tuple[RunState, RunContext]]:
        """State as the run's finished stages left it, for one more step outside the recipe.

        The folder is locked for the length of the ``with`` block.

        Args:
            name: Name of the step; its folder is ``extra/<name>`` in the run folder.

        Raises:
            UsageError: No stage has finished.
        """
        with RunLock(self.dir.root):
            record = self.dir.read_run()
            finished = [s for s in self.job.stages if (r := self.dir.read_stage(s.name)) is not None and r.finished()]
            if record is None or not finished:
                raise UsageError(
                    f"{self.dir.root}: no stage of this run has finished",
                    command_line("resume", self.dir.root),
                )
            self._emit = Fanout(self._displays)
            devices.set_threads(record.threads or None)
            try:
                for stage in finished:
                    # an artifact that was moved away is no obstacle to writing another
                    if stage.produces != {Kind.ARTIFACT}:
                        self._restore(stage, self._context(stage, record))
                folder = self.dir.root / "extra" / name
                folder.mkdir(parents=True, exist_ok=True)
                seed = devices.stage_seed(int(record.root["run"]["seed"]), name)
                yield (
                    self.state,
                    RunContext(
                        self.dir.root, name, folder, seed, record.device, record.dtype, self.job.recipe, self._emit
                    ),
                )
            finally:
                self._emit.close()

    def _check_options(self) -> None:
        for option in ("until", "only", "redo"):
            name = getattr(self.options, option)
            if name is not None and name not in self._names:
                raise UsageError(f"--{option} {name}: no such stage", f"choose one of {', '.join(self._names)}")
        if self.options.until and self.options.only:
            raise UsageError("--until and --only exclude each other", "give one of them")

    def _policy(self) -> RunRecord:
        """Device, dtype and threads: the recipe's, else those the run began with, else this machine's."""
        wanted, before = self.job.recipe["run"], self.dir.read_run()
        choice = wanted.get("device", "auto")
        if choice == "auto" and before is not None:
            choice = before.device
        device = choice if choice == "cpu" else devices.resolve_device(choice)
        dtype = devices.resolve_dtype(wanted.get("compute_dtype", "auto"), device)
        seed = int(wanted.get("seed", 0))
        root = {
            "model": with_contents(self.job.recipe.get("model", {})),
            "run": {"seed": seed, "device": device, "compute_dtype": dtype},
        }
        threads = wanted.get("threads")
        if wanted.get("deterministic"):
            root["run"]["deterministic"] = True
            threads = threads or 1
        if threads in (None, "auto"):
            threads = before.threads if before is not None and self.world.size == 1 else 0
        name, versions = str(self.job.recipe.get("name", "run")), before.versions if before else {}
        return RunRecord(name, "running", device, dtype, int(threads), root, list(self._names), versions)

    def _fingerprints(self, root: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
        """Stage name → (fingerprint, what it was computed from without the stages before)."""
        found: dict[str, tuple[str, dict[str, Any]]] = {}
        upstream = digest(root)
        for stage in self.job.stages:
            inputs = inputs_of(stage)
            counted = {key: value for key, value in inputs.items() if key not in stage.judging}
            upstream = digest({"inputs": counted, "name": stage.name, "upstream": upstream})
            found[stage.name] = (upstream, inputs)
        return found

    def _settle(self, prints: Mapping[str, tuple[str, dict[str, Any]]], root: dict[str, Any]) -> bool:
        """Discard what no longer holds, or refuse when that would lose finished work.

        Returns:
            Whether everything recorded still holds.
        """
        stale = next((n for n in self._names if not self._holds(n, prints[n][0])), None)
        # files that a desktop or a network file system leaves there are no stages
        folders = (path.name for path in (self.dir.root / "stages").iterdir() if path.is_dir())
        gone = sorted(name for name in folders if name not in self._names)
        first = end = len(self._names) if stale is None else self._names.index(stale)
        if self.options.redo is not None:
            end = self._names.index(self.options.redo)
            self._refuse_changes(self._names[first:end], [], prints, root)
            first = min(first, end)
        else:
            self._refuse_changes(self._names[first:], gone, prints, root)
        discarded = [*(n for n in self._names[first:] if self.dir.stage_dir(n).exists()), *gone]
        for name in reversed(discarded):
            self.dir.discard_stage(name)
        judged = [r for r in self._records() if r.inputs != prints[r.name][1]]
        for record in judged:
            self.dir.write_stage(replace(record, status="running", inputs=prints[record.name][1]))
        return not discarded and not judged

    def _holds(self, name: str, fingerprint: str) -> bool:
        """Whether what is recorded of a stage (finished or partly done) belongs to this recipe."""
        record = self.dir.read_stage(name)
        if record is None:
            return not self.dir.stage_dir(name).exists()
        return record.fingerprint == fingerprint

    def _refuse_changes(
        self, names: Sequence[str], gone: Sequence[str],
        prints: Mapping[str, tuple[str, dict[str, Any]]], root: dict[str, Any],
    ) -> None:  # fmt: skip
        lost: dict[str, str] = {}
        changes: list[str] = []
        for name in [*names, *gone]:
            record = self.dir.read_stage(name)
            if record is None:
                continue
            if name in gone:
                changes.append(f"stages.{name}: removed or renamed")
            else:
                changes += difference(record.inputs, prints[name][1], f"stages.{name}")
            blocks = len(PackedStore(self.dir.stage_dir(name) / "blocks").finished())
            if blocks and not record.finished():
                lost[name] = f"{name}: {blocks} block{'s' * (blocks > 1)}"
            elif record.finished() and not {Kind(k) for k in record.produces} <= CHEAP_KINDS:
                lost[name] = name
        if not lost:
            return
        before = self.dir.read_run()
        changes = (difference(before.root, root, "") if before else []) + changes
        changes = changes or ["a stage was added, or the order of stages or rules has changed"]
        listing = "\n  ".join(changes)
        again = next((f"--redo {n} to do it again, " for n in lost if n in self._names), "")
        raise RecipeError(
            f"{self.dir.root}: this run was made with another recipe, and going on would throw away "
            f"finished work ({', '.join(lost.values())}):\n  {listing}",
            f"set run.dir to a new folder, {again}or --force to start anew",
        )

    def _already_finished(self) -> bool:
        run = self.dir.read_run()
        done = all((r := self.dir.read_stage(n)) is not None and r.finished() for n in self._names)
        target = self.options.only or self.options.until
        if target is not None:
            reached = self.dir.read_stage(target)
            return reached is not None and reached.finished()
        return done and run is not None and run.status == "finished"

    def _records(self) -> tuple[StageRecord, ...]:
        found = (self.dir.read_stage(name) for name in self._names)
        return tuple(record for record in found if record is not None)

    def _recorded(self) -> Outcome:
        """The outcome of a run that was finished before, as its last command told it."""
        from llmcompress.stages.metrics import FILE, read_metrics

        records = self._records()
        folders = [self.dir.stage_dir(record.name) for record in records if record.finished()]
        metrics = [m for folder in folders if (folder / FILE).is_file() for m in read_metrics(folder)]
        artifacts = {n: self.dir.recorded_path(text) for record in records for n, text in record.artifacts.items()}
        return Outcome(self.dir.root, "nothing to do", records, tuple(metrics), artifacts, self._report_path())

    def _report_path(self) -> Path | None:
        return self.dir.report if self.dir.report.exists() else None

    def _run(self, prints: Mapping[str, tuple[str, dict[str, Any]]], record: RunRecord) -> Outcome:
        stopper = Stopper()
        self._emit = Fanout([JsonlSink(self.dir.root / "events.jsonl"), *self._displays])
        status = "failed"
        with stopper.listening(), _logging_to(self.dir.log):
            try:
                for sink in self.options.trackers(self.dir.root) if self.options.trackers else []:
                    self._emit.append(sink)
                self._emit.append(stopper)
                record = self._prepare(record)
                self.world.tell(policy(record, self.job.recipe))
                self._send("run_start", name=record.name, dir=str(self.dir.root), device=record.device,
                           dtype=record.dtype, threads=record.threads)  # fmt: skip
                complete = self._stages(prints, record)
                self.world.tell(END)
                outcome = self._finish(record, complete)
                status = outcome.status
                return outcome
            except (KeyboardInterrupt, Interrupted) as stop:
                status = "interrupted"
                reason = str(stop) or "stopped by Ctrl-C"
                raise Interrupted(
                    f"{reason}; finished blocks are kept", command_line("resume", self.dir.root)
                ) from stop
            finally:
                self._emit.quietly(Event("run_end", "", {"status": status}))
                self._emit.close()

    def _prepare(self, record: RunRecord) -> RunRecord:
        """Put the policy into force and record it with the versions at work."""
        threads = devices.set_threads(record.threads or None)
        devices.make_deterministic()
        keep_freed_memory(sparing=devices.ram_budget(self.job.recipe) is not None)
        versions = installed_versions()
        changed = [f"{n} {v} → {versions[n]}" for n, v in record.versions.items() if versions.get(n) != v]
        if changed:
            self._send("warning", text=f"versions have changed since this run began: {', '.join(changed)}")
        record = replace(record, threads=threads, versions=record.versions or versions)
        self.dir.write_run(record)
        return record

    def _stages(self, prints: Mapping[str, tuple[str, dict[str, Any]]], record: RunRecord) -> bool:
        """Restore or run each stage; return whether all are finished."""
        count = len(self._names)
        for position, stage in enumerate(self.job.stages, start=1):
            known = self.dir.read_stage(stage.name)
            ctx = self._context(stage, record)
            label = {"position": position, "count": count, "type": stage.config.type}
            if known is not None and known.finished():
                self._send("stage_skip", stage.name, **label)
                self._restore(stage, ctx)
                self.world.tell({"do": "restore", "stage": stage.name})
            elif self.options.only not in (None, stage.name):
                raise UsageError(
                    f"--only {self.options.only}: stage {stage.name} before it is not finished",
                    f"llmcompress run … --until {self.options.only}",
                )
            else:
                self._send("stage_start", stage.name, **label)
                if stage.distributed:
                    self.world.tell({"do": "run", "stage": stage.name})
                self._run_stage(stage, ctx, prints[stage.name], known)
                if not stage.distributed:
                    self.world.tell({"do": "restore", "stage": stage.name})
                self._send("stage_end", stage.name, **label)
            if stage.name in (self.options.until, self.options.only):
                return position == count
        return True

    def _context(self, stage: Stage, record: RunRecord) -> RunContext:
        folder = self.dir.stage_dir(stage.name)
        folder.mkdir(parents=True, exist_ok=True)
        seed = devices.stage_seed(int(record.root["run"]["seed"]), stage.name)
        ram = devices.ram_above_baseline(devices.ram_budget(self.job.recipe), record.device)
        return RunContext(
            self.dir.root, stage.name, folder, seed, record.device, record.dtype, self.job.recipe, self._emit, ram,
            self.world if stage.distributed else ALONE,
        )  # fmt: skip

    def _restore(self, stage: Stage, ctx: RunContext) -> None:
        devices.seed_everything(ctx.seed)
        # a failed gate was recorded when the stage ran
        with suppress(GateFailed):
            stage.restore(self.state, ctx)

    def _run_stage(
        self, stage: Stage, ctx: RunContext, prints: tuple[str, dict[str, Any]], known: StageRecord | None
    ) -> None:
        begun, before = time.monotonic(), dict(self.state.artifacts)
        kinds = sorted(kind.value for kind in stage.produces)
        old = known or StageRecord(stage.name, stage.config.type, "running", prints[0], prints[1], kinds, ctx.seed)
        record = replace(old, attempts=old.attempts + 1)
        self.dir.write_stage(record)
        devices.seed_everything(ctx.seed)
        # what one stage left in the heap is not the next one's need
        give_back_memory()
        devices.reset_peaks()
        done, gate = False, None
        try:
            try:
                stage.run(self.state, ctx)
            except GateFailed as failure:
                gate = failure.message
            else:
                gate = "\n".join(failed_gates(ctx.stage_dir)) or None
            if gate is not None:
                self._send("warning", stage.name, text=gate)
            done = True
        finally:
            new = {k: self.dir.kept_path(v) for k, v in self.state.artifacts.items() if before.get(k) != v}
            self.dir.write_stage(replace(
                record, status="finished" if done else "running", gate_failure=gate, artifacts=new,
                seconds=round(record.seconds + time.monotonic() - begun, 3),
                peak_rss_bytes=max(record.peak_rss_bytes, devices.peak_rss()),
                peak_vram_bytes=max(record.peak_vram_bytes, devices.peak_vram()),
            ))  # fmt: skip

    def _finish(self, record: RunRecord, complete: bool) -> Outcome:
        """Write the report, then the record that says finished."""
        from llmcompress.report.build import build_report

        records = self._records()
        peak, seconds = max(r.peak_rss_bytes for r in records), round(sum(r.seconds for r in records), 3)
        record = replace(record, peak_rss_bytes=peak, seconds=seconds)
        self.dir.write_run(record)
        try:
            build_report(self.dir.root)
        except Exception:  # the page is made of what is kept: no fault of it may undo a run
            logging.getLogger(__name__).exception("the report cannot be written")
            again = command_line("report", self.dir.root)
            self._send(
                "warning", text=f"the report could not be written ({self.dir.log} has why); to try again: {again}"
            )
        self.dir.write_run(replace(record, status="finished" if complete else "running"))
        status: Literal["finished", "stopped"] = "finished" if complete else "stopped"
        artifacts = dict(self.state.artifacts)
        return Outcome(self.dir.root, status, records, tuple(self.state.metrics), artifacts, self._report_path())

    def _send(self, kind: Any, stage: str = "", **data: Any) -> None:
        self._emit(Event(kind, stage, data))


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Send logs (ours from INFO, others from WARNING) and Python warnings to a file."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root, own = logging.getLogger(), logging.getLogger("llmcompress")
    level = own.level
    root.addHandler(handler)
    own.setLevel(logging.INFO)
    logging.captureWarnings(True)
    try:
        yield
    finally:
        logging.captureWarnings(False)
        own.setLevel(level)
        root.removeHandler(handler)
        handler.close()
