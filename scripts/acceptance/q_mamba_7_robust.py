#!/usr/bin/env python3
"""Q-Mamba 7: kill and resume, malformed input and predicted memory for the stages on states.

Eight kills at random moments of a run with calibrated scales and widths per head, each resumed to the same artifact
bytes; malformed recipes and artifacts that give one clear error and the right exit code; the peak that ``plan``
predicts within 15 % of the measured one on a Mamba-2 of 130m's shape.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from harness import CLI, digest, llmcompress, llmcompress_json, measured, verdict
from state_models import MAMBA2_130M, SMALL, make_model, quantized, recipe

KILLS = 8
STATES = {"codec": "dsq_static_p", "head_bits": "auto", "avg_bits": 5.0}
# change of the dsq section → exit code, words of the message
WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"bits": 5}, 3, "bits"),
    ({"codec": "dsq_p"}, 3, "codec"),
    ({"codec": "per_head", "sqrt_axis": "state"}, 3, "sqrt_axis"),
    ({"alpha": 0.9}, 3, "alpha"),
    ({"avg_bits": 3}, 3, "avg_bits"),
]


def write(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def kills(model: Path, root: Path) -> tuple[int, int]:
    """Runs that end in the same bytes after a kill, of how many."""

    def file(name: str) -> Path:
        return write(root / f"{name}.yaml", recipe(model, root / name, states=STATES))

    began = time.time()
    llmcompress("run", file("whole"), "--quiet")
    length, expected = time.time() - began, digest(root / "whole" / "artifact")
    rng, same = random.Random(0), 0
    for number in range(KILLS):
        name, delay = f"killed{number}", rng.uniform(0.4, 1.0) * length
        command = [*CLI, "run", str(file(name))]
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        time.sleep(delay)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        again = ("resume", root / name) if (root / name / "recipe.lock.json").exists() else ("run", file(name))
        llmcompress(*again, stderr=subprocess.DEVNULL)
        same += digest(root / name / "artifact") == expected
        shutil.rmtree(root / name)
    return same, KILLS


def refusals(model: Path, root: Path) -> tuple[int, int]:
    """Malformed inputs that are refused with the right words and exit code, of how many."""
    good = 0
    for change, code, words in WRONG:
        path = write(root / "wrong.yaml", recipe(model, root / "wrong", states=change))
        done = llmcompress("run", path, check=False, stderr=subprocess.PIPE)
        good += done.returncode == code and words in done.stderr and not (root / "wrong" / "artifact").exists()
        if done.returncode != code or words not in done.stderr:
            print(f"{change}: exit code {done.returncode}: {done.stderr[-300:]}", flush=True)
    artifact = quantized(model, root)
    config = json.loads((artifact / "config.json").read_text())
    states = config["quantization_config"]["policies"]["state_cache"]
    broken = [
        {"state_cache": {**states, "codec": "none_such"}},
        {"state_cache": {**states, "window": 0}},
        {"later": {}},
    ]
    for policies in broken:
        changed = {**config, "quantization_config": {**config["quantization_config"], "policies": policies}}
        (artifact / "config.json").write_text(json.dumps(changed))
        done = llmcompress("generate", artifact, "--prompt", "x", check=False, stderr=subprocess.PIPE)
        good += done.returncode not in (0, 1) and "Traceback" not in done.stderr
    return good, len(WRONG) + len(broken)


def plan_error(root: Path) -> float:
    """Relative error of the predicted peak."""
    model = root / "large"
    subprocess.run([sys.executable, __file__, "--make", str(model)], check=True)
    path = write(
        root / "large.yaml", recipe(model, root / "large-run", calibrate={"length": 256}, states={"tokens": 256})
    )
    predicted = llmcompress_json("plan", path)["ram"]
    peak, _ = measured("run", path, "--quiet")
    stages = (root / "large-run" / "stages").glob("*/state.json")
    peak = max(peak, *(json.loads(stage.read_text())["peak_rss_bytes"] for stage in stages))
    print(f"plan {predicted / 1e6:.0f} MB, measured {peak / 1e6:.0f} MB", flush=True)
    return predicted / peak - 1


def main() -> None:
    if sys.argv[1:2] == ["--make"]:
        make_model(MAMBA2_130M, Path(sys.argv[2]))
        return
    root = Path(tempfile.mkdtemp(prefix="llmcompress-states-"))
    try:
        make_model(SMALL, root / "small")
        same, total = kills(root / "small", root)
        refused, wrong = refusals(root / "small", root)
        error = plan_error(root)
    finally:
        shutil.rmtree(root)
    verdict(
        same == total and refused == wrong and abs(error) <= 0.15,
        f"{same} of {total} killed runs end in the same bytes, {refused} of {wrong} malformed inputs refused, "
        f"plan {error:+.1%} off the measured peak",
    )


if __name__ == "__main__":
    main()
