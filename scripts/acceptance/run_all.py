#!/usr/bin/env python3
"""Run every acceptance script and write benchmarks/acceptance.json.

Each script prints its figure as the last line and exits 0 only where its line of the acceptance
list holds. A script that is not run keeps its earlier entry, marked with the commit it was made on.

    python scripts/acceptance/run_all.py [NAME_PART ...]
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "acceptance.json"


def commit() -> str:
    """Short hash of HEAD, with ``+`` when the tree has changes."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    dirty = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def cpu() -> str:
    """Processor name and core count."""
    names = [x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    return f"{names[0] if names else platform.processor()} x {len(names)}"


def main() -> int:
    wanted = sys.argv[1:]
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    failed = 0
    for script in sorted(Path(__file__).parent.glob("[a-z]*_[0-9]*_*.py")):
        if wanted and not any(part in script.stem for part in wanted):
            continue
        print(f"== {script.stem}", flush=True)
        began = time.time()
        done = subprocess.run([sys.executable, str(script)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        lines = done.stdout.strip().splitlines()
        results[script.stem] = {
            "holds": done.returncode == 0,
            "figure": lines[-1] if lines else "",
            "seconds": round(time.time() - began, 1),
            "commit": commit(),
            "cpu": cpu(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        failed += done.returncode != 0
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
