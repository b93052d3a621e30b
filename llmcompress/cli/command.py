"""Registers commands: every one gets ``--json``, ``--quiet`` and ``--debug`` and an :class:`Output`.

Options that several commands take are a dataclass: a parameter of its type stands for all its fields.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Annotated, Any

import typer

from llmcompress.cli.output import Output

_COMMON = {
    "json_mode": ("--json", "Print the result as one JSON object."),
    "quiet": ("--quiet", "Print results and errors only."),
    "debug": ("--debug", "Show the traceback of any error."),
}

current: Output = Output()
"""Output of the command that runs; the error handler in :mod:`llmcompress.cli.app` uses it."""


def command(app: typer.Typer, name: str, **settings: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Register ``function(out, …)`` as a command; ``out`` is made from the common options, dataclasses from theirs.

    Args:
        app: Where to register.
        name: Name on the command line.
        settings: Passed to :meth:`typer.Typer.command`.
    """

    def register(function: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(function, eval_str=True)
        own: list[inspect.Parameter] = []
        groups: dict[str, Any] = {}
        for parameter in list(signature.parameters.values())[1:]:
            kind = parameter.annotation
            if isinstance(kind, type) and is_dataclass(kind):
                groups[parameter.name] = kind
                own += inspect.signature(kind, eval_str=True).parameters.values()
            else:
                own.append(parameter)

        @functools.wraps(function)
        def call(**values: Any) -> None:
            global current  # noqa: PLW0603 - one command per process; the top-level handler has no other way to it
            current = Output(*(values.pop(key) for key in _COMMON))
            for key, group in groups.items():
                values[key] = group(**{field.name: values.pop(field.name) for field in fields(group)})
            function(current, **values)

        common = [
            inspect.Parameter(
                key,
                inspect.Parameter.KEYWORD_ONLY,
                default=False,
                annotation=Annotated[bool, typer.Option(flag, help=text, rich_help_panel="Output")],
            )
            for key, (flag, text) in _COMMON.items()
        ]
        named = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        call.__signature__ = signature.replace(parameters=[*named, *common])  # type: ignore[attr-defined]
        call.__annotations__ = {p.name: p.annotation for p in (*named, *common)}
        # typer follows __wrapped__ for type hints and would find the parameter `out`
        del call.__wrapped__  # type: ignore[attr-defined]
        app.command(name, **settings)(call)
        return function

    return register
