"""Where events go: a live display, plain lines, ``events.jsonl``, TensorBoard, trackio, Weights & Biases.

A sink is called with every :class:`~llmcompress.events.Event` in order and closed at the end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import statistics
import time
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from llmcompress.errors import EnvironmentProblem
from llmcompress.events import Event, duration

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

TRACKERS = ("tensorboard", "trackio", "wandb")


class Sink(Protocol):
    """Something that wants to know what happens."""

    def __call__(self, event: Event) -> None:
        """Take one event."""

    def close(self) -> None:
        """Flush and release; called once."""


class BlockClock:
    """Remaining time of a stage from the blocks it has finished.

    The first block of a stage warms caches and compiles kernels, so nothing is said before the second.
    """

    def __init__(self) -> None:
        self._seconds: list[float] = []
        self._begun: float | None = None

    def start_block(self, now: float) -> None:
        """Note that a block begins."""
        self._begun = now

    def end_block(self, now: float) -> float | None:
        """Note that it ends; return its seconds, or None if its start was not seen."""
        if self._begun is None:
            return None
        seconds = now - self._begun
        self._begun = None
        self._seconds.append(seconds)
        return seconds

    def remaining(self, blocks: int) -> float | None:
        """Seconds for ``blocks`` more blocks, None before two have finished."""
        if len(self._seconds) < 2:
            return None
        return statistics.median(self._seconds[1:]) * blocks


def _figure(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.5g}"
    return str(value)


class PlainSink:
    """One line per stage and block, for logs and pipes.

    Args:
        stream: Where lines go, normally stderr.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._clock = BlockClock()
        self._stage_begun = 0.0

    def __call__(self, event: Event) -> None:
        """Print what a person would want to read."""
        data = event.data
        label = f"[{data['position']}/{data['count']}] " if "position" in data else ""
        match event.kind:
            case "run_start":
                self._line(f"run {data.get('name', '')} in {data.get('dir', '')}")
            case "stage_skip":
                self._line(f"{label}{event.stage}: already done")
            case "stage_start":
                self._clock, self._stage_begun = BlockClock(), event.time
                self._line(f"{label}{event.stage} ({data.get('type', '')})")
            case "stage_end":
                self._line(f"  {event.stage} took {duration(event.time - self._stage_begun)}")
            case "block_start":
                self._clock.start_block(event.time)
            case "block_end":
                self._block_end(event)
            # points of a curve go to files and trackers; the stage says in words how it is going
            case "metric" if data.get("step") is None:
                self._line(f"  {data.get('name')} = {_figure(data.get('value'))}")
            case "note":
                self._line(f"  {data.get('text', '')}")
            case "warning":
                self._line(f"warning: {event.stage + ': ' if event.stage else ''}{data.get('text', '')}")

    def _block_end(self, event: Event) -> None:
        index, total = int(event.data.get("index", 0)), int(event.data.get("total", 0))
        seconds = self._clock.end_block(event.time)
        took = f" {duration(seconds)}" if seconds is not None else ""
        left = self._clock.remaining(total - index - 1)
        eta = f", about {duration(left)} left" if left else ""
        self._line(f"  {event.stage}: block {index + 1}/{total}{took}{eta}")

    def _line(self, text: str) -> None:
        # `run … 2>&1 | head`, or `2> LOG` on a disk that is full: nobody reads along, and the run goes on
        with contextlib.suppress(OSError):
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Nothing to release."""


class QuietSink:
    """Warnings only.

    Args:
        stream: Where they go.
    """

    def __init__(self, stream: TextIO) -> None:
        self._plain = PlainSink(stream)

    def __call__(self, event: Event) -> None:
        """Print a warning, drop the rest."""
        if event.kind == "warning":
            self._plain(event)

    def close(self) -> None:
        """Nothing to release."""


class RichSink:
    """Live display: finished stages as lines, the running one as a bar with blocks and remaining time.

    Args:
        console: Console on stderr.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._clock = BlockClock()
        self._begun = 0.0
        self._progress: Progress | None = None
        self._task: Any = None

    def __call__(self, event: Event) -> None:
        """Update the display."""
        data = event.data
        label = f"[{data['position']}/{data['count']}]" if "position" in data else ""
        match event.kind:
            case "run_start":
                self._print(f"[bold]{data.get('name', '')}[/] → {data.get('dir', '')}")
            case "stage_skip":
                self._print(f"[dim]{label} {event.stage}: already done[/]", markup_label=label)
            case "stage_start":
                self._start_stage(event, label)
            case "stage_end":
                self._stop_bar()
                self._print(f"[green]✓[/] {event.stage} [dim]{duration(event.time - self._begun)}[/]")
            case "block_start":
                self._clock.start_block(event.time)
                self._update(event, int(data.get("index", 0)), doing=True)
            case "block_end":
                self._clock.end_block(event.time)
                self._update(event, int(data.get("index", 0)) + 1, doing=False)
            case "metric" if data.get("step") is None:
                self._print(f"  [cyan]{data.get('name')}[/] {_figure(data.get('value'))}")
            case "note":
                self._plain(f"  {data.get('text', '')}")
            case "warning":
                self._plain(f"warning: {event.stage + ': ' if event.stage else ''}{data.get('text', '')}", "yellow")

    def _start_stage(self, event: Event, label: str) -> None:
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        self._stop_bar()
        self._clock, self._begun = BlockClock(), event.time
        self._progress = Progress(
            SpinnerColumn(), TextColumn("{task.description}", markup=False), BarColumn(bar_width=24),
            TextColumn("{task.fields[state]}", markup=False), TimeElapsedColumn(),
            console=self._console, transient=True, refresh_per_second=4,
        )  # fmt: skip
        name = f"{label} {event.stage} ({event.data.get('type', '')})".strip()
        self._task = self._progress.add_task(name, total=None, state="")
        self._progress.start()

    def _update(self, event: Event, done: int, *, doing: bool) -> None:
        if self._progress is None:
            return
        total = int(event.data.get("total", 0))
        left = self._clock.remaining(total - done)
        state = f"block {min(done + doing, total)}/{total}" + (f", about {duration(left)} left" if left else "")
        self._progress.update(self._task, total=total, completed=done, state=state)

    def _print(self, text: str, markup_label: str = "") -> None:
        # "[1/7]" must not be read as markup
        self._console.print(text.replace(markup_label, "\\" + markup_label) if markup_label else text, highlight=False)

    def _plain(self, text: str, style: str | None = None) -> None:
        self._console.print(text, style=style, markup=False, highlight=False)

    def _stop_bar(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        """Take the bar off the screen."""
        self._stop_bar()


class JsonlSink:
    """``events.jsonl``: one JSON object per line, appended and flushed per line.

    A line cut short by a kill is dropped when the file is opened again, so every line always parses.

    Args:
        path: The file, created if missing.
    """

    def __init__(self, path: Path) -> None:
        _drop_partial_line(path)
        self._handle = path.open("a", encoding="utf-8", buffering=1)

    def __call__(self, event: Event) -> None:
        """Append one line."""
        record = {"time": round(event.time, 3), "kind": event.kind, "stage": event.stage, "data": event.data}
        self._handle.write(json.dumps(record, default=str) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._handle.close()


def _drop_partial_line(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    with path.open("rb+") as handle:
        data = handle.read()
        if not data.endswith(b"\n"):
            handle.truncate(data.rfind(b"\n") + 1)


class TensorBoardSink:
    """Scalars for TensorBoard.

    Args:
        folder: Log folder.

    Raises:
        EnvironmentProblem: tensorboard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EnvironmentProblem(
                f"tensorboard is not installed ({error})", "pip install 'llmcompress[track]'"
            ) from error
        self._writer: Any = SummaryWriter(str(folder))
        self._steps: dict[str, int] = {}

    def __call__(self, event: Event) -> None:
        """Write metrics and block seconds."""
        for name, value, step in _scalars(event):
            at = self._steps.get(name, -1) + 1 if step is None else step
            self._steps[name] = at
            self._writer.add_scalar(name, value, at)

    def close(self) -> None:
        """Flush."""
        self._writer.close()


class RunTrackerSink:
    """Metrics for trackio or for Weights & Biases, whose interface trackio shares.

    Args:
        package: ``trackio`` or ``wandb``.
        folder: Folder of the run; wandb keeps its files in there, and only there with ``WANDB_MODE=offline``.
        project: Project name.
        name: Run name.
        config: The resolved recipe.

    Raises:
        EnvironmentProblem: The package is not installed, or it cannot log in.
    """

    def __init__(self, package: str, folder: Path, project: str, name: str, config: Any) -> None:
        try:
            self._tracker: Any = importlib.import_module(package)
        except ImportError as error:
            raise EnvironmentProblem(
                f"{package} is not installed ({error})", "pip install 'llmcompress[track]'"
            ) from error
        own = {"dir": str(folder)} if package == "wandb" else {}
        try:
            self._tracker.init(project=project, name=name, config=config, **own)
        except Exception as error:
            # its errors have no common base, and a run must not begin that logs nowhere
            if package != "wandb":
                raise
            text = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise EnvironmentProblem(
                f"wandb does not start: {text}", "log in with `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def __call__(self, event: Event) -> None:
        """Log metrics."""
        for name, value, step in _scalars(event):
            self._tracker.log({name: value} if step is None else {name: value, "step": step})

    def close(self) -> None:
        """Finish the run."""
        self._tracker.finish()


def _scalars(event: Event) -> Iterable[tuple[str, float, int | None]]:
    """Yield ``(name, value, step)`` of everything numeric in an event that is worth a curve."""
    if event.kind == "metric" and isinstance(event.data.get("value"), int | float):
        prefix = f"{event.stage}/" if event.stage else ""
        yield f"{prefix}{event.data.get('name')}", float(event.data["value"]), event.data.get("step")
    if event.kind == "block_end":
        for name, value in event.data.items():
            if name not in {"index", "total"} and isinstance(value, int | float) and not isinstance(value, bool):
                yield f"{event.stage}/{name}", float(value), int(event.data.get("index", 0))


class Fanout:
    """Calls several sinks in order.

    Args:
        sinks: The sinks; events.jsonl first, so that it has the event even if a display fails.
    """

    def __init__(self, sinks: Iterable[Sink]) -> None:
        self._sinks = list(sinks)

    def append(self, sink: Sink) -> None:
        """Add a sink behind the others."""
        self._sinks.append(sink)

    def __call__(self, event: Event) -> None:
        """Pass the event on."""
        for sink in self._sinks:
            sink(event)

    def quietly(self, event: Event) -> None:
        """Pass on an event of the way out, where a full disk must not hide the error that led there."""
        for sink in self._sinks:
            with contextlib.suppress(OSError):
                sink(event)

    def close(self) -> None:
        """Close all sinks, the last first."""
        for sink in reversed(self._sinks):
            with contextlib.suppress(OSError):
                sink.close()


def tracker(kind: str, run_dir: Path, name: str, recipe: dict[str, Any]) -> Sink:
    """Build the optional sink ``kind``, one of :data:`TRACKERS`.

    Raises:
        EnvironmentProblem: Its package is missing.
    """
    if kind == "tensorboard":
        return TensorBoardSink(run_dir / "tensorboard")
    if kind in ("trackio", "wandb"):
        return RunTrackerSink(kind, run_dir, "llmcompress", f"{name}-{int(time.time())}", recipe)
    raise EnvironmentProblem(f"unknown tracker {kind!r}", f"choose one of {', '.join(TRACKERS)}")
