"""What the acceptance scripts share: calling the CLI, hashing an artifact, the verdict line."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parent.parent.parent
CLI = [sys.executable, "-m", "llmcompress"]


def llmcompress(*args: str | Path, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own; stderr passes through unless captured by the caller."""
    options.setdefault("stdout", subprocess.PIPE)
    done = subprocess.run([*CLI, *map(str, args)], text=True, **options)
    if check and done.returncode != 0:
        raise SystemExit(f"llmcompress {' '.join(map(str, args))}: exit code {done.returncode}\n{done.stdout}")
    return done


def llmcompress_json(*args: str | Path, **options: Any) -> dict[str, Any]:
    """Run a command with ``--json`` and parse what it prints."""
    return json.loads(llmcompress(*args, "--json", **options).stdout)


def measured(*args: str | Path) -> tuple[int, float]:
    """Run a command; return (peak resident bytes, CPU seconds) of that one process by the kernel's account."""
    process = subprocess.Popen([*CLI, *map(str, args)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"llmcompress {' '.join(map(str, args))} failed")
    return usage.ru_maxrss * 1024, usage.ru_utime + usage.ru_stime


def run_tests(*paths: str) -> tuple[int, int, int]:
    """Run pytest on files or folders below the root; return exit code, tests passed and tests failed."""
    done = subprocess.run([sys.executable, "-m", "pytest", *paths], cwd=ROOT, capture_output=True, text=True)
    print(done.stdout[-2000:])
    passed, failed = (re.search(rf"(\d+) {word}", done.stdout) for word in ("passed", "failed"))
    return done.returncode, int(passed[1]) if passed else 0, int(failed[1]) if failed else 0


def gpu_figures() -> tuple[dict[str, Any], bool, str]:
    """What ``scripts/gpu_check.sh`` writes, whether measured just now with all checks passed, and words that say which.

    With a GPU it is run; without one the newest file of ``benchmarks/`` is what there is to judge.
    """
    import torch

    passed = False
    if torch.cuda.is_available():
        passed = subprocess.run(["bash", str(ROOT / "scripts" / "gpu_check.sh")], cwd=ROOT).returncode == 0
    found = [(json.loads(path.read_text()), path.name) for path in (ROOT / "benchmarks").glob("gpu_*.json")]
    if not found:
        verdict(False, "no figures of a GPU in benchmarks/, and no GPU to measure them on")
    content, name = max(found, key=lambda each: (each[0].get("measured", ""), each[1]))
    stored = f"as stored in benchmarks/{name}, {content.get('measured', 'undated')}"
    return content, passed, "all checks passed" if passed else stored


def digest(folder: Path) -> dict[str, str]:
    """SHA-256 of every file below ``folder`` by relative path."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def busy_seconds() -> float:
    """CPU seconds that this machine has spent on anything since it started."""
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:9]
    idle, waiting = int(fields[3]), int(fields[4])
    return (sum(map(int, fields)) - idle - waiting) / os.sysconf("SC_CLK_TCK")


def keep_plan(
    name: str, run: Path, words: Sequence[str | Path], *, peak: int = 0, ranks: int = 1, others: float | None = None
) -> None:
    """Leave what was predicted and measured of a run for scale_5_plan.py, which judges all of them.

    Args:
        name: Of the file in runs/plan/.
        run: The run's folder.
        words: Recipe and overrides, as ``plan`` takes them.
        peak: Peak bytes by the kernel's account of the whole process, where it is known.
        ranks: Processes of the run.
        others: How many processors other programs kept busy meanwhile; None if it is not known.
    """
    plan = llmcompress_json("plan", *words, "--device", "cpu", "--cluster", str(ranks))
    states = {path.parent.name: json.loads(path.read_text()) for path in run.glob("stages/*/state.json")}
    stages = plan["cluster"]["stages"]
    figures = {
        "predicted_bytes": plan["ram"],
        "measured_bytes": max(peak, *(state["peak_rss_bytes"] for state in states.values())),
        "predicted_s": round(sum(rows[0]["seconds"] for rows in stages.values()), 2),
        "measured_s": round(sum(states[stage]["seconds"] for stage in stages), 2),
        "others": None if others is None else round(others, 2),
        "ranks": ranks,
    }
    folder = ROOT / "runs" / "plan"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(figures) + "\n")


def verdict(holds: bool, figure: str) -> NoReturn:
    """Print the figure as the last line and exit 0 only where the line holds."""
    print(f"{'holds' if holds else 'FALLS SHORT'}: {figure}")
    raise SystemExit(0 if holds else 1)
