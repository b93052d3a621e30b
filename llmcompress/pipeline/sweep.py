"""Many runs of one recipe with different settings, several at a time, each a process of its own.

A sweep is a folder: ``sweep.json`` names the runs and what each overrides, every run has a folder beside it and is an
ordinary run. So nothing is lost when the sweep, or one of its runs, is killed: started again, finished runs are left
alone, the others resume where they stopped. A run that fails is noted and does not stop the others.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llmcompress.durable import write_durably
from llmcompress.errors import InputError, Interrupted, UsageError
from llmcompress.pipeline.device import usable_cores
from llmcompress.pipeline.run_dir import RunDir, RunLock

FORMAT = 1
MANIFEST = "sweep.json"
_NAME_LIMIT = 120
# exit codes of a run: finished, and finished with a quality gate that did not hold
_FINISHED = (0, 6)
_SAID = {0: "finished", 6: "finished, a quality gate did not hold"}


@dataclass(frozen=True, slots=True)
class SweepRun:
    """One run of a sweep.

    Attributes:
        name: Name of its folder: what it sets, ``bits=3,group_size=64``.
        values: Overrides that tell it from the others: dotted path → value as text.
        folder: Its run folder.
    """

    name: str
    values: dict[str, str]
    folder: Path

    @property
    def finished(self) -> bool:
        """Whether every stage has finished."""
        record = RunDir(self.folder).read_run()
        return record is not None and record.status == "finished"


@dataclass(frozen=True, slots=True)
class RunResult:
    """What became of a run.

    Attributes:
        run: Which run.
        status: ``finished``, ``gate failed`` or ``failed``.
        code: Exit code of its process; 0 where it was finished before.
        error: The last lines it said, when it failed.
        metrics: ``task.metric`` → value of the compressed model.
        dense: ``task.metric`` → value of the dense model, where it has one.
        stderr, difference_stderr: ``task.metric`` → standard error of the value, and of its difference to the dense
            model's, where known.
        bytes: Size of the artifact's weights, or of the packed blocks where nothing was exported.
        seconds: Wall time of its stages over all attempts.
        peak_rss_bytes: Largest of its stages.
    """

    run: SweepRun
    status: str
    code: int = 0
    error: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    dense: dict[str, float] = field(default_factory=dict)
    stderr: dict[str, float] = field(default_factory=dict)
    difference_stderr: dict[str, float] = field(default_factory=dict)
    bytes: int | None = None
    seconds: float = 0.0
    peak_rss_bytes: int = 0


def parse_axes(words: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Tell settings that vary from those that hold for every run.

    Args:
        words: ``key=a,b,c`` varies; ``key=value``, ``+key=value`` and ``key~`` do not. Commas in brackets, braces or
            quotes do not separate.

    Returns:
        Axes by dotted path, in order, and the other words.

    Raises:
        UsageError: Nothing varies, a key comes twice, or a value is empty or repeated.
    """
    axes: dict[str, list[str]] = {}
    fixed = []
    for word in words:
        key, equals, text = word.partition("=")
        values = _split(text) if equals else [text]
        if len(values) < 2:
            fixed.append(word)
            continue
        if key in axes:
            raise UsageError(f"{key} varies twice", "give all its values in one word: key=a,b,c")
        if "" in values or len(set(values)) < len(values):
            raise UsageError(f"{word}: an empty or repeated value", "write key=a,b,c with different values")
        axes[key] = values
    if not axes:
        raise UsageError("nothing varies", "llmcompress sweep RECIPE stages.quantize.rules.experts.bits=2,3,4")
    return axes, fixed


def _split(text: str) -> list[str]:
    """Parts between commas outside of brackets and quotes."""
    parts, depth, quote, start = [], 0, "", 0
    for position, sign in enumerate(text):
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "\"'":
            quote = sign
        elif sign in "[{":
            depth += 1
        elif sign in "]}":
            depth -= 1
        elif sign == "," and depth == 0:
            parts.append(text[start:position].strip())
            start = position + 1
    return [*parts, text[start:].strip()]


def combinations(axes: dict[str, list[str]], folder: Path) -> list[SweepRun]:
    """Every combination of the axes' values, the last axis fastest."""
    short = _short_names(list(axes))
    runs = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        text = ",".join(f"{short[key]}={value}" for key, value in chosen.items())
        name = re.sub(r"[^A-Za-z0-9_.,=+-]+", "_", text)[:_NAME_LIMIT]
        runs.append(SweepRun(name, chosen, folder / name))
    if len({run.name for run in runs}) < len(runs):
        # values that differ only in signs a file name cannot hold
        runs = [SweepRun(f"{n:03d},{r.name}", r.values, folder / f"{n:03d},{r.name}") for n, r in enumerate(runs)]
    return runs


def _short_names(keys: Sequence[str]) -> dict[str, str]:
    """The shortest ends of dotted paths that tell them apart."""
    found = {}
    for key in keys:
        parts = key.lstrip("+").split(".")
        ends = [".".join(parts[-n:]) for n in range(1, len(parts) + 1)]
        others = [other.lstrip("+") for other in keys if other != key]
        found[key] = next((e for e in ends if not any(o == e or o.endswith(f".{e}") for o in others)), ends[-1])
    return found


class Sweep:
    """Runs what is not finished.

    Args:
        recipe: Recipe file or name, as on the command line.
        fixed: Overrides of every run.
        runs: What to run.
        folder: The sweep's folder.
        jobs: Runs at a time.
        tell: Receives a line when a run begins or ends.
        holds: Whether a finished run is of the recipe, model and texts as they are now; others are run again, and
            keep, redo or refuse what an ordinary ``run`` does. Asked once of a run.
        again: The command that goes on after a stop.
    """

    def __init__(
        self,
        recipe: str,
        fixed: Sequence[str],
        runs: Sequence[SweepRun],
        folder: Path,
        jobs: int,
        tell: Callable[[str], None],
        holds: Callable[[SweepRun], bool],
        again: str,
    ) -> None:
        self.recipe, self.fixed, self.runs, self.folder = recipe, list(fixed), list(runs), folder
        self.jobs, self.tell, self.holds, self.again = max(1, jobs), tell, holds, again
        self._held: dict[str, bool] = {}
        self._children: set[subprocess.Popen[str]] = set()
        self._guard = threading.Lock()
        self._stopped = False

    def execute(self) -> list[RunResult]:
        """Run, and resume, what is not finished; then read what all runs have measured.

        Raises:
            UsageError: The folder holds another sweep.
            EnvironmentProblem: Another process is running it.
            Interrupted: Ctrl-C, SIGTERM or SIGHUP; the same command continues.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with RunLock(self.folder, "choose another --dir"), self._listening():
            self._claim()
            pending = self.pending()
            if len(pending) < len(self.runs):
                self.tell(f"{len(self.runs) - len(pending)} of {len(self.runs)} runs are finished already")
            codes: dict[str, tuple[int, str]] = {}
            with ThreadPoolExecutor(self.jobs) as pool:
                for run, outcome in zip(pending, pool.map(self._one, pending)):
                    codes[run.name] = outcome
            if self._stopped:
                raise Interrupted("the sweep was stopped; finished runs and blocks are kept", self.again)
            return [result_of(run, *codes.get(run.name, (0, ""))) for run in self.runs]

    def pending(self) -> list[SweepRun]:
        """Those of its runs that are still to be done: not finished, or finished by other recipes, models or texts."""
        finished = [run for run in self.runs if run.finished]
        self._held |= {run.name: self.holds(run) for run in finished if run.name not in self._held}
        held = {run.name for run in finished if self._held[run.name]}
        return [run for run in self.runs if run.name not in held]

    def join(self) -> None:
        """Take in the runs that an earlier sweep of this folder has named. Only reads.

        More values may be added to a sweep; none may be lost from its table.

        Raises:
            UsageError: The folder holds another sweep.
            InputError: Its manifest is damaged.
        """
        path = self.folder / MANIFEST
        runs: dict[str, dict[str, str]] = {}
        if path.exists():
            try:
                before = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise InputError(f"{path}: damaged ({error})", "delete it and start the sweep again") from error
            if {k: before.get(k) for k in ("recipe", "fixed")} != {"recipe": self.recipe, "fixed": self.fixed}:
                raise UsageError(f"{self.folder}: holds a sweep with other settings", "choose another --dir")
            runs.update(before.get("runs", {}))
        for run in self.runs:
            # a run is known by what it sets: beside values that read alike in a folder's name it is called otherwise
            if run.values not in runs.values():
                names = itertools.chain([run.name], (f"{n:03d},{run.name}" for n in itertools.count()))
                runs[next(name for name in names if name not in runs)] = run.values
        self.runs = [SweepRun(name, values, self.folder / name) for name, values in runs.items()]

    def _claim(self) -> None:
        """Write the manifest, after what the one there says."""
        self.join()
        runs = {run.name: run.values for run in self.runs}
        manifest = {"format": FORMAT, "recipe": self.recipe, "fixed": self.fixed, "runs": runs}
        write_durably(self.folder / MANIFEST, json.dumps(manifest, indent=1).encode())

    def _one(self, run: SweepRun) -> tuple[int, str]:
        """Run one in a process of its own; exit code and what it said."""
        words = [*self.fixed, *(f"{key}={value}" for key, value in run.values.items())]
        folder = json.dumps(str(run.folder), ensure_ascii=False)
        command = [sys.executable, "-m", "llmcompress", "run", self.recipe, *words, f"run.dir={folder}", "--quiet"]
        with self._guard:
            if self._stopped:
                return 130, ""
            self.tell(f"{run.name}: begins")
            # a group of its own: Ctrl-C reaches the sweep, which asks its runs to stop after their block
            child = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True,
                env={**os.environ, **self._threads(), "COLUMNS": "200"},
            )  # fmt: skip
            self._children.add(child)
            if self._stopped:  # while it was started: nobody has told it
                os.killpg(child.pid, signal.SIGTERM)
        _, said = child.communicate()
        with self._guard:
            self._children.discard(child)
        done = _SAID.get(child.returncode, f"ended with exit code {child.returncode}")
        self.tell(f"{run.name}: {done}")
        return child.returncode, said.strip()

    def _threads(self) -> dict[str, str]:
        """Share of the processors for a run that begins now; a setting of the recipe, and of a resumed run, goes first.

        In the environment and not among the overrides, because the number of runs at a time is no part of a sweep.
        """
        if self.jobs == 1 or "OMP_NUM_THREADS" in os.environ:
            return {}
        return {"OMP_NUM_THREADS": str(max(1, usable_cores() // self.jobs))}

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Turn Ctrl-C, SIGTERM and a terminal that goes into requests to the runs to stop; a second one kills them.

        Runs have sessions of their own: without this they would outlive the terminal, and hold their folders.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM]
        # nohup has it ignored
        numbers += [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN else []
        before = {number: signal.signal(number, self._stop) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: Any) -> None:
        # not under the guard: the handler may interrupt the thread that holds it
        again, self._stopped = self._stopped, True
        for child in list(self._children):
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL if again else signal.SIGTERM)


def result_of(run: SweepRun, code: int = 0, said: str = "") -> RunResult:
    """What a run's folder holds.

    Args:
        run: Which run.
        code: Exit code of its process.
        said: What it wrote to stderr.
    """
    folder = RunDir(run.folder)
    begun, record = sorted(path.name for path in run.folder.glob("stages/*")), folder.read_run()
    # in the order of the recipe: what the last stage has measured is said of the finished model
    names = begun if record is None else [name for name in record.stages if name in begun]
    records = [known for name in names if (known := folder.read_stage(name)) is not None]
    # columns of a metric: in what is kept → here
    found: dict[str, dict[str, float]] = {"compressed": {}, "dense": {}, "stderr": {}, "difference_stderr": {}}
    # what a run refused to go on with was measured by another recipe
    stale = run.finished and code not in _FINISHED
    for path in () if stale else (folder.stage_dir(name) / "metrics.json" for name in names):
        for row in json.loads(path.read_text(encoding="utf-8")) if path.is_file() else ():
            name = f"{row['task']}.{row['metric']}"
            for column, values in found.items():
                if "stderr" in column:
                    values.pop(name, None)  # of a stage before, whose value no longer counts
                if row.get(column) is not None:
                    values[name] = float(row[column])
    status = "failed"
    if run.finished and not stale:
        status = "gate failed" if any(record.gate_failure for record in records) else "finished"
    return RunResult(
        run=run,
        status=status,
        code=code,
        error="" if status != "failed" else (said or f"exit code {code}"),
        metrics=found["compressed"],
        dense=found["dense"],
        stderr=found["stderr"],
        difference_stderr=found["difference_stderr"],
        bytes=None if stale else _weight_bytes(run.folder),
        seconds=round(sum(record.seconds for record in records), 3),
        peak_rss_bytes=max((record.peak_rss_bytes for record in records), default=0),
    )


def _weight_bytes(folder: Path) -> int | None:
    # a format beside the native one, where that is all a run exports; both hold embeddings too, blocks do not
    kinds = ("artifact/*.safetensors", "artifact-*/*.gguf", "artifact-*/*.safetensors", "stages/*/blocks/*.safetensors")
    for pattern in kinds:
        found = sorted(folder.glob(pattern))
        # each format has a folder of its own, while blocks of one stage lie above those of another
        if not pattern.startswith("stages"):
            found = [path for path in found if path.parent == found[0].parent]
        if found:
            return sum(path.stat().st_size for path in found)
    return None


def pareto(points: Sequence[tuple[float, float]], higher_is_better: bool) -> list[bool]:
    """Which points no other beats: none is as small and better, or as good and smaller.

    Args:
        points: ``(bytes, quality)``.
        higher_is_better: Direction of quality.
    """
    sign = -1.0 if higher_is_better else 1.0
    found = []
    for size, quality in points:
        beaten = any(
            other <= size and sign * value <= sign * quality and (other < size or sign * value < sign * quality)
            for other, value in points
        )
        found.append(not beaten)
    return found
