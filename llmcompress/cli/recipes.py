"""``recipes ls | show | cp`` and ``schema``: the recipes that ship with the package."""

from __future__ import annotations

import difflib
import json
import re
import shlex
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llmcompress.cli.command import command
from llmcompress.cli.completion import complete_recipe
from llmcompress.cli.output import Output, table
from llmcompress.errors import InputError, UsageError, command_line

if TYPE_CHECKING:
    from rich.console import Console

NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="Name as `recipes ls` shows it.", autocompletion=complete_recipe)
]

FullOption = Annotated[
    bool, typer.Option("--full", help="Write out what it takes from the recipes that it extends; without comments.")
]


def register(app: typer.Typer) -> None:
    """Add the commands to the application."""
    group = typer.Typer(help="List, show and copy the recipes that ship with llmcompress.", no_args_is_help=True)
    command(group, "ls")(list_recipes)
    command(group, "show")(show_recipe)
    command(group, "cp")(copy_recipe)
    app.add_typer(group, name="recipes")
    command(app, "schema")(print_schema)


def find(name: str) -> Path:
    """File of a shipped recipe.

    Raises:
        UsageError: There is none of that name.
    """
    from llmcompress.recipe.catalog import list_recipes as every
    from llmcompress.recipe.catalog import shipped_path

    path = shipped_path(name)
    if path is not None:
        return path
    near = difflib.get_close_matches(name.removesuffix(".yaml"), [info.name for info in every()], n=1)
    guess = f" (did you mean {near[0]}?)" if near else ""
    raise UsageError(f"no shipped recipe is called {name!r}{guess}", "llmcompress recipes ls")


def list_recipes(
    out: Output,
    everything: Annotated[bool, typer.Option("--all", help="Also the fragments in base/ that others extend.")] = False,
) -> None:
    """List the shipped recipes."""
    from llmcompress.recipe.catalog import SYSTEMS
    from llmcompress.recipe.catalog import list_recipes as every

    found = every(fragments=everything)

    def show(screen: Console) -> None:
        name_width = max(len(info.name) for info in found)
        for system, about in {**SYSTEMS, "": "others"}.items():
            rows = [(info.name, info.runs_on, info.title) for info in found if info.system == system]
            if rows:
                listed = table(("recipe", "runs on", "what it does"), rows)
                listed.show_header = False
                # or columns of one group would begin elsewhere than those of the next
                listed.columns[0].min_width, listed.columns[1].min_width = name_width, len("GPU, 48.1 GB")
                screen.print(f"\n{system}: {about}" if system else f"\n{about}", style="bold", highlight=False)
                screen.print(listed)
        screen.print("\nneeds in full: llmcompress recipes show NAME; next: llmcompress run NAME", highlight=False)

    out.result({"recipes": found}, show)


def show_recipe(out: Output, name: NameArgument, full: FullOption = False) -> None:
    """Print a shipped recipe."""
    path = find(name)
    text = whole(path) if full else path.read_text(encoding="utf-8")
    out.result({"name": name, "path": str(path), "text": text}, text)


def copy_recipe(
    out: Output,
    name: NameArgument,
    target: Annotated[Path, typer.Argument(metavar="[TARGET]", help="File or folder to write.")] = Path(),
    full: FullOption = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
) -> None:
    """Copy a shipped recipe, to change it."""
    source = find(name)
    path = target / source.name if target.is_dir() else target
    if path.exists() and not force:
        raise UsageError(f"{path}: exists already", "give another name, or --force")
    if not path.parent.is_dir():
        raise InputError(f"{path.parent}: no such folder", f"mkdir -p {path.parent}")
    text = whole(source) if full else source.read_text(encoding="utf-8")
    path.write_text(_moved(text, source, path), encoding="utf-8")
    out.result({"name": name, "path": str(path)}, f"{path}")
    out.note(f"next: {command_line('validate', path)}")


def whole(path: Path) -> str:
    """A recipe that extends no other: its header, then everything that it and what it extends say."""
    import yaml

    from llmcompress.recipe.load import load_recipe

    loaded = load_recipe(path, allow_missing=True)
    head = takewhile(lambda line: line.startswith("#"), loaded.text.splitlines())
    plain = {key: value for key, value in loaded.composed.items() if key != "vars"}
    return "\n".join([*head, yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=110)])


def _moved(text: str, source: Path, path: Path) -> str:
    """A shipped recipe as it must read at ``path``: what it extends by its shipped name, the schema where it is.

    Under another file name it also gets that name, and with it a run folder of its own.
    """
    from llmcompress.recipe.catalog import ROOT
    from llmcompress.recipe.schema import NAME_PATTERN

    root = ROOT.resolve()
    renamed = path.stem if path.stem != source.stem and re.fullmatch(NAME_PATTERN, path.stem) else None
    lines = []
    for given in text.splitlines(keepends=True):
        line = given
        key, colon, value = line.partition(":")
        named = value.split("#")[0].strip().strip("\"'")
        if line.startswith("# yaml-language-server:"):
            line = f"# yaml-language-server: $schema={root / 'recipe.schema.json'}\n"
        elif line.startswith("# run: llmcompress run "):
            words = line.split(" ")
            line = " ".join([*words[:4], shlex.quote(str(path)) + ("" if len(words) > 5 else "\n"), *words[5:]])
        elif renamed and line.startswith("name:"):
            line = f"name: {renamed}\n"
        elif key.strip() == "extends" and colon and named and not named.startswith(("[", "/")):
            found = (source.parent / named).resolve()
            if found.is_relative_to(root) and found.exists():
                line = f"{key}: {found.relative_to(root).with_suffix('').as_posix()}\n"
        lines.append(line)
    return "".join(lines)


def print_schema(out: Output) -> None:
    """Print the JSON schema of recipes, for editors.

    Those with a YAML language server (VS Code, Neovim, …) read where it is from a recipe's first line,
    `# yaml-language-server: $schema=FILE`; `recipes cp` writes that line.
    """
    from llmcompress.recipe.schema import schema

    found: dict[str, Any] = schema()
    out.write(json.dumps(found, indent=2, ensure_ascii=False))
