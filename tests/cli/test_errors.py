"""Exit codes, messages with a next step, and no tracebacks on the screen."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer

from llmcompress.cli import app as module
from llmcompress.cli import elsewhere
from llmcompress.cli.app import invoke
from llmcompress.cli.failures import translate
from llmcompress.errors import (
    EnvironmentProblem,
    ExitCode,
    ExportError,
    GateFailed,
    InputError,
    Interrupted,
    LLMCompressError,
    RecipeError,
    ResourceError,
    UsageError,
)


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def examine() -> dict[str, Any]:
        raise error

    monkeypatch.setattr("llmcompress.cli.doctor.examine", examine)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UsageError("u", "n"), 2),
        (RecipeError("r", "n"), 3),
        (InputError("i", "n"), 4),
        (EnvironmentProblem("e", "n"), 4),
        (ResourceError("m", "n"), 5),
        (GateFailed("g", "n"), 6),
        (ExportError("x", "n"), 7),
        (Interrupted("stopped", "llmcompress resume runs/x"), 130),
        (KeyboardInterrupt(), 130),
        (MemoryError(), 5),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 TB"), 5),
        (OSError(errno.ENOSPC, "No space left on device", "runs/x/blocks/00001.safetensors"), 5),
        (OSError(errno.EROFS, "Read-only file system", "runs/x/state.json"), 4),
        (PermissionError(errno.EACCES, "Permission denied", "/root/secret"), 4),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x" * 5000), 4),
        (OSError(errno.EIO, "Input/output error", "runs/x/state.json"), 4),
        (OSError(errno.EMFILE, "Too many open files"), 5),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "missing.txt"), 4),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), 4),
        (ValueError("a bug"), 1),
        (ModuleNotFoundError("No module named 'llmcompress.oops'", name="llmcompress.oops"), 1),
    ],
)
def test_exit_codes_and_messages(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int
) -> None:
    fail_with(monkeypatch, error)
    assert invoke(["doctor"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "Traceback" not in captured.err
    if not isinstance(error, KeyboardInterrupt):
        assert re.search(r"^next: \S", captured.err, re.MULTILINE)


def test_json_errors_are_one_object_on_stdout(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_with(monkeypatch, ResourceError("does not fit", "make it smaller"))
    assert invoke(["doctor", "--json"]) == 5
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {
        "error": {"message": "does not fit", "next": "make it smaller", "kind": "resources", "exit_code": 5}
    }
    assert "does not fit" in captured.err


def test_a_bug_saves_its_traceback_and_debug_shows_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    assert invoke(["doctor"]) == 1
    text = capsys.readouterr().err
    (saved,) = tmp_path.glob("llmcompress-*.log")
    assert str(saved) in text
    assert "ZeroDivisionError: by zero" in saved.read_text()
    assert invoke(["doctor", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_does_not_hide_the_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module.tempfile, "mkstemp", full)
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    assert invoke(["doctor"]) == 1
    assert "by zero" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words", [["nonsense"], ["run"], ["run", "--until"], ["doctor", "--wrong"], ["recipes", "cp"], ["version", "extra"]]
)
def test_usage_errors_exit_2_and_point_to_help(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(words) == ExitCode.USAGE
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "--help" in captured.err


def test_causes_are_searched_too() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            raise RuntimeError("serializing failed") from error
    except RuntimeError as error:
        found = translate(error)
    assert isinstance(found, ResourceError)
    assert translate(ValueError("no")) is None


def test_every_error_class_has_a_code_of_its_own_meaning() -> None:
    codes = {cls: cls.exit_code for cls in LLMCompressError.__subclasses__()}
    assert codes[GateFailed] == 6
    assert all(code != ExitCode.UNEXPECTED for code in codes.values())


def test_a_reader_that_goes_away_is_no_error() -> None:
    import subprocess
    import sys

    command = f"{sys.executable} -m llmcompress schema | head -c 10; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0
    assert done.stderr == ""


def test_nor_while_a_command_prints_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    import errno
    import sys

    dropped: list[bool] = []
    # typer wraps both streams on the way
    monkeypatch.setattr(sys, "stdout", sys.stdout)
    monkeypatch.setattr(sys, "stderr", sys.stderr)
    monkeypatch.setattr("llmcompress.cli.app.drop_output", lambda: dropped.append(True))
    fail_with(monkeypatch, BrokenPipeError(errno.EPIPE, "Broken pipe"))
    assert invoke(["doctor"]) == 0 and dropped
    fail_with(monkeypatch, SystemExit(7))
    with pytest.raises(SystemExit):
        invoke(["doctor"])


@pytest.mark.parametrize(
    ("words", "step"),
    [
        (["eval", "x", "--batch_size", "4"], "leave it out"),
        (["eval", "--model", "x"], "first word after the command"),
        (["eval", "x", "--tasks", "arc_easy"], "--task NAME"),
        (["run", "gptq", "--bits", "3"], "stages.quantize.rules.linears.bits=3"),
        (["quantize", "x"], "llmcompress run gptq model.path=FOLDER"),
        (["list"], "llmcompress recipes ls"),
        (["eval", "x", "--frob"], "llmcompress eval --help"),
        (["eval", "x", "--limit", "many"], "llmcompress eval --help"),
        (["frob"], "llmcompress --help"),
    ],
)
def test_words_of_other_tools_are_answered_with_ours(
    capsys: pytest.CaptureFixture[str], words: list[str], step: str
) -> None:
    assert invoke(words) == ExitCode.USAGE
    message, _, hint = capsys.readouterr().err.partition("\nnext: ")
    assert step in hint
    # click finds --help like --model, and --quiet like --bits
    assert "Possible" not in message


def test_commands_named_for_words_of_other_tools_exist(capsys: pytest.CaptureFixture[str]) -> None:
    known = typer.main.get_command(module.app).commands  # type: ignore[attr-defined]
    named = {line.split()[1] for line in elsewhere._COMMANDS.values()}
    assert named <= set(known)
    assert not set(elsewhere._COMMANDS) & set(known)
