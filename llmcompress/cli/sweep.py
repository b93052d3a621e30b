"""``sweep``: one recipe with many settings, a table, and a plot of quality against size."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.look_ahead import require_sound
from llmcompress.cli.output import Output, table
from llmcompress.cli.run import RecipeArgument, figure, load_job, quoted
from llmcompress.errors import ExitCode, GateFailed, LLMCompressError, UsageError, command_line
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.pipeline.sweep import RunResult, SweepRun
    from llmcompress.recipe.load import LoadedRecipe
    from llmcompress.stages.base import Stage

_AGAIN = "correct it, then the same command, or another --dir; finished runs are kept"
_LONGEST = 400
# metrics of which more is better; of all others less is
_RISING = ("acc", "acc_norm", "exact_match", "top1", "overlap", "agreement")


def register(app: typer.Typer) -> None:
    """Add the command to the application."""
    command(app, "sweep")(sweep)


def sweep(
    out: Output,
    recipe: RecipeArgument,
    settings: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=A,B,C…", help="Settings to vary; every combination is a run. KEY=VALUE holds for all."
        ),
    ] = None,
    folder: Annotated[
        Path | None, typer.Option("--dir", help="Folder of the sweep; by default runs/sweep-NAME.")
    ] = None,
    jobs: Annotated[int, typer.Option("--jobs", "-j", min=1, help="Runs at the same time.")] = 1,
    metric: Annotated[str | None, typer.Option("--metric", help="Quality to plot, such as heldout.perplexity.")] = None,
) -> None:
    """Run a recipe with every combination of some settings; continue where an interrupted sweep stopped.

    What one of them can never be is refused before the first runs.
    A run that fails stops no other; the exit code is then its own. A run whose quality gates do not hold is a result
    like others; exit code 6 says that none holds them.
    """
    from llmcompress.pipeline.sweep import Sweep, combinations, parse_axes

    axes, fixed = parse_axes(settings or [])
    given = {*axes, *(word.partition("=")[0].removeprefix("+") for word in fixed)}
    if "run.dir" in given:
        raise UsageError("run.dir: every run of a sweep has a folder of its own", "give the sweep's folder with --dir")
    name = _loaded(recipe, fixed, combinations(axes, Path())[0]).recipe.name
    root = folder or Path("runs") / f"sweep-{name}"
    runs = combinations(axes, root)

    def holds(run: SweepRun) -> bool:
        from llmcompress.pipeline.runner import Runner, RunOptions

        return Runner(load_job(recipe, _words(fixed, run)), RunOptions()).up_to_date()

    again = ["sweep", recipe, *(settings or []), "--dir", root, *(["--jobs", jobs] if jobs > 1 else [])]
    again += ["--metric", metric] if metric is not None else []
    asked = Sweep(recipe, fixed, runs, root, jobs, out.note, holds, command_line(*again))
    asked.join()
    # a wrong value is known before the first run has taken an hour
    loaded = {
        run.name: _loaded(recipe, fixed, run, run.values not in [own.values for own in runs]) for run in asked.runs
    }
    if metric is not None:
        _require_metric(list(loaded.values()), metric)
    _look_ahead([(run, loaded[run.name]) for run in asked.pending()], root, jobs, out)
    results = asked.execute()
    chosen = _quality(results, metric)
    if metric is not None and chosen not in (metric, None):
        out.warning(f"--metric {metric}: no run has measured it, the table shows {chosen}")
    data = write_tables(results, root, chosen, name)
    out.result(data, lambda screen: _show(data, screen))
    failed = [result for result in results if result.status == "failed"]
    if failed:
        raise _failure(failed, len(results))
    if all(result.status == "gate failed" for result in results):
        raise GateFailed("no run holds its quality gates", "vary other settings, spend more bits, or relax the gates")


def _words(fixed: Sequence[str], run: SweepRun) -> list[str]:
    """Overrides of one run."""
    return [*fixed, *(f"{key}={value}" for key, value in run.values.items()), f"run.dir={quoted(str(run.folder))}"]


def _loaded(recipe: str, fixed: Sequence[str], run: SweepRun, earlier: bool = False) -> LoadedRecipe:
    """The recipe of one run; ``earlier``: of an earlier command of this sweep, which this one has not named."""
    from llmcompress.recipe.load import load_recipe

    try:
        return load_recipe(recipe, _words(fixed, run))
    except LLMCompressError as error:
        if earlier:
            error.message = f"{run.name}, which this sweep has from an earlier command:\n{error.message}"
            error.hint = f"{error.hint}\nor another --dir" if error.hint else "choose another --dir"
        raise


def _look_ahead(pending: Sequence[tuple[SweepRun, LoadedRecipe]], root: Path, jobs: int, out: Output) -> None:
    """Refuse a sweep of which a run could never finish; otherwise that run says so after hours of others.

    Args:
        pending: Runs that are still to be done, with their recipes.
        root: The sweep's folder.
        jobs: Runs at the same time.
        out: Where remarks go.

    Raises:
        LLMCompressError: With the exit code of the first such run, and all of them.
    """
    from llmcompress.pipeline.preflight import Extent, Ways, preflight, require_memory_together, short_together

    sound, lost = [], []
    for run, loaded in pending:
        try:
            sound.append((run, loaded, *require_sound(loaded)))
        except LLMCompressError as error:
            lost.append((run.name, error))
    if lost:
        raise _refusal(lost, len(pending))
    notes: dict[str, None] = {}
    for run, loaded, predicted, config in sound:
        try:
            notes |= dict.fromkeys(preflight(loaded, predicted, config, Extent(), Ways("--dir FOLDER", anyway="")))
        except LLMCompressError as error:  # of this machine: the next runs would most likely say the same
            raise _refusal([(run.name, error)], len(pending)) from error
    needs = [(loaded, predicted, config) for _, loaded, predicted, config in sound]
    crowded = require_memory_together(needs, jobs)
    for note in (*notes, *crowded, *short_together(root, [(loaded, predicted) for _, loaded, predicted, _ in sound])):
        out.warning(note)


def _refusal(lost: Sequence[tuple[str, LLMCompressError]], count: int) -> LLMCompressError:
    """One error for runs that cannot be; without their names where all of them say the same."""
    _, first = lost[0]
    if len(lost) < count or len({error.message for _, error in lost}) > 1:
        first.message = "\n".join(f"{name}: {error.message}" for name, error in lost)
        first.hint = f"{first.hint}\nor vary other values" if first.hint else "vary other values"
    return first


def _failure(failed: Sequence[RunResult], count: int) -> LLMCompressError:
    """One error for all runs that failed, with the exit code of the first."""
    lines = [f"{r.run.name}: {_in_a_line(r.error)}" for r in failed]
    error = LLMCompressError(f"{len(failed)} of {count} runs failed:\n" + "\n".join(lines), _AGAIN)
    code = failed[0].code
    if code in {int(known) for known in ExitCode if known}:
        error.exit_code = ExitCode(code)
    elif code < 0:  # killed from outside, most often for want of memory
        error.exit_code = ExitCode.ENVIRONMENT
    return error


def _in_a_line(said: str) -> str:
    """The error among what a run said, without its next step; the beginning of everything where there is none."""
    found = re.search(r"^error:(.*?)(?=^next:|\Z)", said, re.MULTILINE | re.DOTALL)
    return shorten((found[1] if found else said) or "no message", _LONGEST, placeholder=" …")


def _require_metric(runs: Sequence[LoadedRecipe], metric: str) -> None:
    """Refuse a metric that no stage of any run will measure, before the first run.

    Raises:
        UsageError: It is none.
    """
    found = [_wrong_metric(loaded.stages(), metric) for loaded in runs]
    if all(found):
        raise UsageError(found[0], "choose one that the recipe's evaluate stage has")


def _wrong_metric(stages: Sequence[Stage], metric: str) -> str:
    """Why a run will not measure a metric; empty where it may."""
    from llmcompress.evaluation.gates import GateConfig, unknown_metrics
    from llmcompress.evaluation.task_facts import unknown_figures
    from llmcompress.stages.base import Kind
    from llmcompress.stages.evaluate import Evaluate

    measuring = [stage for stage in stages if Kind.METRICS in stage.produces]
    known = [stage.measured() for stage in measuring if isinstance(stage, Evaluate)]
    if len(known) < len(measuring):
        return ""  # stages of other kinds name their metrics themselves
    exact = [name for names, _ in known for name in names]
    tasks = [task for _, names in known for task in names]
    asked = {"metric": GateConfig(metric=metric, max=0)}
    wrong = unknown_metrics(asked, exact, tasks)
    # a metric is there where any stage has it
    lost = [unknown_figures(asked, s.config.tasks) for s in measuring if isinstance(s, Evaluate)]
    wrong = wrong or (lost[0] if lost and all(lost) else [])
    return wrong[0].replace("gates.metric", "--metric") if wrong else ""


def _quality(results: Sequence[RunResult], asked: str | None) -> str | None:
    """The metric to compare by: the one asked for, else the first perplexity, else the first there is."""
    names = list(dict.fromkeys(name for result in results for name in result.metrics))
    if asked in names:
        return asked
    return next((name for name in names if name.endswith(".perplexity")), names[0] if names else None)


def write_tables(results: Sequence[RunResult], root: Path, metric: str | None, name: str) -> dict[str, Any]:
    """Write ``results.json``, ``results.csv`` and ``sweep.html``; return what the first holds.

    Args:
        results: All runs.
        root: The sweep's folder.
        metric: Quality to compare by.
        name: Name of the recipe.
    """
    from llmcompress.durable import write_durably
    from llmcompress.pipeline.sweep import pareto
    from llmcompress.report.sweep import build_sweep_page

    rising = metric is not None and metric.rsplit(".", 1)[-1] in _RISING
    whole = [r for r in results if r.status != "failed" and r.bytes is not None]
    known = [r for r in whole if metric is not None and metric in r.metrics]
    best = pareto([(float(r.bytes or 0), r.metrics[metric or ""]) for r in known], rising)
    front = {result.run.name for result, optimal in zip(known, best) if optimal}
    rows = [
        {
            "name": r.run.name, "values": r.run.values, "status": r.status, "bytes": r.bytes, "metrics": r.metrics,
            "dense": r.dense, "stderr": r.stderr, "difference_stderr": r.difference_stderr,
            "seconds": r.seconds, "peak_rss_bytes": r.peak_rss_bytes,
            "error": r.error, "pareto": r.run.name in front, "run_dir": str(r.run.folder),
        }
        for r in results
    ]  # fmt: skip
    data = {"recipe": name, "metric": metric, "higher_is_better": rising, "runs": rows}
    write_durably(root / "results.json", json.dumps(data, indent=1).encode())
    write_durably(root / "results.csv", csv_text(data).encode())
    page = build_sweep_page(data, root)
    return {**data, "page": str(page), "table": str(root / "results.json"), "csv": str(root / "results.csv")}


def csv_text(data: dict[str, Any]) -> str:
    """The runs as CSV, a row each: settings, size; of every metric its value, the dense one, standard errors."""
    rows = data["runs"]
    settings = list(dict.fromkeys(key for row in rows for key in row["values"]))
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    parts = [(name, part) for name in metrics for part in ("metrics", "dense", "stderr", "difference_stderr")
             if any(name in row[part] for row in rows)]  # fmt: skip
    facts = ("name", "status", "bytes", "seconds", "peak_rss_bytes", "pareto")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    heads = [name if part == "metrics" else f"{name}.{part}" for name, part in parts]
    table.writerow([*facts, *settings, *heads])
    for row in rows:
        values = [row[part].get(name) for name, part in parts]
        table.writerow([*(row[key] for key in facts), *(row["values"].get(key) for key in settings), *values])
    return text.getvalue()


def _show(data: dict[str, Any], screen: Console) -> None:
    metric = data["metric"]
    rows = sorted(data["runs"], key=lambda row: row["bytes"] or 0)
    # the column says `perplexity`, the line below which one
    quality = metric.rsplit(".", 1)[-1] if metric else "quality"
    status = ["status"] if any(row["status"] != "finished" for row in rows) else []
    cells = [
        (row["name"], *([row["status"]] if status else []), bytes_text(row["bytes"]),
         figure(row["metrics"].get(metric)), f"{row['seconds']:.1f} s", bytes_text(row["peak_rss_bytes"] or None),
         "✓" if row["pareto"] else "")
        for row in rows
    ]  # fmt: skip
    columns = ("run", *status, "weights", quality, "time", "peak RAM", "best at its size")
    screen.print(table(columns, cells, right=f"weights|{quality}|time|peak RAM"))
    dense = [f"dense {figure(value)}" for value in sorted({row["dense"].get(metric) for row in rows} - {None})]
    if metric:
        screen.print(", ".join([f"{quality}: {metric}", *dense]), markup=False, highlight=False, soft_wrap=True)
    screen.print(f"plot: {data['page']}", markup=False, highlight=False, soft_wrap=True)
    screen.print(f"all figures: {data['csv']}", markup=False, highlight=False, soft_wrap=True)
