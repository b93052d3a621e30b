"""What typer's help pages say badly, put right before it prints them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import typer


def tidy(root: Any, settings: dict[str, Any]) -> Any:
    """Make the help of a command and of all below it readable; returns ``root``.

    Flags lose the type that newer typer shows behind them (``--json <bool>`` looks as if a value were to follow), and
    the lines of a paragraph are joined: a terminal's width is not that of a docstring.

    Args:
        root: The command or group, from :func:`typer.main.get_command`.
        settings: Context settings of the application.
    """
    for command in _commands(root):
        own = (
            command.get_help_option(typer.Context(command, **settings)) if hasattr(command, "get_help_option") else None
        )
        for option in (*command.params, *([own] if own is not None else [])):
            if getattr(option, "is_flag", False) and option.metavar is None:
                option.metavar = ""
        if command.help:
            command.help = "\n\n".join(" ".join(part.split()) for part in command.help.split("\n\n"))
    return root


def _commands(root: Any) -> Iterator[Any]:
    yield root
    for child in getattr(root, "commands", {}).values():
        yield from _commands(child)
