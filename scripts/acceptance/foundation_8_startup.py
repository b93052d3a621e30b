#!/usr/bin/env python3
"""Foundation 8: ``llmcompress --help`` imports no torch and takes under a second (median of five)."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from harness import CLI, verdict

HEAVY = ("torch", "transformers", "datasets", "lm_eval")


def main() -> None:
    trace = subprocess.run(
        [sys.executable, "-X", "importtime", *CLI[1:], "--help"], capture_output=True, text=True, check=True
    ).stderr
    loaded = {line.rsplit("|", 1)[-1].strip().split(".")[0] for line in trace.splitlines()}
    found = [name for name in HEAVY if name in loaded]
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        subprocess.run([*CLI, "--help"], stdout=subprocess.DEVNULL, check=True)
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds)
    verdict(not found and median < 1.0, f"--help {median:.2f} s (median of 5), heavy imports: {found or 'none'}")


if __name__ == "__main__":
    main()
