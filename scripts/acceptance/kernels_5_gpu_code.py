#!/usr/bin/env python3
"""Kernels 5: all GPU code is checked without a GPU in at most three minutes on two cores (G7).

Every Triton kernel runs under the interpreter against its definition and is compiled for sm_80 and sm_90 with
shared memory and spills asserted; so is every CUDA source; bfloat16 arithmetic is linted. A skipped test counts as a
failure. On a machine that does other things as well, wall time says little, so the CPU time is printed beside it.
"""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import tempfile
import time

from harness import ROOT, verdict

LIMIT = 180.0


def main() -> None:
    files = sorted(str(p) for p in (ROOT / "tests" / "kernels").glob("test_triton_*.py"))
    files += sorted(str(p) for p in (ROOT / "tests" / "kernels").glob("test_*gpu_code.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--durations=5", *files]
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "TRITON_CACHE_DIR": cache, "LLMCOMPRESS_CACHE": cache, "OMP_NUM_THREADS": "1"}
        began = time.perf_counter()
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
        wall = time.perf_counter() - began
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    print(done.stdout)
    last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "nothing ran"
    skipped = int(found[1]) if (found := re.search(r"(\d+) skipped", last)) else 0
    cpu = usage.ru_utime + usage.ru_stime
    holds = done.returncode == 0 and skipped == 0 and wall <= LIMIT
    verdict(
        holds,
        f"{wall:.0f} s wall, {cpu:.0f} s of CPU, limit {LIMIT:.0f} s wall; "
        f"exit code {done.returncode}, {skipped} skipped",
    )


if __name__ == "__main__":
    main()
