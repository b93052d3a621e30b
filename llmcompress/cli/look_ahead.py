"""What is known of a run before any work: files it names, the model's headers, budgets, exports, this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.cli.output import Output
from llmcompress.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmcompress.pipeline.estimate import Plan
    from llmcompress.pipeline.preflight import Extent
    from llmcompress.recipe.load import LoadedRecipe


def look_ahead(loaded: LoadedRecipe, out: Output, extent: Extent | None) -> None:
    """Refuse before any work what is already seen to be impossible.

    A text that only the last stage reads would otherwise be missed after hours, and a folder that holds no model would
    leave a run folder behind.

    Args:
        loaded: The recipe.
        out: Where remarks go.
        extent: What of it will run, for which memory, disk and network of this machine are asked; None asks nothing.

    Raises:
        LLMCompressError: As :func:`require_sound`, and what this machine has not.
    """
    from llmcompress.pipeline.preflight import preflight

    predicted, config = require_sound(loaded)
    for note in preflight(loaded, predicted, config, extent) if extent is not None else ():
        out.warning(note)


def require_sound(loaded: LoadedRecipe) -> tuple[Plan, dict[str, Any]]:
    """Hold a recipe against its files, its model, its budgets and its exports; on any machine the same.

    Args:
        loaded: The recipe.

    Returns:
        What it needs, and the model's ``config.json``.

    Raises:
        InputError: Files are missing or damaged, the model is not one that can be compressed, or it has no tokenizer
            or chat template and a stage needs one.
        RecipeError: Rules do not suit the model.
        ResourceError: It does not fit its budgets.
        ExportError: A format would refuse.
    """
    from llmcompress.models.checkpoint import read_config
    from llmcompress.models.paths import resolve_path
    from llmcompress.pipeline.estimate import plan

    require_files(loaded)
    folder = resolve_path(loaded.recipe.model.path)
    config = read_config(folder)
    require_weights(folder, config)
    predicted = plan(loaded, config)
    predicted.require_budget()
    predicted.require_exports()
    require_sources(loaded, folder, config)
    require_tokenizer(loaded, folder)
    return predicted, config


def require_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse a model whose weights are quantized already, damaged, or not those of its config; by their headers alone.

    Args:
        folder: The model.
        config: Its ``config.json``.

    Raises:
        InputError: It is one.
    """
    from llmcompress.models.checkpoint import Checkpoint, refuse_quantized
    from llmcompress.models.registry import layout_from_config

    refuse_quantized(folder, config)
    Checkpoint(folder, layout_from_config(config)).verify()


def require_files(loaded: LoadedRecipe, otherwise: str = "") -> None:
    """Refuse a recipe that names files or folders which are not here; what is still ``???`` is not asked for.

    Args:
        loaded: The recipe.
        otherwise: Another way out, for the next step.

    Raises:
        InputError: With a line for each.
    """
    from llmcompress.models.paths import no_model_folder, resolve_path

    model, absent = loaded.recipe.model.path, loaded.absent()
    if "model.path" not in loaded.missing and not resolve_path(model).is_dir():
        error = no_model_folder(model)
        absent.pop("model.path", None)
        hint = f"{error.hint}{_needs(loaded, 'model.path')}"
        # a model may move, as long as it stays the same
        hint = hint if loaded.lock is None else f"{hint}; if it has moved: model.path=FOLDER"
        raise InputError("\n".join([error.message, *absent.values()]), hint + otherwise)
    if absent:
        needs = _needs(loaded, next(iter(absent)))
        raise InputError("\n".join(absent.values()), f"correct the path, or put the file there{needs}{otherwise}")


def _needs(loaded: LoadedRecipe, path: str) -> str:
    """What a shipped recipe says it needs, where it was the recipe itself that named the path."""
    from llmcompress.recipe.catalog import list_recipes

    if loaded.place(path).startswith("override"):
        return ""
    found = next((info.needs for info in list_recipes() if info.path.resolve() == loaded.path.resolve()), "")
    return f"; this recipe needs {found}" if found else ""


def require_sources(loaded: LoadedRecipe, folder: Path, config: Mapping[str, Any]) -> None:
    """Ask stages whether they can use what lies beside the weights.

    Args:
        loaded: The recipe.
        folder: Its model.
        config: The model's ``config.json``.

    Raises:
        ExportError: A format cannot translate it; with every reason.
        InputError: The tokenizer has no chat template, and a stage asks through one.
    """
    from llmcompress.models.paths import resolve_path

    named = loaded.recipe.model.tokenizer
    tokenizer = resolve_path(named) if named else None
    for stage in loaded.stages():
        stage.require_source(folder, config, tokenizer)


def require_tokenizer(loaded: LoadedRecipe, folder: Path) -> None:
    """Refuse a model without a tokenizer, if a stage reads text.

    Args:
        loaded: The recipe.
        folder: Its model.

    Raises:
        InputError: It has none.
    """
    from llmcompress.models.paths import resolve_path
    from llmcompress.models.tokenizer_files import has_tokenizer, no_tokenizer

    named = loaded.recipe.model.tokenizer
    place = resolve_path(named) if named else folder
    if not has_tokenizer(place) and any(stage.reads_text() for stage in loaded.stages()):
        raise no_tokenizer(place)


def read_object(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        InputError: It is not one.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error})", "fetch the file again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: not a JSON object", "fetch the file again")
    return data
