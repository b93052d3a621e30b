"""The folder of a run: its files, its lock, and what is recorded about each stage.

::

    recipe.yaml          as given            events.jsonl   everything that happened
    recipe.lock.json     resolved, hashed    log.txt        logs and tracebacks
    run.json             status and policy   report.html
    stages/<name>/state.json and what the stage keeps there
    artifact/ artifact-<format>/             what one uploads

Whether something is finished is decided by ``run.json`` and ``state.json`` alone, and both are written durably.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal

from llmcompress.durable import held_alone, write_durably
from llmcompress.errors import EnvironmentProblem, InputError, UsageError

STATE_VERSION = 1
_OURS = ("recipe.yaml", "recipe.lock.json", "run.json", "events.jsonl", "log.txt", "report.html", ".lock")
_OUR_FOLDERS = ("stages", "extra", "tensorboard", "wandb")


@dataclass(frozen=True, slots=True)
class StageRecord:
    """``stages/<name>/state.json``.

    Attributes:
        name, type: As in the recipe.
        status: ``running`` until the stage has returned.
        fingerprint: See :mod:`llmcompress.pipeline.fingerprint`.
        inputs: What the fingerprint was computed from, without the stages before; for the diff.
        produces: Kinds of state it fills.
        seed: The stage's seed.
        seconds: Wall-clock seconds over all attempts.
        peak_rss_bytes, peak_vram_bytes: Peaks over all attempts.
        attempts: How often it was started.
        gate_failure: What the stage's quality gates said, None when they held.
        artifacts: Format → folder of what it exported; relative to the run folder where it lies in there.
    """

    name: str
    type: str
    status: Literal["running", "finished"]
    fingerprint: str
    inputs: dict[str, Any]
    produces: list[str]
    seed: int = 0
    seconds: float = 0.0
    peak_rss_bytes: int = 0
    peak_vram_bytes: int = 0
    attempts: int = 0
    gate_failure: str | None = None
    artifacts: dict[str, str] = field(default_factory=dict)
    version: int = STATE_VERSION

    def finished(self) -> bool:
        """Whether the stage has returned."""
        return self.status == "finished"


@dataclass(frozen=True, slots=True)
class RunRecord:
    """``run.json``.

    Attributes:
        name: Name of the recipe.
        status: ``finished`` once all stages and the report are done.
        device, dtype, threads: The policy in force; a resumed run keeps it.
        root: Model, seed and policy: what the first fingerprint was computed from.
        stages: Names in order.
        versions: Versions of the packages that computed something.
        peak_rss_bytes: Largest peak of the stages.
        seconds: Sum over the stages.
    """

    name: str
    status: Literal["running", "finished"]
    device: str
    dtype: str
    threads: int
    root: dict[str, Any]
    stages: list[str]
    versions: dict[str, str] = field(default_factory=dict)
    peak_rss_bytes: int = 0
    seconds: float = 0.0
    version: int = STATE_VERSION


class RunDir:
    """Paths and records of one run.

    Args:
        root: The folder; need not exist.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def stage_dir(self, name: str) -> Path:
        """Folder of stage ``name``."""
        return self.root / "stages" / name

    @property
    def report(self) -> Path:
        """The report."""
        return self.root / "report.html"

    @property
    def log(self) -> Path:
        """Logs and tracebacks."""
        return self.root / "log.txt"

    def is_run(self) -> bool:
        """Whether the folder holds a run, finished or not."""
        return any((self.root / name).exists() for name in ("run.json", "recipe.lock.json"))

    def create(self) -> None:
        """Make the folder and check that it can be written.

        Raises:
            UsageError: It holds other things than a run.
            EnvironmentProblem: It cannot be created or written.
        """
        if self.root.exists() and not self.root.is_dir():
            raise UsageError(f"{self.root}: is a file, not a run folder", "set run.dir to another folder")
        if self.root.is_dir() and not self.is_run():
            # a kill can leave the unfinished first file of a run
            names = [p.name.removesuffix(".part") for p in self.root.iterdir()]
            foreign = [name for name in names if name not in {*_OURS, *_OUR_FOLDERS, ".probe"}]
            if foreign:
                raise UsageError(
                    f"{self.root}: holds files that are not of a run ({', '.join(sorted(foreign)[:3])} …)",
                    "set run.dir to a new or empty folder",
                )
        try:
            (self.root / "stages").mkdir(parents=True, exist_ok=True)
            probe = self.root / ".probe"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise
            raise EnvironmentProblem(
                f"{self.root}: cannot write there: {error.strerror}", "set run.dir to a folder you can write to"
            ) from error

    def write_recipe(self, source: str, lock: dict[str, Any]) -> None:
        """Store the recipe as given and its lock."""
        write_durably(self.root / "recipe.yaml", source.encode())
        write_durably(self.root / "recipe.lock.json", (json.dumps(lock, indent=1) + "\n").encode())

    def read_run(self) -> RunRecord | None:
        """The run's record, None if there is none.

        Raises:
            InputError: It is damaged or from another version.
        """
        data = _read_json(self.root / "run.json")
        return None if data is None else _rebuild(RunRecord, data, self.root / "run.json")

    def write_run(self, record: RunRecord) -> None:
        """Store the run's record durably."""
        write_durably(self.root / "run.json", (json.dumps(asdict(record), indent=1) + "\n").encode())

    def read_stage(self, name: str) -> StageRecord | None:
        """The record of stage ``name``, None if it never began."""
        path = self.stage_dir(name) / "state.json"
        data = _read_json(path)
        return None if data is None else _rebuild(StageRecord, data, path)

    def write_stage(self, record: StageRecord) -> None:
        """Store a stage's record durably."""
        folder = self.stage_dir(record.name)
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / "state.json", (json.dumps(asdict(record), indent=1) + "\n").encode())

    def discard_stage(self, name: str) -> None:
        """Forget stage ``name``: first that it finished, then what it exported into this folder and kept."""
        record = self.read_stage(name)
        folder = self.stage_dir(name)
        if record is not None:
            self.write_stage(replace(record, status="running", fingerprint=""))
            for text in record.artifacts.values():
                path = self.recorded_path(text)
                if path.is_dir() and path.resolve().is_relative_to(self.root.resolve()):
                    shutil.rmtree(path)
        if folder.exists():
            shutil.rmtree(folder)

    def kept_path(self, path: Path) -> str:
        """A folder as it is recorded: what lies in the run folder moves with it."""
        inside = path.resolve()
        root = self.root.resolve()
        return str(inside.relative_to(root)) if inside.is_relative_to(root) else str(path)

    def recorded_path(self, text: str) -> Path:
        """The folder that a record names."""
        inside = self.root / text
        # records of earlier versions name it from the folder in which they were made
        return inside if inside.exists() or not Path(text).exists() else Path(text)

    def clear(self) -> None:
        """Remove everything a run made here, the record that says finished first; other files stay."""
        for name in ("run.json", *(n for n in _OURS if n not in {"run.json", ".lock"})):
            (self.root / name).unlink(missing_ok=True)
        for folder in (*_OUR_FOLDERS, *(p.name for p in self.root.glob("artifact*") if p.is_dir())):
            if (self.root / folder).is_dir():
                shutil.rmtree(self.root / folder)
        (self.root / "stages").mkdir(parents=True, exist_ok=True)


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path}: damaged ({error})", "delete it and run again") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: damaged (not an object)", "delete it and run again")
    return data


def _rebuild(kind: Any, data: dict[str, Any], path: Path) -> Any:
    if data.get("version") != STATE_VERSION:
        raise InputError(
            f"{path}: written by another version of llmcompress (format {data.get('version')})",
            "finish the run with that version, or start anew with --force",
        )
    try:
        return kind(**data)
    except TypeError as error:
        raise InputError(f"{path}: damaged ({error})", "delete it and run again") from error


class RunLock:
    """Keeps a second process out of a run folder, for the life of a ``with`` block.

    An advisory file lock, which the system drops when the process dies. The file also names its
    holder: child processes can inherit the lock and outlive their parent, and then a dead holder
    is recognised by its pid and start time and the lock is taken over.

    Args:
        folder: Existing run folder.
        elsewhere: How one chooses another.

    Raises:
        EnvironmentProblem: A living process holds it.
    """

    def __init__(self, folder: Path, elsewhere: str = "set run.dir to another folder") -> None:
        self._path, self._elsewhere = folder / ".lock", elsewhere
        self._handle: IO[str] | None = None

    def __enter__(self) -> RunLock:
        """Take the lock."""
        if not self._try():
            self._take_over()
        return self

    def _take_over(self) -> None:
        """Replace the file of a holder that is dead.

        Of several processes that find it dead one does it: a later one would remove the new file of the first.
        """
        with held_alone(self._path.parent) as alone:
            if alone and self._try():
                return
            holder = self._holder()
            if not alone or holder is None or _alive(holder):
                who = f"process {holder['pid']} on {holder['host']}" if alone and holder else "another process"
                raise EnvironmentProblem(
                    f"{self._path.parent}: {who} is running in this folder",
                    f"wait for it, stop it, or {self._elsewhere}",
                )
            # an orphaned child keeps the old file open; a new file is a new lock
            self._path.unlink(missing_ok=True)
            if not self._try():
                raise EnvironmentProblem(f"{self._path}: cannot be locked", "try again")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Release it."""
        if self._handle is not None:
            self._path.unlink(missing_ok=True)
            self._handle.close()
            self._handle = None

    def _try(self) -> bool:
        """Lock the file, if nobody holds it, and say in it who does."""
        handle = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            handle.close()
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        # the holder may have removed the file between our open and our lock
        try:
            same = os.fstat(handle.fileno()).st_ino == self._path.stat().st_ino
        except FileNotFoundError:
            same = False
        if not same:
            handle.close()
            return self._try()
        handle.seek(0)
        handle.truncate()
        me = {"pid": os.getpid(), "host": socket.gethostname(), "began": _start_time(os.getpid())}
        handle.write(json.dumps(me))
        handle.flush()
        self._handle = handle
        return True

    def _holder(self) -> dict[str, Any] | None:
        try:
            data = json.loads(self._path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return data if isinstance(data, dict) and {"pid", "host"} <= data.keys() else None


def _start_time(pid: int) -> float | None:
    """When a process began, by a count that setting the clock does not change; None where there is no such process."""
    import psutil

    try:
        # ticks since the machine began, the 22nd field; the second is a name that may hold blanks
        return float(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        pass  # not Linux, or no such process
    try:
        return float(psutil.Process(pid).create_time())
    except psutil.Error:
        return None


def _alive(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote the lock still runs; one of another host counts as alive."""
    if holder["host"] != socket.gethostname():
        return True
    begun = _start_time(int(holder["pid"]))
    recorded = holder.get("began")
    return begun is not None and (recorded is None or abs(begun - recorded) < 2.0)
