#!/usr/bin/env python3
"""Foundation 9: the eight groups of tests of the EAC-MoE specification exist and pass."""

from __future__ import annotations

import re
import subprocess
import sys

from harness import ROOT, verdict


def main() -> None:
    files = sorted((ROOT / "tests" / "paper").glob("test_eac_moe_*.py"))
    groups = {m.group(1) for f in files if (m := re.match(r"test_eac_moe_(\d)", f.name))}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:])
    summary = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "no output"
    missing = sorted(set("12345678") - groups)
    verdict(done.returncode == 0 and not missing, f"{summary}; groups missing: {missing or 'none'}")


if __name__ == "__main__":
    main()
