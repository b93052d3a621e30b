#!/usr/bin/env python3
"""RQT 8: the family's run, `family add` and `family remove` killed, then repeated; malformed inputs.

Runs are killed at random moments and resumed: they end in the bytes of one that was not disturbed. Edits change files
for a moment only, so they are killed just before a random change of a file or folder of the artifact, found by an audit
hook. After every kill the artifact loads and its old nodes are unchanged; the same command again ends in the bytes of
one that was not killed.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from family_runs import MODELS, need_models, recipe
from harness import CLI, digest, llmcompress, run_tests, verdict

RUNS, EDITS = 4, 4
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


HOOK = """
import os, signal, sys
point, target, words = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
changes = 0


def hook(event, values):
    global changes
    if event == "open":
        mode = values[2] if isinstance(values[2], int) else 0
        counts = str(values[0]).startswith(target) and mode & (os.O_WRONLY | os.O_RDWR)
    else:
        # deletions name files relative to their folder
        counts = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
    if counts:
        changes += 1
        if changes == point:
            os.kill(os.getpid(), signal.SIGKILL)


from llmcompress.cli.app import invoke
import llmcompress.export.family_edit
sys.addaudithook(hook)
code = int(invoke(words))
print("changes", changes)
sys.exit(code)
"""


def changed(words: list[str], target: Path, point: int) -> tuple[int, int]:
    """Run a command that dies before its change number ``point``: (exit code, changes)."""
    command = [sys.executable, "-c", HOOK, str(point), str(target), *words]
    done = subprocess.run(command, capture_output=True, text=True)
    count = int(done.stdout.split()[-1]) if done.returncode == 0 else 0
    return done.returncode, count


def edits(start: Path, words: list[str], folder: Path, draws: random.Random) -> int:
    """Kill an edit before some of its changes; how often the repeated one ends as an undisturbed one does."""
    target = folder / "whole"
    command = ["family", words[0], str(target), *words[1:]]
    shutil.copytree(start, target)
    _, changes = changed(command, target, 0)
    expected, before, same = digest(target), digest(start), 0
    shutil.rmtree(target)
    points = sorted({changes, *draws.sample(range(1, changes), min(EDITS, changes) - 1)})
    for point in points:
        shutil.copytree(start, target)
        code, _ = changed(command, target, point)
        llmcompress("family", "list", target)
        now = digest(target)
        nodes = [name for name in before if name.startswith("nodes/") and words[-1] not in name]
        kept = code == -signal.SIGKILL and all(now.get(name) == before[name] for name in nodes)
        # where the last change came before the kill, the edit is done and a second one would be refused
        if now != expected:
            llmcompress(*command, stderr=subprocess.DEVNULL)
        equal = kept and digest(target) == expected
        same += equal
        print(f"{words[0]} killed before change {point} of {changes}: {OUTCOME[equal]}", flush=True)
        shutil.rmtree(target)
    return same if len(points) == EDITS else 0


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
