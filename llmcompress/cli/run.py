"""``run`` and ``resume``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llmcompress.cli.command import command
from llmcompress.cli.completion import complete_override, complete_recipe
from llmcompress.cli.launch import Processes, ProcessOptions, launch
from llmcompress.cli.look_ahead import look_ahead
from llmcompress.cli.output import Output, table
from llmcompress.distributed.world import LAUNCHED
from llmcompress.errors import GateFailed, InputError, UsageError, command_line
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.pipeline.preflight import Extent
    from llmcompress.pipeline.runner import Job, Outcome, RunOptions
    from llmcompress.pipeline.sinks import Sink
    from llmcompress.stages.state import Metric

RecipeArgument = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="Recipe file, or the name of a shipped one.", autocompletion=complete_recipe),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[KEY=VALUE]…",
        help="Overrides: stages.quantize.rules.experts.bits=3 changes, +key=value adds (+key@NAME=value: in front of "
        "NAME), key~ removes.",
        autocompletion=complete_override,
    ),
]


@dataclass(frozen=True)
class Controls:
    """Options of ``run`` and ``resume``: which stages, who is told, whether this machine is looked at first."""

    until: Annotated[str | None, typer.Option("--until", metavar="STAGE", help="Stop after this stage.")] = None
    only: Annotated[
        str | None,
        typer.Option("--only", metavar="STAGE", help="Run this stage alone; those before it must be finished."),
    ] = None
    redo: Annotated[
        str | None, typer.Option("--redo", metavar="STAGE", help="Do this stage and all after it again.")
    ] = None
    track: Annotated[
        list[str] | None, typer.Option("--track", metavar="NAME", help="Also log to tensorboard, trackio or wandb.")
    ] = None
    preflight: Annotated[
        bool,
        typer.Option(
            "--preflight/--no-preflight", help="Refuse to begin with too little memory or disk, or data missing."
        ),
    ] = True

    def words(self, out: Output) -> list[str]:
        """These options and those of ``out`` as words, for the processes that are to run the command."""
        chosen = (("--until", self.until), ("--only", self.only), ("--redo", self.redo))
        found = [word for name, value in chosen if value for word in (name, value)]
        found += [word for name in self.track or [] for word in ("--track", name)]
        modes = (("--json", out.json_mode), ("--quiet", out.quiet), ("--debug", out.debug),
                 ("--no-preflight", not self.preflight))  # fmt: skip
        return [*found, *(word for word, given in modes if given)]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "run")(run)
    command(app, "resume")(resume)


def run(
    out: Output,
    recipe: RecipeArgument,
    controls: Controls,
    started: ProcessOptions,
    overrides: OverridesArgument = None,
    force: Annotated[bool, typer.Option("--force", help="Delete what an earlier run left in the folder.")] = False,
) -> None:
    """Run a recipe; continue where an interrupted run of it stopped."""
    from llmcompress.pipeline.runner import RunOptions

    processes = started.processes()
    options = RunOptions(controls.until, controls.only, controls.redo, force, _processes_here(processes))
    job = load_job(recipe, overrides or [], out=_first_look(out), extent=options if controls.preflight else None)
    if processes is not None:
        words = ["run", recipe, *(overrides or []), *controls.words(out)]
        launch(out, processes, [*words, *(["--force"] if force else [])], Path(job.recipe["run"]["dir"]))
        return
    execute(out, job, replace(options, trackers=_trackers(controls.track, job)))


def resume(
    out: Output,
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of an interrupted run.")],
    controls: Controls,
    started: ProcessOptions,
    overrides: OverridesArgument = None,
) -> None:
    """Continue a run from its folder."""
    from llmcompress.pipeline.runner import RunOptions

    lock = run_dir / "recipe.lock.json"
    if not lock.is_file():
        raise InputError(f"{run_dir}: not a run folder (no recipe.lock.json)", "llmcompress run RECIPE")
    processes = started.processes()
    options = RunOptions(controls.until, controls.only, controls.redo, processes=_processes_here(processes))
    job = load_job(
        str(lock), [*(overrides or []), f"run.dir={quoted(str(run_dir))}"], source=run_dir / "recipe.yaml",
        out=_first_look(out), extent=options if controls.preflight else None,
    )  # fmt: skip
    if processes is not None:
        launch(out, processes, ["resume", str(run_dir), *(overrides or []), *controls.words(out)], run_dir)
        return
    again = "add --redo STAGE to do that stage and all after it again"
    execute(out, job, replace(options, trackers=_trackers(controls.track, job)), again)


def _processes_here(started: Processes | None) -> int:
    """Processes that this command starts on this machine."""
    return 1 if started is None else started.nproc


def _first_look(out: Output) -> Output | None:
    """Where remarks on recipe and machine go; None in a launched process, whose launcher has looked at both."""
    return None if LAUNCHED in os.environ else out


def quoted(text: str) -> str:
    """An override value that stays text whatever it looks like."""
    return json.dumps(text, ensure_ascii=False)


def load_job(
    reference: str,
    overrides: list[str],
    source: Path | None = None,
    out: Output | None = None,
    extent: Extent | None = None,
) -> Job:
    """Validate a recipe, match it against its model, hold it against its budgets, and build its stages.

    Args:
        reference: File, run folder, lock, or name of a shipped recipe.
        overrides: ``key=value`` words.
        source: The file to keep as ``recipe.yaml``, if it is not the recipe itself.
        out: Where remarks go; None checks neither the model nor budgets.
        extent: What will run, for which this machine's memory, disk and network are asked too; None asks nothing.

    Raises:
        RecipeError: The recipe is not valid, or does not suit the model.
        ResourceError: It does not fit the budgets it declares, or this machine.
    """
    from llmcompress.pipeline.runner import Job
    from llmcompress.recipe.load import load_recipe
    from llmcompress.recipe.lock import changes_since, make_lock

    loaded = load_recipe(reference, overrides)
    if out is not None:
        look_ahead(loaded, out, extent)
        if source is None:
            for line in changes_since(loaded):
                out.warning(f"since this lock was written: {line}")
    text = source.read_text(encoding="utf-8") if source is not None and source.is_file() else loaded.text
    return Job(loaded.data, loaded.stages(), text, lambda: make_lock(loaded))


def execute(out: Output, job: Job, options: RunOptions, again: str = "add --force to run it anew") -> None:
    """Run a job, print its outcome, and raise for gates that failed.

    Args:
        out: Where to print.
        job: What.
        options: How far.
        again: How this command does a finished run once more.

    Raises:
        GateFailed: After everything else is done.
    """
    from llmcompress.distributed.world import joined
    from llmcompress.pipeline.followers import follow
    from llmcompress.pipeline.runner import Runner

    world = joined(bool(job.recipe["run"].get("deterministic")))
    if world.rank > 0:
        follow(job.stages, job.recipe, world)
        return
    runner = Runner(job, options, out.sinks(), world)
    out.run_dir = runner.dir.root
    outcome = runner.execute()
    out.result(summary(outcome), lambda screen: show_outcome(outcome, screen, again))
    if outcome.gate_failures:
        lines = "\n".join(outcome.gate_failures)
        written = "; what was exported is there all the same" if outcome.artifacts else ""
        raise GateFailed(lines, f"look at {outcome.report or outcome.run_dir}{written}")


def _trackers(names: list[str] | None, job: Job) -> Callable[[Path], list[Sink]]:
    from llmcompress.pipeline.sinks import TRACKERS, tracker

    wrong = [name for name in names or [] if name not in TRACKERS]
    if wrong:
        raise UsageError(f"--track {wrong[0]}: unknown", f"choose one of {', '.join(TRACKERS)}")
    recipe = job.recipe

    def build(run_dir: Path) -> list[Sink]:
        return [tracker(name, run_dir, str(recipe.get("name", "run")), recipe) for name in names or []]

    return build


def summary(outcome: Outcome) -> dict[str, object]:
    """What ``--json`` prints of a run."""
    stages = [
        {"name": s.name, "type": s.type, "status": s.status, "seconds": s.seconds,
         "peak_rss_bytes": s.peak_rss_bytes, "peak_vram_bytes": s.peak_vram_bytes}
        for s in outcome.stages
    ]  # fmt: skip
    return {
        "run_dir": outcome.run_dir,
        "status": outcome.status,
        "stages": stages,
        "metrics": [{"name": m.name, **_metric(m)} for m in outcome.metrics],
        "artifacts": outcome.artifacts,
        "report": outcome.report,
        "gates": {"passed": not outcome.gate_failures, "failures": outcome.gate_failures},
    }


def _metric(metric: Metric) -> dict[str, object]:
    from llmcompress.evaluation.significance import within_noise

    change = None
    if metric.dense is not None and metric.compressed is not None:
        change = metric.compressed - metric.dense
    return {
        "dense": metric.dense, "compressed": metric.compressed, "difference": change, "stderr": metric.stderr,
        "n": metric.n, "higher_is_better": metric.higher_is_better, "difference_stderr": metric.difference_stderr,
        "within_noise": within_noise(change, metric.difference_stderr),
    }  # fmt: skip


def figure(value: float | None) -> str | None:
    """A number with five significant digits."""
    return None if value is None else f"{value:.5g}"


def difference_text(difference: float, stderr: float | None, name: str = "", base: float | None = None) -> str:
    """A difference with its standard error where that is known, and whether it is noise.

    Args:
        difference: Difference of two figures.
        stderr: Its standard error, paired.
        name: Name of the figure; of a perplexity it is the share of ``base`` that is quoted.
        base: What it differs from.
    """
    from llmcompress.evaluation.significance import within_noise

    spread = "" if stderr is None else f" ± {stderr:.2g}"
    share = f" ({difference / base:+.1%})" if base and name.endswith("perplexity") else ""
    noise = " within noise" if within_noise(difference, stderr) else ""
    return f"{difference:+.4g}{spread}{share}{noise}"


def metrics_table(metrics: list[Metric]) -> object:
    """Dense, compressed and difference of each metric."""
    rows = []
    for metric in metrics:
        shown = None
        if metric.dense is not None and metric.compressed is not None:
            change = metric.compressed - metric.dense
            shown = difference_text(change, metric.difference_stderr, metric.name, metric.dense)
        rows.append((metric.name, figure(metric.dense), figure(metric.compressed), shown))
    columns = ("metric", "dense", "compressed", "difference")
    return table(columns, rows, right="dense|compressed|difference", named=True)


def show_outcome(outcome: Outcome, screen: Console, again: str) -> None:
    """Print a run's result for people; ``again`` is the next step where nothing was done."""
    if outcome.status == "nothing to do":
        screen.print(
            f"{outcome.run_dir}: this run is already finished; nothing was done", markup=False, highlight=False
        )
    if outcome.metrics:
        screen.print(metrics_table(list(outcome.metrics)))
    for name, path in outcome.artifacts.items():
        if not path.exists():
            stage = next((record.name for record in outcome.stages if name in record.artifacts), "STAGE")
            screen.print(
                f"{name}: {path} is gone; --redo {stage} writes it again", markup=False, highlight=False, soft_wrap=True
            )
            continue
        size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file())
        screen.print(f"{name}: {path} ({bytes_text(size)})", markup=False, highlight=False, soft_wrap=True)
    if outcome.status == "stopped":
        screen.print(
            f"stopped as asked; next: {command_line('resume', outcome.run_dir)}",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    if outcome.report is not None:
        screen.print(f"report: {outcome.report}", markup=False, highlight=False, soft_wrap=True)
    if outcome.status == "nothing to do":
        screen.print(f"next: {again}", markup=False, highlight=False)
