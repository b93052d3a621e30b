from __future__ import annotations

import fcntl
import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from llmcompress.errors import EnvironmentProblem, InputError, UsageError
from llmcompress.pipeline import run_dir
from llmcompress.pipeline.run_dir import RunDir, RunLock, RunRecord, StageRecord


def record(name: str = "quantize", **changes: object) -> StageRecord:
    made = StageRecord(name, "gptq", "finished", "abc", {"bits": 3}, ["packed"], artifacts={})
    return replace(made, **changes)  # type: ignore[arg-type]


def test_records_survive_the_disk(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create()
    assert folder.read_run() is None
    assert folder.read_stage("quantize") is None
    run = RunRecord("demo", "running", "cpu", "float32", 2, {"run": {"seed": 0}}, ["load"], {"torch": "2"})
    folder.write_run(run)
    folder.write_stage(record(seconds=1.5))
    assert folder.read_run() == run
    assert folder.read_stage("quantize") == record(seconds=1.5)


def test_damaged_or_foreign_records_are_refused(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.create()
    (tmp_path / "run.json").write_text('{"version": 1, "na')
    with pytest.raises(InputError, match="damaged"):
        folder.read_run()
    (tmp_path / "run.json").write_text('{"version": 99}')
    with pytest.raises(InputError, match="another version"):
        folder.read_run()
    (tmp_path / "run.json").write_text('{"version": 1, "name": "x"}')
    with pytest.raises(InputError, match="damaged"):
        folder.read_run()


def test_a_folder_with_other_things_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("important")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        RunDir(tmp_path).create()
    with pytest.raises(UsageError, match="is a file"):
        RunDir(tmp_path / "thesis.tex").create()


def test_what_a_kill_at_the_first_write_leaves_is_not_foreign(tmp_path: Path) -> None:
    for name in ("run.json.part", ".lock", ".probe"):
        (tmp_path / name).write_text("")
    (tmp_path / "stages").mkdir()
    RunDir(tmp_path).create()


def test_a_folder_that_cannot_be_written_is_an_environment_problem(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Path, data: bytes) -> int:
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_bytes", refuse)
    with pytest.raises(EnvironmentProblem, match="Read-only"):
        RunDir(tmp_path / "run").create()


def test_a_stage_is_forgotten_before_what_it_made_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or a kill in between would leave half a stage that looks finished."""
    folder = RunDir(tmp_path)
    folder.create()
    (tmp_path / "artifact").mkdir()
    folder.write_stage(record(artifacts={"native": "artifact"}))

    def killed(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run_dir.shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        folder.discard_stage("quantize")
    left = folder.read_stage("quantize")
    assert left is not None and not left.finished() and left.fingerprint != record().fingerprint


def test_clearing_keeps_others_out(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.create()
    with RunLock(tmp_path):
        folder.clear()
        with pytest.raises(EnvironmentProblem, match="running in this folder"), RunLock(tmp_path):
            pass


def test_clear_removes_only_what_a_run_made(tmp_path: Path) -> None:
    folder = RunDir(tmp_path)
    folder.create()
    folder.write_recipe("name: x\n", {"recipe": {}})
    folder.write_stage(record())
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact-gguf").mkdir()
    (tmp_path / "notes.md").write_text("mine")
    folder.clear()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.md", "stages"]
    assert not folder.is_run()


def test_discard_takes_artifacts_inside_the_run_along_but_not_those_outside(tmp_path: Path) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create()
    inside, outside = tmp_path / "run" / "artifact", tmp_path / "published"
    inside.mkdir()
    outside.mkdir()
    folder.write_stage(record("export", artifacts={"native": str(inside), "dense": str(outside)}))
    folder.discard_stage("export")
    assert not inside.exists()
    assert outside.exists()
    assert folder.read_stage("export") is None


def test_lock_keeps_a_living_process_out_and_names_it(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from llmcompress.pipeline.run_dir import RunLock\n"
        f"with RunLock(Path({str(tmp_path)!r})):\n    print('held', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(EnvironmentProblem, match=f"process {process.pid}"), RunLock(tmp_path):
            pass
        assert process.stdin is not None
        process.stdin.close()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / ".lock").exists()


def test_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    # a grandchild inherits the lock and outlives the killed holder
    code = (
        "import os, time; from pathlib import Path; from llmcompress.pipeline.run_dir import RunLock\n"
        f"with RunLock(Path({str(tmp_path)!r})):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n        os.close(1); time.sleep(3600); os._exit(0)\n"
        "    print(child, flush=True); time.sleep(3600)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        orphan = int(process.stdout.readline())
        try:
            process.kill()
            process.wait()
            with RunLock(tmp_path):
                holder = json.loads((tmp_path / ".lock").read_text())
                assert holder["pid"] == os.getpid()
        finally:
            os.kill(orphan, 9)


def test_of_two_that_find_the_holder_dead_one_takes_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second would remove the file that the first has just made, and both would write to the folder."""
    orphan = (tmp_path / ".lock").open("w")
    orphan.write(json.dumps({"pid": 1 << 22, "host": socket.gethostname()}))
    orphan.flush()
    fcntl.flock(orphan, fcntl.LOCK_EX)

    def meanwhile(holder: dict[str, Any]) -> bool:
        with pytest.raises(EnvironmentProblem, match="another process"), RunLock(tmp_path):
            pass
        return False

    monkeypatch.setattr(run_dir, "_alive", meanwhile)
    with RunLock(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    orphan.close()


def test_a_holder_that_has_not_said_its_name_yet_is_a_holder(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(EnvironmentProblem, match="another process is running"), RunLock(tmp_path):
            pass


def test_a_lock_on_a_file_that_is_gone_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The holder before removes its file when it ends, possibly between our opening and our locking it."""
    real, removed = fcntl.flock, []

    def meanwhile(handle: Any, how: int) -> None:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        real(handle, how)

    monkeypatch.setattr(run_dir.fcntl, "flock", meanwhile)
    with RunLock(tmp_path), pytest.raises(EnvironmentProblem, match=f"process {os.getpid()}"), RunLock(tmp_path):
        pass
    assert removed


def test_lock_file_without_a_lock_is_taken_over_even_if_its_pid_lives(tmp_path: Path) -> None:
    stale = {"pid": os.getpid(), "host": socket.gethostname(), "began": 1.0}
    (tmp_path / ".lock").write_text(json.dumps(stale))
    with RunLock(tmp_path):
        # what it said before is gone: two objects in one file would name nobody
        assert json.loads((tmp_path / ".lock").read_text())["began"] > 1.0


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="elsewhere the system keeps a time that stays")
def test_a_holder_is_known_by_host_and_start_time_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pid alone is somebody else's after a restart, and says nothing of another machine of the same network disk."""
    begun = run_dir._start_time(os.getpid())
    assert begun is not None
    me = {"pid": os.getpid(), "host": socket.gethostname(), "began": begun}
    assert run_dir._alive(me) and run_dir._alive({**me, "began": None}) and run_dir._alive({**me, "began": begun + 1})
    for other in (begun - 60, begun + 60):
        assert not run_dir._alive({**me, "began": other})
    assert not run_dir._alive({**me, "pid": 1 << 22})
    # psutil reckons from the clock: set by a minute meanwhile, it would call every holder dead
    monkeypatch.setattr(psutil.Process, "create_time", lambda _: time.time() - 60)
    assert run_dir._alive(me)
    assert run_dir._alive({**me, "pid": 1 << 22, "host": "another-machine"})


def test_artifacts_in_the_run_folder_move_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, outside = RunDir(tmp_path / "run"), tmp_path / "published"
    folder.create()
    (tmp_path / "run" / "artifact").mkdir()
    outside.mkdir()
    assert folder.kept_path(tmp_path / "run" / "artifact") == "artifact"
    assert folder.kept_path(outside) == str(outside)
    folder.root.rename(tmp_path / "moved")
    moved = RunDir(tmp_path / "moved")
    assert moved.recorded_path("artifact") == tmp_path / "moved" / "artifact"
    assert moved.recorded_path(str(outside)) == outside
    # what is gone is named in the run folder; records of earlier versions name it from where the command ran
    assert moved.recorded_path("gone") == tmp_path / "moved" / "gone"
    monkeypatch.chdir(tmp_path)
    assert moved.recorded_path("moved/artifact") == Path("moved/artifact")
