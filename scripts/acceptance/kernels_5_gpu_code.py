#!/usr/bin/env python3
"""Kernels 5: all GPU code is checked without a GPU in at most three minutes on two cores (G7).

Every Triton kernel runs under the interpreter against its definition and is compiled for sm_80 and sm_90 with
shared memory and spills asserted; so is every CUDA source, which the host emulates; bfloat16 arithmetic is linted. A
skipped test counts as a failure; tests that need a GPU are left out. What runs here is one process, what is compiled
one for each file; two go on at a time. On a machine that does other things as well, wall time says little, so the CPU
time is printed beside it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from harness import ROOT, verdict

LIMIT = 180.0
LONGEST = "--durations=5"
WORKERS = 2
FILES = ("test_triton_*.py", "test_*gpu_code.py", "test_cuda_*.py")


def parts(folder: Path) -> list[list[str]]:
    """Arguments of one pytest each: what runs here, interpreted or emulated, and what is compiled, by files."""
    files = sorted({str(p) for pattern in FILES for p in folder.glob(pattern)})
    compiled = [path for path in files if "mark.slow" in Path(path).read_text()]
    return [[*files, "-m", "not gpu and not slow"], *([path, "-m", "not gpu and slow"] for path in compiled)]


def counts(report: Path) -> dict[str, int]:
    """Tests, failures, errors and skipped ones of a JUnit report; all -1 where there is none."""
    names = ("tests", "failures", "errors", "skipped")
    if not report.is_file():
        return dict.fromkeys(names, -1)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    return {name: int(suite.get(name, "-1")) for name in names}


def run(arguments: list[str], folder: Path, place: int) -> tuple[int, dict[str, int], str]:
    """Exit code, counts and output of one pytest whose caches are in a folder."""
    report = folder / f"{place}.xml"
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(folder),
        "LLMCOMPRESS_CACHE": str(folder),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", LONGEST, f"--junitxml={report}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    return done.returncode, counts(report), done.stdout


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(WORKERS) as workers:
        began = time.perf_counter()
        waiting = [workers.submit(run, part, Path(name), i) for i, part in enumerate(parts(ROOT / "tests" / "kernels"))]
        told = [future.result() for future in waiting]
        wall = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    for _, found, text in told:
        print(f"{found}\n{text}")
    cpu = usage.ru_utime + usage.ru_stime
    codes, found = [code for code, _, _ in told], [found for _, found, _ in told]
    whole = not any(codes) and all(c["tests"] > 0 for c in found)
    skipped = sum(c["skipped"] for c in found)
    verdict(
        whole and skipped == 0 and wall <= LIMIT,
        f"{wall:.0f} s wall, {cpu:.0f} s of CPU, limit {LIMIT:.0f} s wall; "
        f"{sum(c['tests'] for c in found)} tests, {skipped} skipped, exit codes {codes}",
    )


if __name__ == "__main__":
    main()
