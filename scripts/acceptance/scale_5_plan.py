#!/usr/bin/env python3
"""Scale 5: peak memory and time that ``plan`` predicts against what the runs of lines 1 to 4 took.

Each of these scripts leaves what was predicted and measured in runs/plan/: line 1 the model larger than memory, line 2
runs on 1, 2 and 4 processes, line 3 both models beside the peers, line 4 a run of the sweep. Where nothing is left, the
check of scripts/measure_cluster_rates.py (1, 2 and 4 processes) is made here. Memory is judged for all of them. Time is
judged where each process had a core for itself: beside other work it says nothing about a plan. Rates are those that
come with the package, measured on the processor that they name; on another one measure your own and name the file:

    python scripts/acceptance/scale_5_plan.py [--rates rates.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, verdict

from llmcompress.pipeline.rates import SHIPPED

MEMORY, TIME = 0.15, 0.25
LINES = ("scale_1", "scale_2", "scale_3", "scale_4")
KEPT = ROOT / "runs" / "plan"


def checked_rates(path: Path) -> dict[str, dict[str, Any]]:
    """Runs on 1, 2 and 4 processes that a file of rates was checked on."""
    return {
        f"rates_{ranks}": {
            "predicted_bytes": row["predicted_bytes"], "measured_bytes": row["measured_bytes"],
            "predicted_s": row["predicted_s"], "measured_s": row["measured_s"], "others": 0.0, "ranks": 1,
        }
        for ranks, row in json.loads(path.read_text())["runs"].items()
    }  # fmt: skip


def measure(rates: Path) -> dict[str, dict[str, Any]]:
    """Check the rates on runs that are made now."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rates.json"
        file.write_text(rates.read_text())
        script = ROOT / "scripts" / "measure_cluster_rates.py"
        subprocess.run([sys.executable, script, "--out", file, "--keep"], check=True)
        return checked_rates(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=Path, default=SHIPPED)
    rates = parser.parse_args().rates
    rows = {path.stem: json.loads(path.read_text()) for path in sorted(KEPT.glob("*.json"))}
    missing = [line for line in LINES if not any(name.startswith(line) for name in rows)]
    rows |= measure(rates) if missing else checked_rates(rates)
    cores, found, memory, times = len(os.sched_getaffinity(0)), [], [], []
    for name, row in rows.items():
        memory.append(row["predicted_bytes"] / row["measured_bytes"] - 1)
        said = f"{name}: memory {memory[-1]:+.1%} of {row['measured_bytes'] / 1e9:.2f} GB"
        if abs(memory[-1]) > MEMORY:
            found.append(f"{name} memory {memory[-1]:+.1%}")
        error = row["predicted_s"] / row["measured_s"] - 1
        judged = row["others"] is not None and row["ranks"] + row["others"] <= cores
        if judged:
            times.append(error)
            if abs(error) > TIME:
                found.append(f"{name} time {error:+.1%}")
        said += (
            f", time {error:+.1%} of {row['measured_s']:.1f} s{'' if judged else ' (not judged: cores were shared)'}"
        )
        print(said, flush=True)
    if not times:
        found.append("no time was measured with a core for each process")
    verdict(
        not found and not missing,
        f"{len(memory)} peaks, worst {max(memory, key=abs):+.1%} (goal {MEMORY:.0%}); {len(times)} times, worst "
        f"{max(times, key=abs, default=float('nan')):+.1%} (goal {TIME:.0%}). Short: {', '.join(found) or 'nothing'}. "
        f"Lines without a run: {', '.join(missing) or 'none'}",
    )


if __name__ == "__main__":
    main()
