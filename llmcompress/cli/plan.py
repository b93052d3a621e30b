"""``validate`` and ``plan``: everything that can be known before a weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.output import Output, bytes_text, table
from llmcompress.cli.run import OverridesArgument, RecipeArgument, read_object
from llmcompress.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.pipeline.estimate import Plan
    from llmcompress.recipe.load import LoadedRecipe

ConfigOption = Annotated[
    Path | None,
    typer.Option("--config", metavar="FILE", help="config.json of the model, if the model itself is not here."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    command(app, "validate")(validate)
    command(app, "plan")(plan)


def validate(
    out: Output, recipe: RecipeArgument, overrides: OverridesArgument = None, config: ConfigOption = None
) -> None:
    """Check a recipe: grammar, order of stages and, where the model is at hand, that every rule matches."""
    from llmcompress.models.registry import layout_from_config
    from llmcompress.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_missing=True)
    facts = model_config(loaded, config)
    if facts is not None:
        loaded.check_layout(layout_from_config(facts))
    data = {
        "valid": True,
        "recipe": str(loaded.path),
        "name": loaded.recipe.name,
        "stages": [{"name": name, "type": section.type} for name, section in loaded.recipe.stages.items()],
        "missing": list(loaded.missing),
        "model_checked": facts is not None,
    }
    lines = [f"{loaded.recipe.name}: valid ({' → '.join(loaded.recipe.stages)})"]
    if loaded.missing:
        lines.append(f"still to be given: {', '.join(loaded.missing)}")
    elif facts is None:
        lines.append(f"the model {loaded.recipe.model.path} is not here, so rules were not matched against it")
    out.result(data, "\n".join(lines))


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
    device: Annotated[str | None, typer.Option("--device", help="Predict for cpu or cuda.")] = None,
) -> None:
    """Predict memory, disk, output size and bits from config.json alone; exit 5 if a declared budget is exceeded."""
    from llmcompress.pipeline.estimate import plan as predict
    from llmcompress.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [], allow_missing=True)
    facts = model_config(loaded, config)
    if facts is None:
        where = "model.path" if "model.path" in loaded.missing else loaded.recipe.model.path
        raise InputError(
            f"{where}: the model's config.json is needed to predict anything",
            f"llmcompress plan {recipe} model.path=FOLDER, or --config config.json",
        )
    predicted = predict(loaded, facts, device)
    out.result(predicted.to_dict(), lambda screen: _show(predicted, screen))
    predicted.require_budget()


def _show(found: Plan, screen: Console) -> None:
    cuda = found.device == "cuda"
    screen.print(
        f"[bold]{found.recipe}[/] on {found.model_type}: {found.parameters / 1e6:,.1f} M parameters, {found.device}, "
        f"computing in {found.compute_dtype}",
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
        f"weights: {before} → {after}",
        f"bits per weight: {found.bits_codes:.2f} in codes, {found.bits_stored:.2f} with everything stored",
        f"peak RAM {bytes_text(found.ram)}" + (f", peak VRAM {bytes_text(found.vram)}" if cuda else "")
        + f", disk {bytes_text(found.disk)}",
    ]  # fmt: skip
    if found.unmatched:
        lines.append(f"{found.unmatched / 1e6:,.1f} M values that could be quantized match no rule and stay dense")
    lines += [
        f"{b.resource}: {bytes_text(b.needed)} of {bytes_text(b.limit)}" + ("" if b.fits else " — does not fit")
        for b in found.budgets
    ]
    lines += [f"{s.name}: {note}" for s in found.stages for note in s.notes]
    lines += [f"warning: {note}" for note in found.notes]
    for line in lines:
        screen.print(line, markup=False, highlight=False, soft_wrap=True)
