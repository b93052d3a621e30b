"""Which of several processes is blamed, and what is left to say of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmcompress.cli import app
from llmcompress.cli import command as commands
from llmcompress.cli.launch import AlreadyTold, _failure
from llmcompress.cli.output import Output
from llmcompress.distributed.world import LAUNCHED, LOST, PeerLost
from llmcompress.errors import ExitCode, LLMCompressError


def failure(logs: Path, *ended: tuple[int, int, str], then: str = "nothing") -> LLMCompressError:
    """The error for processes that ended with ``(rank, exit code, what it said)``, in this order."""
    failures = {}
    for moment, (rank, code, said) in enumerate(ended):
        failures[rank] = SimpleNamespace(local_rank=rank, exitcode=code, timestamp=moment)
        if said:
            (logs / str(rank)).mkdir(parents=True)
            (logs / str(rank) / "stderr.log").write_text(f"loading\nerror: {said}\nnext: {then}\n")
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
    # the first process, which has lost it, may end before it
    error = failure(tmp_path, (0, LOST, ""), (2, 5, "too large"), (1, -15, ""))
    assert not isinstance(error, AlreadyTold)
    assert (error.message, error.exit_code) == ("process 2 of 3 failed: too large", ExitCode.RESOURCES)
    assert error.hint == "again"


def test_the_traceback_of_another_process_is_named(tmp_path: Path) -> None:
    kept = "the traceback is in /tmp/x.log; please report it"
    error = failure(tmp_path, (1, 1, "unexpected KeyError"), (0, LOST, ""), then=kept)
    assert error.hint == f"again; {kept}" and error.exit_code == ExitCode.UNEXPECTED


def test_a_process_that_lost_another_is_silent_only_where_a_launcher_speaks(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commands, "current", Output())
    monkeypatch.setenv(LAUNCHED, "1")
    assert app._expected(PeerLost("gone")) == LOST
    assert capsys.readouterr() == ("", "")
    monkeypatch.delenv(LAUNCHED)
    assert app._expected(PeerLost("gone")) == ExitCode.ENVIRONMENT
    assert "gone" in capsys.readouterr().err


def test_a_process_that_died_without_a_word_is_an_error(tmp_path: Path) -> None:
    killed = failure(tmp_path, (0, 4, ""), (1, -9, ""))
    assert "process 1 of 3 was killed (SIGKILL)" in killed.message
    # the first process has only lost it, and said nothing
    lost = failure(tmp_path, (0, LOST, ""), (1, 77, ""))
    assert not isinstance(lost, AlreadyTold) and "process 1 of 3 failed with exit code 77" in lost.message
    # nobody knows more than that the others are gone
    alone = failure(tmp_path, (0, LOST, ""), (1, -15, ""))
    assert not isinstance(alone, AlreadyTold) and alone.exit_code == ExitCode.ENVIRONMENT
    assert "process 0 of 3 lost the others" in alone.message
