#!/usr/bin/env python3
"""Foundation 9: the eight groups of tests of the EAC-MoE specification exist and pass."""

from __future__ import annotations

import subprocess
import sys

from harness import ROOT, verdict

GROUPS = {
    "router": "1 TopK-MSE, 2 identity, 8 known shift",
    "order": "3 order of attention, router, experts",
    "bits": "4 bits and sizes",
    "pesf": "5 expert skipping",
    "families": "6 all families",
    "rare_experts": "7 an expert without tokens",
}


def main() -> None:
    files = [ROOT / "tests" / "paper" / f"test_eac_moe_{name}.py" for name in GROUPS]
    missing = [GROUPS[f.stem.removeprefix("test_eac_moe_")] for f in files if not f.exists()]
    present = [str(f) for f in files if f.exists()]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "addopts=--import-mode=importlib",
        *present,
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    summary = done.stdout.strip().splitlines()[-1].strip("= ") if done.stdout.strip() else "no output"
    if done.returncode != 0:
        print(done.stdout[-3000:])
    verdict(done.returncode == 0 and not missing, f"{summary}; groups missing: {missing or 'none'}")


if __name__ == "__main__":
    main()
