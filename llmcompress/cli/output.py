"""The only place that prints: results to stdout (for people or as JSON), everything else to stderr."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.durable import write_durably
from llmcompress.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

    from llmcompress.errors import ExitCode
    from llmcompress.pipeline.sinks import Sink

# rich assumes 80 columns when it cannot ask a terminal; logs need no such limit
PIPE_WIDTH = 160


class Output:
    """How one command talks.

    Args:
        json_mode: Print results as one JSON object.
        quiet: Print results and errors only.
        debug: Show tracebacks.
    """

    def __init__(self, json_mode: bool = False, quiet: bool = False, debug: bool = False) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self.debug = debug
        self.run_dir: Path | None = None
        self._answered = False

    def result(self, data: Any, show: Callable[[Console], None] | str) -> None:
        """Print a command's result.

        Args:
            data: What ``--json`` prints; dataclasses and paths are fine.
            show: Prints it for people, or the text itself.
        """
        self._answered = True
        try:
            if self.json_mode:
                self.write(_as_json(data))
            elif isinstance(show, str):
                self.write(show)
            else:
                show(console(sys.stdout))
        except BrokenPipeError:
            # `… | head -1`; the exit code may still say something, such as that a gate failed
            drop_output()
        except OSError as error:
            # a full disk behind `>`: it is not the run's folder that wants for room
            error.filename = error.filename or "standard output"
            raise

    def write(self, text: str) -> None:
        """Print text to stdout as it is, without wrapping or markup."""
        sys.stdout.write(text if text.endswith("\n") else text + "\n")
        sys.stdout.flush()

    def note(self, text: str) -> None:
        """Say something in passing, on stderr."""
        if not self.quiet:
            _stderr(text)

    def warning(self, text: str) -> None:
        """Warn, on stderr, also with ``--quiet``."""
        with suppress(OSError):
            console(sys.stderr).print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)

    def error(self, message: str, hint: str | None, code: ExitCode, **extra: Any) -> None:
        """Print an error with its next step; with ``--json`` also as an object on stdout.

        Where a result has been printed already (a gate failed after the run), stdout holds that one object only.
        """
        screen = console(sys.stderr)
        with suppress(OSError):  # stdout and the exit code still tell
            screen.print("error:", style="bold red", end=" ", highlight=False)
            screen.print(message, markup=False, highlight=False, soft_wrap=True)
            if hint:
                screen.print("next:", style="bold", end=" ", highlight=False)
                screen.print(hint, markup=False, highlight=False, soft_wrap=True)
        if self.json_mode and not self._answered:
            data = {"message": message, "next": hint, "kind": code.name.lower(), "exit_code": int(code), **extra}
            self.write(_as_json({"error": data}))

    def sinks(self) -> list[Sink]:
        """Displays for a run: live on a terminal, lines otherwise, warnings only with ``--quiet``."""
        from llmcompress.pipeline.sinks import PlainSink, QuietSink, RichSink

        if self.quiet:
            return [QuietSink(sys.stderr)]
        if interactive(sys.stderr):
            return [RichSink(console(sys.stderr))]
        return [PlainSink(sys.stderr)]


def drop_output() -> None:
    """Send what is still written to stdout nowhere, also at interpreter exit: its reader has gone."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def interactive(stream: Any) -> bool:
    """Whether a person is watching ``stream``: a terminal that can move its cursor, and not a CI job."""
    return bool(stream.isatty()) and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def console(stream: Any) -> Console:
    """A rich console on ``stream``; rich itself honours ``NO_COLOR`` and leaves pipes uncoloured."""
    from rich.console import Console

    class Piped(Console):
        def on_broken_pipe(self) -> None:  # rich would end the process with exit code 1
            raise BrokenPipeError

    return Piped(file=stream, width=None if stream.isatty() else _pipe_width())


def _pipe_width() -> int:
    """Columns of a stream that is no terminal: ``COLUMNS``, else those of the terminal behind a pager or ``head``."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    try:
        return os.get_terminal_size(sys.__stderr__.fileno()).columns if sys.__stderr__ else PIPE_WIDTH
    except (OSError, ValueError):
        return PIPE_WIDTH


def _stderr(text: str) -> None:
    with suppress(OSError):  # nobody reads along any more, or its log's disk is full: no reason to stop
        sys.stderr.write(text + "\n")
        sys.stderr.flush()


def _as_json(data: Any) -> str:
    """JSON in the signs that stdout has; others are escaped and not lost."""
    utf8 = str(getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "") == "utf8"
    return json.dumps(plain(data), indent=1, ensure_ascii=not utf8)


def plain(data: Any) -> Any:
    """Turn dataclasses, paths, tuples, sets and non-finite numbers into what JSON can hold."""
    if is_dataclass(data) and not isinstance(data, type):
        return plain(asdict(data))
    if isinstance(data, dict):
        return {str(key): plain(value) for key, value in data.items()}
    if isinstance(data, list | tuple | set | frozenset):
        return [plain(value) for value in data]
    if isinstance(data, float) and not math.isfinite(data):
        return None
    if isinstance(data, str | int | float | bool) or data is None:
        return data
    return str(data)


def writable(path: Path) -> Path:
    """A file that a command is to write at its end, refused at its beginning where it cannot be.

    Raises:
        UsageError: Its folder does not exist, or the path is a folder itself.
    """
    if path.is_dir() or not path.absolute().parent.is_dir():
        what = "is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise UsageError(f"{path}: {what}", "name a file in a folder that exists")
    return path


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write rows of equal keys as a table with a header; None becomes an empty cell."""
    text = io.StringIO()
    made = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    made.writeheader()
    made.writerows(rows)
    write_durably(path, text.getvalue().encode())


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    title: str | None = None,
    right: str = "",
    named: bool = False,
) -> Any:
    """A rich table without heavy borders.

    Args:
        columns: Headers.
        rows: Cells; None is shown as a dash.
        title: Title above.
        right: Names of right-aligned columns, separated by ``|``.
        named: Whether the first column holds names, which are not broken over lines; others give way.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    made = Table(*(), title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for place, name in enumerate(columns):
        justify: Any = "right" if right and name in right.split("|") else "left"
        made.add_column(name, justify=justify, overflow="fold", no_wrap=named and place == 0)
    for row in rows:
        made.add_row(*(Text("–" if cell is None else str(cell)) for cell in row))
    return made
