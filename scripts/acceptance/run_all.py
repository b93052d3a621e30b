#!/usr/bin/env python3
"""Run every acceptance script and write benchmarks/acceptance.json.

Each script prints its figure as the last line and exits 0 only where its line of the acceptance
list holds. A script that is not run keeps its earlier entry, marked with the commit it was made on.

    python scripts/acceptance/run_all.py [NAME_PART ...]
"""

from __future__ import annotations

import fcntl
import json
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "acceptance.json"


def commit() -> str:
    """Short hash of HEAD, with ``+`` when the tree has changes."""
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    # what these scripts measure and write does not depend on earlier results
    status = ["git", "status", "--porcelain", "--", ".", ":!benchmarks"]
    dirty = subprocess.run(status, cwd=ROOT, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def cpu() -> str:
    """Processor name, core count and vectors: two generations of processors may have one name on virtual machines."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [x.split(":", 1)[1].strip() for x in lines if x.startswith("model name")]
    flags = next((x.split() for x in lines if x.startswith("flags")), [])
    vectors = next((f", {flag}" for flag in ("avx512_vnni", "avx_vnni", "avx2") if flag in flags), "")
    return f"{names[0] if names else platform.processor()} x {len(names)}{vectors}"


def record(name: str, entry: dict[str, Any]) -> None:
    """Put one entry into the file; other scripts may be recorded at the same time."""
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a+") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.seek(0)
        results = json.loads(handle.read() or "{}") | {name: entry}
        handle.truncate(0)
        handle.write(json.dumps(results, indent=1, sort_keys=True) + "\n")


def main() -> int:
    wanted = sys.argv[1:]
    failed = 0
    for script in sorted(Path(__file__).parent.glob("[a-z]*_[0-9]*_*.py")):
        if wanted and not any(part in script.stem for part in wanted):
            continue
        print(f"== {script.stem}", flush=True)
        began, made_on = time.time(), commit()
        done = subprocess.run([sys.executable, str(script)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        print(done.stdout, end="", flush=True)
        lines = done.stdout.strip().splitlines()
        entry = {
            "holds": done.returncode == 0,
            "figure": lines[-1] if lines else "",
            "seconds": round(time.time() - began, 1),
            "commit": made_on,
            "cpu": cpu(),
            "torch": version("torch"),
            "transformers": version("transformers"),
        }
        record(script.stem, entry)
        failed += done.returncode != 0
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
