#!/usr/bin/env python3
"""Scale 4: a sweep of 12 runs on 2 cores; one run is killed, then the sweep itself, both resume; table and plot right.

The table is held against what every run measured, the front against its definition, and one run's artifact against
the same run made alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from harness import CLI, digest, keep_plan, llmcompress, verdict

BITS, GROUPS, ALPHAS = ("2", "3", "4"), ("32", "64"), ("0.1", "0.3")
KEYS = ("stages.quantize.rules.experts.bits", "stages.quantize.rules.experts.group_size", "stages.prune.alpha")


def command(folder: Path) -> list[str]:
    """The sweep: 3 x 2 x 2 runs, two at a time."""
    axes = [f"{key}={','.join(values)}" for key, values in zip(KEYS, (BITS, GROUPS, ALPHAS))]
    return ["sweep", "smoke/eac_moe_tiny", *axes, "--dir", str(folder), "--jobs", "2", "--json"]


def command_line(process: psutil.Process) -> list[str]:
    """A process's words; none of one that has ended meanwhile."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


def killed_once(folder: Path) -> str:
    """Start the sweep, kill one of its runs outright, let two others finish, then kill the sweep; what was killed."""
    process = subprocess.Popen([*CLI, *command(folder)], stdout=subprocess.DEVNULL, start_new_session=True)
    victim = ""
    while process.poll() is None:
        time.sleep(0.2)
        children = [(c, words) for c in psutil.Process(process.pid).children() if "run" in (words := command_line(c))]
        blocks = list(folder.glob("*/stages/quantize/blocks/*.safetensors"))
        if not victim and blocks and children:
            name = blocks[0].relative_to(folder).parts[0]
            for child, words in children:
                if any(name in word for word in words):
                    child.send_signal(signal.SIGKILL)
                    victim = name
        if victim and len(list(folder.glob("*/artifact"))) >= 2:
            orphans = psutil.Process(process.pid).children()
            os.killpg(process.pid, signal.SIGKILL)
            for child in orphans:
                child.kill()
    process.wait()
    return victim


def problems(folder: Path, data: dict[str, Any], alone: Path) -> list[str]:
    """What is wrong with table and plot."""
    found, rows = [], data["runs"]
    if len(rows) != 12 or any(row["status"] != "finished" for row in rows):
        found.append(f"{sum(row['status'] == 'finished' for row in rows)} of 12 runs finished")
    for row in rows:
        run = Path(row["run_dir"])
        parts = json.loads((run / "stages" / "evaluate" / "metrics.json").read_text())
        value = next(p["compressed"] for p in parts if f"{p['task']}.{p['metric']}" == data["metric"])
        size = sum(path.stat().st_size for path in run.glob("artifact/*.safetensors"))
        if row["metrics"][data["metric"]] != value or row["bytes"] != size:
            found.append(f"{row['name']}: the table differs from the run")
        lock = json.loads((run / "recipe.lock.json").read_text())["recipe"]["stages"]
        rule = lock["quantize"]["rules"]["experts"]
        if [str(rule["bits"]), str(rule["group_size"]), str(lock["prune"]["alpha"])] != list(row["values"].values()):
            found.append(f"{row['name']}: the run had other settings")
    points = [(row["bytes"], row["metrics"][data["metric"]], row["pareto"]) for row in rows]
    for size, value, front in points:
        beaten = any(s <= size and v <= value and (s, v) != (size, value) for s, v, _ in points)
        if front == beaten:
            found.append(f"a run of {size} bytes is on the wrong side of the front")
    page = (folder / "sweep.html").read_text()
    drawn = page.split('class="plot narrow"')[0]
    if len(re.findall(r'<circle [^>]*r="5"', drawn)) != 12 or re.search(r'(src|href)="?https?:', page):
        found.append("the plot does not show 12 points, or the page needs the network")
    name = rows[0]["name"]
    if digest(folder / name / "artifact") != digest(alone / "artifact"):
        found.append(f"{name}: another artifact than the run made alone")
    return found


def main() -> None:
    root = Path(tempfile.mkdtemp(prefix="llmcompress-sweep-"))
    folder = root / "sweep"
    began = time.time()
    victim = killed_once(folder)
    left = len(list(folder.glob("*/artifact")))
    llmcompress(*command(folder), stderr=subprocess.DEVNULL)
    seconds = time.time() - began
    data = json.loads((folder / "results.json").read_text())
    values = [f"{key}={value}" for key, value in data["runs"][0]["values"].items()]
    threads = max(1, (os.cpu_count() or 1) // 2)
    llmcompress("run", "smoke/eac_moe_tiny", *values, f"run.threads={threads}", f"run.dir={root / 'alone'}", "--quiet")
    keep_plan("scale_4", root / "alone", ["smoke/eac_moe_tiny", *values])
    found = problems(folder, data, root / "alone")
    if not victim or not 2 <= left < 12:
        found.append(f"nothing was killed in time (victim {victim or 'none'}, {left} runs done)")
    print("\n".join(found))
    front = sum(row["pareto"] for row in data["runs"])
    shutil.rmtree(root)
    verdict(
        not found, f"12 runs in {seconds:.0f} s, two at a time; {victim} killed, the sweep killed after {left} runs, "
        f"both resumed; {front} runs on the front; {len(found)} things wrong",
    )  # fmt: skip


if __name__ == "__main__":
    main()
