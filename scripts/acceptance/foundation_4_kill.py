#!/usr/bin/env python3
"""Foundation 4: kill -9 at 20 random moments of a run, resume each: artifact bytes equal the uninterrupted run's."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

from harness import CLI, digest, llmcompress, verdict

RECIPE = "smoke/eac_moe_tiny"
KILLS = 20


def killed_then_resumed(folder: Path, delay: float) -> dict[str, str]:
    """Start a run, kill its whole process group after ``delay`` seconds, resume it, hash the artifact."""
    command = [*CLI, "run", RECIPE, f"run.dir={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    time.sleep(delay)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if (folder / "recipe.lock.json").exists():
        llmcompress("resume", folder, stderr=subprocess.DEVNULL)
    else:  # killed before the run folder held a recipe: nothing to resume, the command is simply repeated
        llmcompress("run", RECIPE, f"run.dir={folder}", stderr=subprocess.DEVNULL)
    return digest(folder / "artifact")


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="llmcompress-kill-"))
    began = time.time()
    llmcompress("run", RECIPE, f"run.dir={root / 'whole'}", stderr=subprocess.DEVNULL)
    length = time.time() - began
    expected = digest(root / "whole" / "artifact")
    rng = random.Random(0)
    same = 0
    for number in range(KILLS):
        delay = rng.uniform(0.1, 1.0) * length
        equal = killed_then_resumed(root / f"killed{number}", delay) == expected
        same += equal
        print(f"killed after {delay:5.1f} of {length:.1f} s: {'same bytes' if equal else 'DIFFERENT'}", flush=True)
        shutil.rmtree(root / f"killed{number}")
    shutil.rmtree(root)
    verdict(same == KILLS and bool(expected), f"{same} of {KILLS} resumed runs end in the same {len(expected)} files")


if __name__ == "__main__":
    main()
