"""Files that are absent or complete."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from llmcompress import durable
from llmcompress.cli.failures import translate


def test_a_full_disk_leaves_what_was_there_and_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "facts.json"
    durable.write_durably(path, b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        durable.write_durably(path, b"after")
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
    told = translate(caught.value)
    assert told is not None and told.message == f"{path}: no space left on the disk" and told.exit_code == 5
    # without a run there is nothing to resume
    assert told.hint == "free some space, then the same command again"
    in_a_run = translate(caught.value, tmp_path)
    assert in_a_run is not None and "resume" in str(in_a_run.hint)


def test_a_stop_leaves_nothing_half_written(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), durable.durably(tmp_path / "facts.json") as handle:
        handle.write(b"half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_another_ones_failure_keeps_its_own_name(tmp_path: Path) -> None:
    path, lost = tmp_path / "facts.json", OSError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(OSError, match="reset") as caught, durable.durably(path):
        raise lost
    assert caught.value.filename is None and list(tmp_path.iterdir()) == []


def test_a_part_that_cannot_be_opened_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, part = tmp_path / "facts.json", tmp_path / "facts.json.part"
    part.write_bytes(b"another's")

    def refused(self: Path, _mode: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refused)
    with pytest.raises(PermissionError):
        durable.write_durably(path, b"mine")
    monkeypatch.undo()
    assert part.read_bytes() == b"another's"
