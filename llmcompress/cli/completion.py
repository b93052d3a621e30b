"""Shell completion: recipe names, and for ``key=value`` words the keys the recipe and its stages know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer

RUN_KEYS = (
    "run.dir",
    "run.seed",
    "run.device",
    "run.compute_dtype",
    "run.threads",
    "model.path",
    "model.dtype",
    "model.tokenizer",
)


def complete_recipe(incomplete: str) -> list[str]:
    """Shipped recipe names and recipe files that begin with what was typed."""
    from llmcompress.recipe.catalog import recipe_names

    names = [name for name in recipe_names() if name.startswith(incomplete)]
    typed = Path(incomplete)
    parent = typed if incomplete.endswith("/") else typed.parent
    if parent.is_dir():
        for path in sorted(parent.iterdir()):
            text = path.as_posix()
            if text.startswith(incomplete) and (path.is_dir() or path.suffix in {".yaml", ".yml"}):
                names.append(text + "/" if path.is_dir() else text)
    return names


def complete_override(ctx: typer.Context, incomplete: str) -> list[str]:
    """Keys for an override of the recipe given before, with ``=`` behind them."""
    recipe = ctx.params.get("recipe")
    if not isinstance(recipe, str) or "=" in incomplete:
        return []
    return [key + "=" for key in override_keys(recipe) if key.startswith(incomplete)]


def override_keys(recipe: str) -> list[str]:
    """Dotted keys that may be overridden: those of the recipe, and every field of its stages.

    Args:
        recipe: Name or path. One that cannot be read gives the common keys only.
    """
    keys = dict.fromkeys(RUN_KEYS)
    stages: dict[str, str] = {}
    for data in _chain(recipe, depth=0):
        for key in _leaves(data, ""):
            if not key.startswith(("extends", "version")):
                keys.setdefault(key)
        found = data.get("stages")
        for name, stage in found.items() if isinstance(found, Mapping) else ():
            if isinstance(stage, Mapping) and isinstance(stage.get("type"), str):
                stages[str(name)] = stage["type"]
    for name, kind in stages.items():
        for field in _fields(kind):
            keys.setdefault(f"stages.{name}.{field}")
    return sorted(keys)


def _chain(recipe: str, depth: int) -> Iterator[Mapping[str, Any]]:
    """Yield the recipe's data and that of everything it extends; stops at what it cannot read."""
    import yaml

    from llmcompress.recipe.catalog import shipped_path

    path = Path(recipe)
    if not path.is_file():
        path = shipped_path(recipe) or path
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return
    if not isinstance(data, Mapping):
        return
    yield data
    above = data.get("extends") or []
    for name in [above] if isinstance(above, str) else above:
        if depth < 8:
            beside = path.parent / str(name)
            yield from _chain(str(beside) if beside.is_file() else str(name), depth + 1)


def _leaves(data: Any, prefix: str) -> Iterator[str]:
    if isinstance(data, Mapping) and data:
        for name, value in data.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    elif prefix:
        yield prefix


def _fields(kind: str) -> list[str]:
    from llmcompress.stages import stage_types

    stage = stage_types().get(kind)
    return [] if stage is None else [name for name in stage.Config.model_fields if name != "type"]
