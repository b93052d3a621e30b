#!/usr/bin/env python3
"""Build the C++ kernels with AddressSanitizer and UBSan and run random cases through PyTorch.

    python scripts/check_sanitizers.py [--cases 300] [--seed 0]

The sanitizer's run time has to be first in the process, so the cases run in a child with LD_PRELOAD. Any report ends
it. Leaks are not looked for: the interpreter has some of its own.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer -O1 -g1"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    runtime = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    with tempfile.TemporaryDirectory(prefix="llmcompress-asan-") as cache:
        environment = {
            **os.environ,
            "LLMCOMPRESS_CACHE": cache,
            "LLMCOMPRESS_CXXFLAGS": FLAGS,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT / "kernels"), os.environ.get("PYTHONPATH")))),
        }
        build = "from llmcompress_kernels import build, cpu; build.build(build.FAMILIES[cpu.FAMILY])"
        subprocess.run([sys.executable, "-c", build], env=environment, check=True)
        environment |= {
            "LD_PRELOAD": runtime.stdout.strip(),
            # torch's own allocations stay under the sanitizer's eye, so a read past a tensor's end is seen
            "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=0:exitcode=99",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
        command = [sys.executable, "-m", "llmcompress_kernels", "check"]
        done = subprocess.run(
            [*command, "--cases", str(options.cases), "--seed", str(options.seed)], env=environment, check=False
        )
    print("no report from AddressSanitizer or UBSan" if done.returncode == 0 else f"exit code {done.returncode}")
    return done.returncode


if __name__ == "__main__":
    raise SystemExit(main())
