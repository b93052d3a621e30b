"""Which of several processes is blamed, and what is left to say of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmcompress.cli import app
from llmcompress.cli import command as commands
from llmcompress.cli.launch import AlreadyTold, _failure
from llmcompress.cli.output import Output
from llmcompress.errors import ExitCode, LLMCompressError


def failure(logs: Path, *ended: tuple[int, int, str]) -> LLMCompressError:
    """The error for processes that ended with ``(rank, exit code, what it said)``, in this order."""
    failures = {}
    for moment, (rank, code, said) in enumerate(ended):
        failures[rank] = SimpleNamespace(local_rank=rank, exitcode=code, timestamp=moment)
        if said:
            (logs / str(rank)).mkdir(parents=True)
            (logs / str(rank) / "stderr.log").write_text(f"loading\nerror: {said}\nnext: nothing\n")
    return _failure(failures, logs, 3, "again")


def test_what_the_first_process_has_told_is_not_told_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = failure(tmp_path, (0, 6, ""), (1, -15, ""))
    assert isinstance(told, AlreadyTold) and told.exit_code == ExitCode.GATE
    # the first process has printed its JSON object; a second one would be no JSON
    monkeypatch.setattr(commands, "current", Output(json_mode=True))
    assert app._expected(told) == ExitCode.GATE
    assert capsys.readouterr() == ("", "")


def test_what_another_process_said_is_told_here(tmp_path: Path) -> None:
    error = failure(tmp_path, (2, 5, "too large"), (0, 4, ""), (1, -15, ""))
    assert not isinstance(error, AlreadyTold)
    assert (error.message, error.exit_code) == ("process 2 of 3 failed: too large", ExitCode.RESOURCES)


def test_a_process_that_died_without_a_word_is_an_error(tmp_path: Path) -> None:
    killed = failure(tmp_path, (0, 4, ""), (1, -9, ""))
    assert "process 1 of 3 was killed (SIGKILL)" in killed.message
    # the first process has only lost it, and said nothing
    lost = failure(tmp_path, (1, 77, ""), (0, 4, ""))
    assert not isinstance(lost, AlreadyTold) and "failed with exit code" in lost.message
