#!/usr/bin/env python3
"""S2R 5: two boxes, boxes in verifications, endless retries, empty answers and copied targets gain nothing."""

from __future__ import annotations

import re
import subprocess
import sys

from harness import ROOT, verdict

TESTS = ["tests/paper/test_s2r_reward_hacking.py"]


def main() -> None:
    command = [sys.executable, "-m", "pytest", *TESTS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:])
    passed = re.search(r"(\d+) passed", done.stdout)
    failed = re.search(r"(\d+) failed", done.stdout)
    count = int(passed[1]) if passed else 0
    verdict(done.returncode == 0 and count >= 10, f"{count} ways to cheat tried, {failed[1] if failed else 0} failed")


if __name__ == "__main__":
    main()
