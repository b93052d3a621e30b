#!/usr/bin/env python3
"""Scale 2: 1, 2 and 4 processes make the same artifact; a process killed among 4, then resumed with 2, changes nothing.

The quickstart model and stages on fewer windows. With ``run.deterministic`` artifacts are compared byte by byte;
without it, packed words. Sums of another order differ in their last bits. Nearly all words of the first block's
attention stay (99.8 %, with half of the calibration left out 15 %); these are judged. From the second block on most
change: codes at an edge flip, and what follows is fitted to them. Perplexities of two such runs are up to 5 % apart on
so little data, either way round, and are held to a tenth.

The ratio of times is of the quantizing stage alone, with one thread per process, and means something only where that
many cores are free.

    python scripts/acceptance/scale_2_processes.py [--samples 8]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

import psutil
from harness import CLI, busy_seconds, digest, keep_plan, llmcompress, verdict
from safetensors import safe_open

RANKS = (1, 2, 4)
WORDS, PERPLEXITY = 0.95, 0.1


def words(folder: Path, ranks: int, samples: int, deterministic: bool) -> list[str]:
    """One run of the quickstart with a short evaluation."""
    return [
        "run", "smoke/eac_moe_tiny", f"stages.calibrate.samples={samples}", "stages.calibrate.length=256",
        f"run.deterministic={str(deterministic).lower()}", "run.threads=1", f"run.dir={folder}", "--quiet",
        "--nproc", str(ranks),
    ]  # fmt: skip


def stage_seconds(folder: Path) -> float:
    """Wall time of the quantizing stage."""
    return float(json.loads((folder / "stages" / "quantize" / "state.json").read_text())["seconds"])


def perplexity(folder: Path) -> float:
    """Held-out perplexity of the compressed model."""
    rows = json.loads((folder / "stages" / "evaluate" / "metrics.json").read_text())
    return next(row["compressed"] for row in rows if (row["task"], row["metric"]) == ("heldout", "perplexity"))


def words_equal(one: Path, other: Path) -> float:
    """Share of the first block's packed words of attention that two runs have in common."""
    same = total = 0
    path = min((one / "stages" / "quantize" / "blocks").glob("*.safetensors"))
    with safe_open(path, "pt") as a, safe_open(other / path.relative_to(one), "pt") as b:
        for name in a.keys():  # noqa: SIM118 - not a dict
            if "self_attn" in name and name.endswith(".weight_packed"):
                left, right = a.get_tensor(name), b.get_tensor(name)
                same += int((left == right).sum())
                total += left.numel()
    return same / total


def killed_and_resumed(folder: Path, samples: int) -> tuple[int, str]:
    """Four processes, one killed after the first block; exit code and error, then a resume with two."""
    process = subprocess.Popen(
        [*CLI, *words(folder, 4, samples, True)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None:
        time.sleep(0.05)
        if list((folder / "stages" / "quantize" / "blocks").glob("*.safetensors")):
            ranks = [child for child in psutil.Process(process.pid).children() if "llmcompress" in child.cmdline()]
            if len(ranks) == 4:
                os.kill(sorted(ranks, key=lambda child: child.pid)[2].pid, signal.SIGKILL)
                break
    _, said = process.communicate()
    llmcompress("resume", folder, "--nproc", "2", "--quiet", stderr=subprocess.DEVNULL)
    return process.returncode, said


def alone(folder: Path, ranks: int, samples: int) -> None:
    """One exact run, kept for scale_5_plan.py."""
    began, busy, own = time.time(), busy_seconds(), children_seconds()
    command = words(folder, ranks, samples, True)
    llmcompress(*command)
    others = (busy_seconds() - busy - children_seconds() + own) / (time.time() - began)
    settings = [word for word in command[2:] if "=" in word]
    keep_plan(f"scale_2_{ranks}", folder, [command[1], *settings], ranks=ranks, others=others)


def children_seconds() -> float:
    """CPU seconds of the processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=8)
    samples = parser.parse_args().samples
    root = Path(tempfile.mkdtemp(prefix="llmcompress-ranks-"))
    found = []
    for ranks in RANKS:
        alone(root / f"exact{ranks}", ranks, samples)
    exact = [digest(root / f"exact{ranks}" / "artifact") for ranks in RANKS]
    if not exact[0] or exact[1] != exact[0] or exact[2] != exact[0]:
        found.append("with run.deterministic the artifacts differ")
    llmcompress(*words(root / "free2", 2, samples, False))
    llmcompress(*words(root / "free1", 1, samples, False))
    share = words_equal(root / "free1", root / "free2")
    one, two = perplexity(root / "free1"), perplexity(root / "free2")
    if share < WORDS:
        found.append(f"without it {share:.1%} of the first block's words are equal")
    if abs(two / one - 1) > PERPLEXITY:
        found.append(f"2 processes end at perplexity {two:.3f}, 1 at {one:.3f}")
    code, said = killed_and_resumed(root / "killed", samples)
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    if code == 0 or len(errors) != 1 or "was killed (SIGKILL)" not in errors[0] or "Traceback" in said:
        found.append(f"a killed process ended in exit code {code} and said:\n{said}")
    if digest(root / "killed" / "artifact") != exact[0]:
        found.append("killed among 4 and resumed with 2: another artifact")
    seconds = [stage_seconds(root / f"exact{ranks}") for ranks in RANKS]
    print("\n".join(found))
    shutil.rmtree(root)
    verdict(
        not found,
        f"1, 2 and 4 processes: {'equal bytes' if exact[0] == exact[1] == exact[2] else 'DIFFERENT bytes'} with "
        f"deterministic sums, {share:.1%} equal words in the first block and perplexity {one:.3f} and {two:.3f} "
        f"without; one of 4 killed: exit code {code}, resumed with 2; quantizing took {seconds[0]:.1f}, "
        f"{seconds[1]:.1f} and {seconds[2]:.1f} s, "
        f"ratio of 2 to 1 {seconds[1] / seconds[0]:.2f} on {len(os.sched_getaffinity(0))} cores",
    )


if __name__ == "__main__":
    main()
