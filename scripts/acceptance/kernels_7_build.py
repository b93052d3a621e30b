#!/usr/bin/env python3
"""Kernels 7: the cold build takes at most 30 s on two cores, is announced and cached; kills and races do no harm.

Time is CPU seconds of the build divided by two, which other programs on the machine cannot change; wall time is printed
beside it.

    python scripts/acceptance/kernels_7_build.py
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import verdict

LIMIT_SECONDS, CORES = 30.0, 2
USE = """
import torch
from llmcompress_kernels import check, cpu
assert cpu.ready(), cpu.unavailable()
case = check.Gemm(3, 32, 64, 4, 32, True, torch.float32, True)
assert case.run(torch.Generator().manual_seed(0)) <= case.tolerance
"""


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="llmcompress-build-") as folder:
        cold = timed(Path(folder) / "cold")
        warm = timed(Path(folder) / "cold")
        killed = kill_then_use(Path(folder) / "killed")
        raced = race(Path(folder) / "race")
    seconds = (cold["cpu"] - warm["cpu"]) / CORES
    print(f"cold: {cold['cpu']:.1f} CPU seconds, {cold['wall']:.1f} s on this (possibly busy) machine")
    print(f"cached: {warm['cpu']:.1f} CPU seconds, {warm['wall']:.1f} s, all of it the interpreter and torch")
    announced = all(f"{word} the gemm kernels" in cold["err"] for word in ("compiling", "compiled"))
    silent = "compil" not in warm["err"]
    print(f"announced: {announced}; silent when cached: {silent}")
    print(f"after a killed build: {killed}; two at once: {raced}")
    holds = seconds <= LIMIT_SECONDS and announced and silent and killed and raced
    verdict(holds, f"cold build {seconds:.1f} s on {CORES} cores; killed build {'harmless' if killed else 'HARMFUL'}, "
            f"two at once {'safe' if raced else 'UNSAFE'}")  # fmt: skip


def start(cache: Path, **options: Any) -> subprocess.Popen[str]:
    """A process that uses a kernel with a cache of its own."""
    environment = {**os.environ, "LLMCOMPRESS_CACHE": str(cache)}
    return subprocess.Popen(
        [sys.executable, "-c", USE],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


def timed(cache: Path) -> dict[str, Any]:
    """CPU and wall seconds of one use, compilers included."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = start(cache)
    _, err = process.communicate(timeout=600)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode != 0:
        raise SystemExit(err)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"cpu": cpu, "wall": time.perf_counter() - began, "err": err}


def kill_then_use(cache: Path) -> bool:
    """Kill a build with everything it started, then use the kernel: it must work and leave nothing behind."""
    victim = start(cache, start_new_session=True)
    kernels = cache / "kernels"
    deadline = time.monotonic() + 120
    while not list(kernels.glob(".gemm-*/*")) and time.monotonic() < deadline and victim.poll() is None:
        time.sleep(0.05)
    caught = victim.poll() is None and bool(list(kernels.glob(".gemm-*")))
    os.killpg(victim.pid, signal.SIGKILL)
    victim.communicate()
    process = start(cache)
    process.communicate(timeout=600)
    return caught and process.returncode == 0 and libraries(cache)


def race(cache: Path) -> bool:
    """Two processes at once: both work, and every library is compiled once."""
    both = [start(cache) for _ in range(2)]
    errors = "".join([process.communicate(timeout=600)[1] for process in both])
    once = all(errors.count(f"compiled the {name}") == 1 for name in ("gemm", "products"))
    return all(process.returncode == 0 for process in both) and once and libraries(cache)


def libraries(cache: Path) -> bool:
    """Whether one library of each family is in the cache, and nothing else."""
    names = sorted(path.name for path in (cache / "kernels").iterdir())
    return [name.split("-")[0].split("_")[0] for name in names] == ["gemm", "processor", "products"] and all(
        name.endswith(".so") for name in names
    )


if __name__ == "__main__":
    main()
