#!/usr/bin/env python3
"""Kernels 5: all GPU code is checked without a GPU in at most three minutes on two cores (G7).

Every Triton kernel runs under the interpreter against its definition and is compiled for sm_80 and sm_90 with
shared memory and spills asserted; so is every CUDA source, which the host emulates; bfloat16 arithmetic is linted. A
skipped test counts as a failure; tests that need a GPU are left out. What runs does so in one process, beside compilers
in two. On a machine that does other things as well, wall time says little, so the CPU time is printed beside it.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from xml.etree import ElementTree

from harness import ROOT, verdict

LIMIT = 180.0
LONGEST = "--durations=5"


def parts(folder: Path) -> dict[str, list[str]]:
    """Arguments of pytest by name: code that runs here, interpreted or emulated, and code that is compiled for GPUs."""
    triton = sorted(str(p) for p in folder.glob("test_triton_*.py"))
    others = sorted({str(p) for pattern in ("test_*gpu_code.py", "test_cuda_*.py") for p in folder.glob(pattern)})
    return {
        "run": [*triton, *others, "-m", "not gpu and not slow"],
        "compiled": [*triton, *others, "-m", "not gpu and slow"],
    }


def counts(report: Path) -> dict[str, int]:
    """Tests, failures, errors and skipped ones of a JUnit report; all -1 where there is none."""
    names = ("tests", "failures", "errors", "skipped")
    if not report.is_file():
        return dict.fromkeys(names, -1)
    suite = next(ElementTree.parse(report).getroot().iter("testsuite"))
    return {name: int(suite.get(name, "-1")) for name in names}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "TRITON_CACHE_DIR": folder, "LLMCOMPRESS_CACHE": folder, "OMP_NUM_THREADS": "1"}
        pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", LONGEST]
        began = time.perf_counter()
        running = {}
        for name, arguments in parts(ROOT / "tests" / "kernels").items():
            command = [*pytest, f"--junitxml={folder}/{name}.xml", *arguments]
            running[name] = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        told = {name: process.communicate()[0] for name, process in running.items()}
        wall = time.perf_counter() - began
        found = {name: counts(Path(folder) / f"{name}.xml") for name in running}
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    for name, text in told.items():
        print(f"{name}: {found[name]}\n{text}")
    cpu = usage.ru_utime + usage.ru_stime
    whole = all(p.returncode == 0 for p in running.values()) and all(c["tests"] > 0 for c in found.values())
    skipped = sum(c["skipped"] for c in found.values())
    verdict(
        whole and skipped == 0 and wall <= LIMIT,
        f"{wall:.0f} s wall, {cpu:.0f} s of CPU, limit {LIMIT:.0f} s wall; "
        f"{sum(c['tests'] for c in found.values())} tests, {skipped} skipped, "
        f"exit codes {[p.returncode for p in running.values()]}",
    )


if __name__ == "__main__":
    main()
