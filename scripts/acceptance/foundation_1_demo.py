#!/usr/bin/env python3
"""Foundation 1: a fresh clone, a fresh venv: ``make demo`` within 6 minutes with its installation, then ``make test``.

pip's download cache is switched off, so what is timed includes every download.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from harness import ROOT, verdict

LIMIT = 360.0


def make(target: str, folder: Path) -> tuple[int, float, str]:
    """Run one target; return exit code, seconds and output."""
    environment = {**os.environ, "PIP_NO_CACHE_DIR": "1"}
    for name in ("VIRTUAL_ENV", "PYTHONPATH", "MAKEFLAGS", "MAKELEVEL"):
        environment.pop(name, None)
    began = time.time()
    done = subprocess.run(
        ["make", target], cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    return done.returncode, time.time() - began, done.stdout


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="llmcompress-demo-")) / "clone"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    code, seconds, output = make("demo", folder)
    print(output[-3000:])
    table = "perplexity" in output
    report = (folder / "runs" / "demo" / "report.html").exists() and "report.html" in output
    tests, test_seconds, test_output = make("test", folder)
    print(test_output[-1500:])
    counts = re.findall(r"\d+ (?:passed|failed|skipped|error)\w*", test_output)
    shutil.rmtree(folder.parent)
    verdict(
        code == 0 and seconds <= LIMIT and table and report and tests == 0,
        f"make demo {seconds:.0f} s of {LIMIT:.0f} (exit {code}, table {table}, report {report}); "
        f"make test {test_seconds:.0f} s: {', '.join(counts[-3:]) or 'no summary'}",
    )


if __name__ == "__main__":
    main()
