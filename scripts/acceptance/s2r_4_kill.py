#!/usr/bin/env python3
"""S2R 4: kill -9 in supervised training and in reinforcement, resume, same final weights as the uninterrupted run."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from harness import CLI, digest, llmcompress, verdict

SHORT = (
    "stages.init.problems=120", "stages.init.checkpoint_every=2", "stages.init.measure.problems=20",
    "stages.reinforce.steps=6", "stages.reinforce.checkpoint_every=1", "stages.reinforce.prompts=8",
    "stages.reinforce.min_verdict_recall=null", "stages.reinforce.screen=null",
    "stages.reinforce.measure.problems=20",
    "stages.reinforce.guard={ended_below: null, trials_above: null}", "--quiet",
)  # fmt: skip


def kill_after(path: Path, run: Path, words: list[str]) -> None:
    """Start, wait until ``path`` was written, kill; fail if the run ends before."""
    process = subprocess.Popen([*CLI, *words], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 900
    while not list(run.glob(str(path))):
        if process.poll() is not None or time.monotonic() > deadline:
            verdict(False, f"the run ended before {path} was written")
        time.sleep(0.02)
    process.kill()
    process.wait()


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="llmcompress-s2r-kill-"))
    whole, broken = folder / "whole", folder / "broken"
    llmcompress("run", "s2r_tiny", f"run.dir={whole}", *SHORT)
    kill_after(Path("stages/init/1_progress.safetensors"), broken, ["run", "s2r_tiny", f"run.dir={broken}", *SHORT])
    kill_after(Path("stages/reinforce/progress.safetensors"), broken, ["resume", str(broken), "--quiet"])
    llmcompress("resume", broken, "--quiet")
    same = [
        digest(whole / "stages" / stage / "model") == digest(broken / "stages" / stage / "model")
        for stage in ("init", "reinforce")
    ]
    shutil.rmtree(folder)
    verdict(all(same), f"killed once in SFT and once in RL; weights equal to the byte: SFT {same[0]}, RL {same[1]}")


if __name__ == "__main__":
    main()
