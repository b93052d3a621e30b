"""``validate`` and ``plan``: everything that can be known before a weight is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.look_ahead import (
    read_object,
    require_files,
    require_sources,
    require_tokenizer,
    require_weights,
)
from llmcompress.cli.output import Output, table
from llmcompress.cli.run import OverridesArgument, RecipeArgument
from llmcompress.errors import InputError, UsageError, command_line
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.models.state_memory import BatchMemory
    from llmcompress.pipeline.cluster import ClusterRow
    from llmcompress.pipeline.estimate import Plan
    from llmcompress.pipeline.rates import Rates
    from llmcompress.recipe.load import LoadedRecipe

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="config.json of the model, if the model itself is not here."),
]

_ELSEWHERE = "; for a run on another machine: --config config.json"


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "validate")(validate)
    command(app, "plan")(plan)


def validate(
    out: Output, recipe: RecipeArgument, overrides: OverridesArgument = None, config: ConfigOption = None
) -> None:
    """Check a recipe: grammar, order of stages, files it names and, for its model, every rule and export.

    Exit code 4 says that it is valid, but names files which are not here; with --config they may be elsewhere.
    """
    from llmcompress.pipeline.estimate import plan as predict
    from llmcompress.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_missing=True)
    facts = model_config(loaded, config)
    if facts is not None:
        # the prediction matches every rule, and knows which exports the result will not fit
        predict(loaded, facts).require_exports()
    absent = loaded.absent()
    data = {
        "valid": True,
        "recipe": str(loaded.path),
        "name": loaded.recipe.name,
        "stages": [{"name": name, "type": section.type} for name, section in loaded.recipe.stages.items()],
        "missing": list(loaded.missing),
        "model_checked": facts is not None,
        "absent": list(absent.values()),
    }
    lines = [f"{loaded.recipe.name}: valid ({' → '.join(loaded.recipe.stages)})"]
    if loaded.missing:
        lines.append(f"still to be given: {', '.join(loaded.missing)}")
    elif facts is None:
        lines.append("rules were not matched against the model, which is not here")
    lines += [f"not here: {line}" for line in absent.values() if config is not None]
    out.result(data, "\n".join(lines))
    if config is None:
        _require_here(loaded)


def model_config(loaded: LoadedRecipe, config: Path | None = None) -> dict[str, Any] | None:
    """``config.json`` of the recipe's model; None when the model is not on this machine.

    Args:
        loaded: The recipe.
        config: The file, or its folder, if named on the command line.

    Raises:
        InputError: It is damaged, or the named file is missing.
    """
    from llmcompress.models.paths import resolve_path

    if config is not None:
        file = config / "config.json" if config.is_dir() else config
        if not file.is_file():
            raise InputError(f"{file}: no such file", "give the model's config.json")
        return read_object(file)
    if "model.path" in loaded.missing:
        return None
    file = resolve_path(loaded.recipe.model.path, None) / "config.json"
    return read_object(file) if file.is_file() else None


def plan(
    out: Output,
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    config: ConfigOption = None,
    device: Annotated[str | None, typer.Option("--device", help="Device to predict for: cpu or cuda.")] = None,
    cluster: Annotated[
        str | None,
        typer.Option("--cluster", metavar="1..64", help="Also predict the time on so many processes (1,2,4 or 1..64)."),
    ] = None,
    rates: Annotated[
        Path | None,
        typer.Option("--rates", help="Rates of your machine, a file that scripts/measure_cluster_rates.py writes."),
    ] = None,
    price: Annotated[float | None, typer.Option("--price", min=0.0, help="Price of one process for an hour.")] = None,
) -> None:
    """Predict memory, disk, size and bits from config.json alone; exit 5 or 7 if a budget or an export will fail.

    Exit code 4 says that the recipe names files which are not here; with --config they may be elsewhere.
    """
    from llmcompress.pipeline.estimate import plan as predict
    from llmcompress.pipeline.preflight import shortfalls
    from llmcompress.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_missing=True)
    facts = model_config(loaded, config)
    if facts is None:
        raise _no_config(loaded, recipe)
    predicted = predict(loaded, facts, device)
    short = shortfalls(loaded, predicted)
    data = {**predicted.to_dict(), "notes": short}
    if cluster is None:
        out.result(data, lambda screen: _show(predicted, short, screen))
    else:
        measured, rows = cluster_rows(loaded, facts, predicted.device, cluster, rates)
        found = {name: [row.to_dict() for row in own] for name, own in rows.items()}
        data["cluster"] = {"rates": asdict(measured), "stages": found}
        out.result(data, lambda screen: _show_cluster(predicted, short, measured, rows, price, screen))
    predicted.require_budget()
    predicted.require_exports()
    if config is None:
        _require_here(loaded)
    from llmcompress.pipeline.cluster import countable

    if cluster is None and predicted.device == "cpu" and any(map(countable, loaded.stages())):
        out.note("next: add --cluster 1 for the time that the quantizing stages take")


def _require_here(loaded: LoadedRecipe) -> None:
    """Refuse what ``run`` would: files that are not here, a folder without a model or a tokenizer, weights that are
    not the model's, one that no format can hold or without the chat template that an evaluation asks through.

    Raises:
        InputError: Files, the tokenizer or its chat template are missing, or weights or a member of a family are
            damaged or quantized already.
        EnvironmentProblem: What compares answers is not installed.
        ExportError: A format cannot translate what lies beside the weights.
    """
    from llmcompress.models.checkpoint import read_config
    from llmcompress.models.paths import resolve_path
    from llmcompress.pipeline.preflight import require_companions

    require_files(loaded, _ELSEWHERE)
    if "model.path" not in loaded.missing:
        folder = resolve_path(loaded.recipe.model.path)
        config = read_config(folder)
        try:
            require_weights(folder, config)
        except InputError as error:
            hint = f"{error.hint}{_ELSEWHERE}" if error.hint else _ELSEWHERE.removeprefix("; ")
            raise InputError(error.message, hint) from error
        require_sources(loaded, folder, config)
        require_tokenizer(loaded, folder)
        require_companions(loaded, list(loaded.recipe.stages))


def _no_config(loaded: LoadedRecipe, recipe: str) -> InputError:
    from llmcompress.models.lora_checkpoint import is_adapter, not_a_model
    from llmcompress.models.paths import no_model_folder, resolve_path

    hint = f"{command_line('plan', recipe, 'model.path=FOLDER')}, or --config config.json"
    where = loaded.recipe.model.path
    if "model.path" not in loaded.missing and not resolve_path(where).is_dir():
        error = no_model_folder(where)
        return InputError(error.message, f"{error.hint}; its config.json alone is enough: --config FILE")
    if "model.path" not in loaded.missing and is_adapter(resolve_path(where)):
        return not_a_model(resolve_path(where))
    where = "model.path" if "model.path" in loaded.missing else where
    return InputError(f"{where}: the model's config.json is needed to predict anything", hint)


def cluster_rows(
    loaded: LoadedRecipe, facts: dict[str, Any], device: str, cluster: str, path: Path | None
) -> tuple[Rates, dict[str, list[ClusterRow]]]:
    """Predictions for several numbers of processes.

    Args:
        loaded: The recipe.
        facts: ``config.json``.
        device: ``cpu`` or ``cuda``.
        cluster: Numbers, separated by commas, or ``1..64``: doubled from one to the other.
        path: File of rates; None for the one that comes with the package.

    Raises:
        UsageError: A number is not one.
        InputError: The file is no file of rates, or one of another device.
    """
    from llmcompress.pipeline.cluster import predict
    from llmcompress.pipeline.rates import Rates

    numbers = process_numbers(cluster)
    measured = Rates.load(path)
    return measured, predict(loaded, facts, device, numbers, measured)


def process_numbers(text: str) -> list[int]:
    """``1,2,4`` or ``1..4`` → the numbers.

    Raises:
        UsageError: It is neither.
    """
    first, dots, last = text.partition("..")
    words = [first, last] if dots else text.split(",")
    if not all(word.strip().isdigit() and int(word) > 0 for word in words):
        raise UsageError(f"--cluster {text}: not numbers of processes", "--cluster 1,2,4,8 or --cluster 1..64")
    numbers = [int(word) for word in words]
    if not dots:
        return numbers
    found = [numbers[0]]
    while found[-1] * 2 <= numbers[1]:
        found.append(found[-1] * 2)
    return found


_PARTS = ("read", "forward", "hessian", "solve", "exchange")


def _show_cluster(
    predicted: Plan, short: list[str], rates: Rates, stages: dict[str, list[ClusterRow]], price: float | None,
    screen: Console,
) -> None:  # fmt: skip
    _show(predicted, short, screen)
    for name, rows in stages.items():
        found: dict[str, list[str]] = {
            "time": [_rounded(row.seconds) for row in rows],
            **{part: [_rounded(getattr(row, part)) for row in rows] for part in _PARTS},
            "peak RAM": [bytes_text(row.ram) for row in rows],
            "traffic": [bytes_text(row.traffic) for row in rows],
            "hours paid": [f"{row.process_hours:.2f}" for row in rows],
        }
        if price is not None:
            found["price"] = [f"{row.process_hours * price:.2f}" for row in rows]
        # a column per number of processes: few numbers fit a terminal side by side, nine quantities do not
        columns = [str(row.ranks) for row in rows]
        cells = [(quantity, *values) for quantity, values in found.items()]
        screen.print(table(("processes", *columns), cells, title=name, right="|".join(columns)))
    screen.print(f"rates of {rates.machine}; {_checked(rates)}", markup=False, highlight=False, soft_wrap=True)


def _checked(rates: Rates) -> str:
    """How far predictions were off where they were checked."""
    if not rates.error:
        return "not checked on a run"
    runs = ", ".join(name.removesuffix(" processes") for name in rates.error)
    return f"predictions were off by {', '.join(f'{error:+.0%}' for error in rates.error.values())} on {runs} processes"


def _rounded(seconds: float) -> str:
    """A time as exactly as it can be predicted: ``4.1 s``, ``58 s``, ``7.0 min``, ``12.4 h``."""
    for unit, size in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * size:
            return f"{seconds / size:.{1 if seconds < 10 * size else 0}f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


def _states(rows: Sequence[BatchMemory]) -> list[str]:
    """What sequences keep besides keys and values, and from which batch size on that is more than the weights."""
    if not rows:
        return []
    one = rows[0]
    kept, floats = bytes_text(one.states), bytes_text(one.float_states)
    text = f"recurrent states of a sequence: {kept}" + ("" if kept == floats else f" (in fp32 {floats})")
    more = next((row.batch for row in rows if row.states + row.convolution > row.weights), None)
    beside = "" if more is None else f"; at batch {more} states take more than the weights"
    return [f"{text}, and {bytes_text(one.convolution)} of convolutions{beside}"]


def _show(found: Plan, short: list[str], screen: Console) -> None:
    from rich.markup import escape

    cuda = found.device == "cuda"
    screen.print(
        f"[bold]{escape(found.recipe)}[/] on {found.model_type}: {found.parameters / 1e6:,.1f} M parameters, "
        f"{found.device}, computing in {found.compute_dtype}",
        highlight=False,
        soft_wrap=True,
    )
    columns = ["stage", "type", "peak RAM", *(["peak VRAM"] if cuda else []), "disk", "output", "GFLOP"]
    rows = [
        (s.name, s.type, bytes_text(s.ram), *([bytes_text(s.vram)] if cuda else []), bytes_text(s.disk),
         bytes_text(s.output), f"{s.flops / 1e9:,.0f}")
        for s in found.stages
    ]  # fmt: skip
    screen.print(table(columns, rows, right="|".join(columns[2:])))
    cells = [
        (r.stage, r.rule, r.weights, f"{r.parameters / 1e6:,.1f} M", "dense" if r.bits is None else f"{r.bits:.2f}",
         r.example)
        for r in found.rules
    ]  # fmt: skip
    if cells:
        screen.print(
            table(("stage", "rule", "weights", "values", "bits", "first match"), cells, right="weights|values|bits")
        )
    before, after = bytes_text(found.dense_bytes), bytes_text(found.output_bytes)
    lines = [
        *([f"weights: {before} → {after}",
           f"bits per weight: {found.bits_weights:.2f} where quantized, with scales and zeros; {found.bits_codes:.2f} "
           f"over all blocks without these; {found.bits_stored:.2f} over the whole model, embedding included"]
          if found.rules else []),
        f"peak RAM {bytes_text(found.ram)}" + (f", peak VRAM {bytes_text(found.vram)}" if cuda else "")
        + f", disk {bytes_text(found.disk)}",
    ]  # fmt: skip
    if found.unmatched and found.rules:
        lines.append(f"{found.unmatched / 1e6:,.1f} M values that could be quantized match no rule and stay dense")
    lines += _states(found.memory)
    lines += [
        f"{b.resource}: {bytes_text(b.needed)} of {bytes_text(b.limit)}" + ("" if b.fits else " — does not fit")
        for b in found.budgets
    ]
    lines += [f"{s.name}: {note}" for s in found.stages for note in s.notes]
    lines += [f"warning: {note}" for note in short]
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
