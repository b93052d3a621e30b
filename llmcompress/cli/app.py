"""The command line: ``llmcompress COMMAND``. Nothing here or below imports torch before it is needed."""

from __future__ import annotations

import atexit
import gc
import io
import logging
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from llmcompress import __version__
from llmcompress.cli import (
    bench,
    doctor,
    evaluate,
    experts,
    export,
    family,
    generate,
    inspect,
    plan,
    recipes,
    report,
    run,
    serve,
    sweep,
)
from llmcompress.cli import command as commands
from llmcompress.cli.elsewhere import command_here, option_here
from llmcompress.cli.failures import translate
from llmcompress.cli.help import tidy
from llmcompress.cli.launch import AlreadyTold
from llmcompress.cli.output import Output, drop_output
from llmcompress.distributed.world import LAUNCHED, LOST, PeerLost
from llmcompress.errors import ExitCode, Interrupted, LLMCompressError
from llmcompress.plugins import culprit

_CONTEXT = {"help_option_names": ["-h", "--help"]}
app = typer.Typer(
    name="llmcompress",
    help="Compress large language models from YAML recipes.",
    epilog="Start with: llmcompress run quickstart\n\n"
    "Your own model: llmcompress plan gptq model.path=FOLDER, then run; others: llmcompress recipes ls",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings=_CONTEXT,
)


def _print_version(asked: bool) -> None:
    if asked:
        commands.current.write(f"llmcompress {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for part in (
    run,
    sweep,
    plan,
    recipes,
    inspect,
    evaluate,
    experts,
    export,
    family,
    generate,
    serve,
    bench,
    report,
    doctor,
):
    part.register(app)

# base class of every usage error, of click or of the copy of click that newer typer brings along
_ClickError: type[Exception] = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

# read by the libraries when they are loaded; a user's own setting wins
LIBRARY_SETTINGS = {
    # threads that spin while they wait make everything 5 to 10 times slower on a machine that is shared
    "OMP_WAIT_POLICY": "PASSIVE",
    # oneDNN keeps a megabyte of code for each shape of a bf16 product, 1024 of them by default; experts get another
    # number of tokens in every layer, so the shapes of earlier layers are of no use
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    # other libraries' bars and notices would mix with ours on stderr
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Entry point of the console script; ends the process with a code of :class:`ExitCode`."""
    # importing torch and transformers makes a million objects that stay: looking for garbage among them every 700 new
    # ones costs a sixth of the time of all imports
    gc.set_threshold(100_000, 20, 20)
    leave(int(invoke(arguments)))


def leave(code: int) -> NoReturn:
    """End the process: exit callbacks run and output is flushed, but the interpreter does not take itself apart.

    Freeing a million objects one by one, which the end of the process does anyway, costs most of a second.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):  # the reader has gone
            stream.flush()
    os._exit(code)


def invoke(arguments: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code.

    Args:
        arguments: Words after the program name; ``sys.argv`` by default.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    _survive_closed_streams()
    _survive_narrow_encodings()
    for key, value in LIBRARY_SETTINGS.items():
        os.environ.setdefault(key, value)
    # records that no handler takes would reach stderr through logging's last resort
    logging.getLogger().addHandler(logging.NullHandler())
    # a log that cannot be written is no reason for tracebacks between other lines
    logging.raiseExceptions = False
    # the command itself replaces this once its options are parsed
    commands.current = Output("--json" in words, "--quiet" in words, "--debug" in words)
    try:
        code = tidy(typer.main.get_command(app), _CONTEXT).main(
            args=words, prog_name="llmcompress", standalone_mode=False
        )
    except LLMCompressError as error:
        return _expected(error)
    except _ClickError as error:
        return _usage(error)
    except (KeyboardInterrupt, typer.Abort):
        code = ExitCode.INTERRUPTED
    except BrokenPipeError:
        # the reader has gone (`llmcompress schema | head`): nothing left to say
        drop_output()
        return ExitCode.OK
    except SystemExit as stop:
        # what typer makes of it where a command prints as it goes (`llmcompress generate … | head`)
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
        drop_output()
        return ExitCode.OK
    except Exception as error:  # the one place where a bug becomes a message
        return _foreign(error)
    # Ctrl-C outside a run: typer turns it into this code or into Abort, depending on its version
    if code == ExitCode.INTERRUPTED:
        commands.current.error("stopped by Ctrl-C", "run the command again", ExitCode.INTERRUPTED)
    return code if isinstance(code, int) else ExitCode.OK


def _survive_closed_streams() -> None:
    """Give a process that was started without stdin, stdout or stderr (``>&-``, some daemons) empty ones.

    Python has None for them, and the next file that is opened would get the number of the missing one.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def _survive_narrow_encodings() -> None:
    """Let a terminal or pipe that is not UTF-8 show ``?`` where it has no sign for ``→``, instead of ending a run."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


# said when an error brings no next step of its own
_NEXT_STEPS = {
    ExitCode.RECIPE: "correct the recipe, then: llmcompress validate RECIPE",
    ExitCode.ENVIRONMENT: "correct what is named above; `llmcompress inspect PATH` shows what a model folder holds",
    ExitCode.RESOURCES: "llmcompress plan RECIPE shows what is needed",
    ExitCode.EXPORT: "choose another format",
}


def _expected(error: LLMCompressError) -> int:
    out = commands.current
    if out.debug:
        traceback.print_exception(error)
    _save_traceback(error, out.run_dir, always=False)
    if isinstance(error, AlreadyTold):
        return error.exit_code
    if LAUNCHED in os.environ and isinstance(error, PeerLost | Interrupted):
        # one process of several: the one that started them tells what has happened
        return LOST if isinstance(error, PeerLost) else error.exit_code
    out.error(error.message, error.hint or _NEXT_STEPS.get(error.exit_code), error.exit_code)
    return error.exit_code


def _usage(error: Exception) -> int:
    message = error.format_message() if hasattr(error, "format_message") else str(error)
    if type(error).__name__ == "NoArgsIsHelpError":
        # with rich the help has been printed already, without it is the message
        sys.stderr.write(message and message + "\n")
        return ExitCode.USAGE
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "llmcompress"
    if hint := _known_elsewhere(error, message):
        # what click finds alike is no help beside it
        message = message.partition(" (Possible options")[0]
    commands.current.error(message, hint or f"{path} --help", ExitCode.USAGE)
    return ExitCode.USAGE


def _known_elsewhere(error: Exception, message: str) -> str | None:
    """The next step for an option or a command of another tool."""
    if isinstance(option := getattr(error, "option_name", None), str):
        return option_here(option) if message.startswith("No such option") else None
    command = re.match(r"No such command '([^']+)'", message)
    return command_here(command[1]) if command else None


def _foreign(error: Exception) -> int:
    known = translate(error, commands.current.run_dir)
    if known is not None:
        known.__cause__ = error
        return _expected(known)
    out = commands.current
    if out.debug:
        traceback.print_exception(error)
    saved = _save_traceback(error, out.run_dir, always=True)
    package = culprit(error.__traceback__)
    text = f"unexpected {type(error).__name__}{f' in the plug-in {package}' if package else ''}: {error}"
    whom = f" to the authors of {package}" if package else ""
    hint = f"the traceback is in {saved}; please report it{whom}" if saved else "run again with --debug"
    out.error(text, hint, ExitCode.UNEXPECTED, log=saved)
    return ExitCode.UNEXPECTED


def _save_traceback(error: BaseException, run_dir: Path | None, *, always: bool) -> Path | None:
    """Append the traceback to the run's log, or with ``always`` to a temporary file; None if neither can be written."""
    text = "".join(traceback.format_exception(error))
    try:
        # a folder that was refused because it holds other things gets nothing of ours
        if run_dir is not None and (run_dir / "run.json").is_file():
            path = run_dir / "log.txt"
            with path.open("a", encoding="utf-8") as handle:
                handle.write(text)
            return path
        if not always:
            return None
        number, name = tempfile.mkstemp(prefix="llmcompress-", suffix=".log")
        with os.fdopen(number, "w", encoding="utf-8") as saved:
            saved.write(text)
        return Path(name)
    except OSError:
        return None
