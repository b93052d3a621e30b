#!/usr/bin/env python3
"""Q-Mamba 1: the unit tests of the paper's equations, cache, simulator and reconstruction all pass."""

from __future__ import annotations

import re
import subprocess
import sys

from harness import ROOT, verdict

NEEDED = ("scales", "simulator", "cache", "reconstruction")


def main() -> None:
    files = sorted((ROOT / "tests" / "paper").glob("test_q_mamba_*.py"))
    lacking = [name for name in NEEDED if not any(name in file.stem for file in files)]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:], flush=True)
    junk = re.findall(r"^(?:FAILED|ERROR) .*$", done.stdout, re.MULTILINE)
    passed = sum(line.count(".") for line in done.stdout.splitlines() if re.fullmatch(r"[.FEsx]+(\s+\[.*\])?", line))
    figure = f"{passed} tests in {len(files)} files pass, {len(junk)} fail"
    verdict(done.returncode == 0 and not lacking, figure + (f"; missing: {', '.join(lacking)}" if lacking else ""))


if __name__ == "__main__":
    main()
