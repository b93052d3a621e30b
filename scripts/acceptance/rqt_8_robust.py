#!/usr/bin/env python3
"""RQT 8: the family's run, `family add` and `family remove` killed at random moments, then repeated; malformed inputs.

A resumed run ends in the bytes of one that was not disturbed. After every kill the artifact loads and its old members
are unchanged; the same command again ends in the bytes of one that was not killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from family_runs import MODELS, need_models, recipe
from harness import CLI, digest, llmcompress, run_tests, verdict

RUNS, EDITS = 4, 3
STATE = {True: "killed", False: "over"}
OUTCOME = {True: "same bytes", False: "DIFFERENT"}
MALFORMED = "tests/integration/test_family_malformed.py"


def killed(command: list[str], delay: float) -> bool:
    """Run a command and kill its process group after ``delay`` seconds; whether it was still running."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        process.wait(delay)
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def timed(*args: str | Path) -> float:
    began = time.monotonic()
    llmcompress(*args, stderr=subprocess.DEVNULL)
    return time.monotonic() - began


def runs(folder: Path, whole: dict[str, str], length: float, draws: random.Random) -> int:
    same = 0
    for number in range(RUNS):
        run = folder / f"killed{number}"
        path = recipe(folder, run)
        delay = draws.uniform(0.3, 1.0) * length
        hit = killed([*CLI, "run", str(path), "--quiet"], delay)
        again = ("resume", run) if (run / "recipe.lock.json").exists() else ("run", path)
        llmcompress(*again, "--quiet")
        equal = digest(run / "artifact") == whole
        same += equal
        print(f"run {STATE[hit]} after {delay:.1f} of {length:.1f} s: {OUTCOME[equal]}", flush=True)
        shutil.rmtree(run)
    return same


def edits(start: Path, words: list[str], folder: Path, draws: random.Random) -> int:
    """Kill an edit at random moments; how often the repeated one ends as an undisturbed one does."""
    target = folder / "whole"
    shutil.copytree(start, target)
    length = timed("family", words[0], target, *words[1:])
    expected, same = digest(target), 0
    shutil.rmtree(target)
    before = digest(start)
    for _ in range(EDITS):
        shutil.copytree(start, target)
        command = ["family", words[0], str(target), *words[1:]]
        # edits touch files in their last moments only
        delay = draws.uniform(0.6, 1.0) * length
        hit = killed([*CLI, *command], delay)
        llmcompress("family", "list", target)
        now = digest(target)
        nodes = [name for name in before if name.startswith("nodes/") and words[-1] not in name]
        kept = all(now.get(name) == before[name] for name in nodes)
        # where the kill came too late the edit is done, and a second one is refused
        if digest(target) != expected:
            llmcompress(*command, stderr=subprocess.DEVNULL)
        equal = kept and digest(target) == expected
        same += equal
        print(f"{words[0]} {STATE[hit]} after {delay:.2f} of {length:.2f} s: {OUTCOME[equal]}", flush=True)
        shutil.rmtree(target)
    return same


def main() -> None:
    need_models()
    draws = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        length = timed("run", recipe(folder, folder / "whole"), "--quiet")
        artifact = folder / "whole" / "artifact"
        whole = digest(artifact)
        same = runs(folder, whole, length, draws)
        place = folder / "edits"
        place.mkdir()
        added = edits(
            artifact, ["add", "--model", str(MODELS / "base"), "--bits", "2", "--member", "extra"], place, draws
        )
        removed = edits(artifact, ["remove", "--member", "maths"], place, draws)
    code, passed, failed = run_tests(MALFORMED)
    holds = same == RUNS and added == removed == EDITS and code == 0 and passed > 0
    verdict(
        holds,
        f"{same} of {RUNS} killed runs, {added} of {EDITS} killed additions and {removed} of {EDITS} killed removals "
        f"end in the same bytes; malformed inputs: {passed} tests passed, {failed} failed",
    )


if __name__ == "__main__":
    main()
