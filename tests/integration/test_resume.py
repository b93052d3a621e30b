"""kill -9 at any durable write, resume, and the artifact has the bytes of an undisturbed run."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

RECIPE = """
version: 1
name: killed
model: {{path: {model}}}
run: {{dir: {folder}/whole, device: cpu, threads: 1}}
stages:
  load: {{type: load}}
  calibrate:
    type: calibrate
    source: {{kind: inline, texts: {texts}}}
    samples: 4
    length: 16
  quantize:
    type: gptq
    rules:
      attention: {{role: attention, bits: 4, group_size: 16}}
      experts: {{role: experts, bits: 2, group_size: 16}}
  evaluate:
    type: evaluate
    overlap: ignore
    perplexity:
      text: {{source: {{kind: inline, texts: {texts}}}, length: 16, max_tokens: 64}}
  export: {{type: export, formats: [native]}}
"""

# One process imports torch, reads the recipe and never computes; each run is a fork of it, so that a kill costs no
# second import.
# os.fsync marks every durable write twice: before the file gets its name, and after.
DRIVER = """
import json, os, signal, sys
import torch, transformers, lm_eval  # noqa
from llmcompress.cli.app import invoke

def child(words, die_at, count_file=None):
    pid = os.fork()
    if pid:
        _, status = os.waitpid(pid, 0)
        return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    seen, real = [0], os.fsync
    def fsync(descriptor):
        seen[0] += 1
        if seen[0] == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)
    os.fsync = fsync
    sys.stdout = sys.stderr
    code = 99
    try:
        code = invoke(words)
    finally:
        if count_file:
            with open(count_file, "w") as handle:
                handle.write(str(seen[0]))
        sys.stderr.flush()
        os._exit(int(code))

recipe, folder, spread = sys.argv[1], sys.argv[2], int(sys.argv[3])
import llmcompress.pipeline.runner, llmcompress.report.build, llmcompress.stages.evaluate  # noqa
assert invoke(["validate", recipe, "run.seed=0"]) == 0
results = {"whole": child(["run", recipe], 0, folder + "/count")}
total = int(open(folder + "/count").read())
results["total"] = total
points = sorted({1 + (total - 1) * i // (spread - 1) for i in range(spread)})
results["points"] = points
results["kills"] = []
for point in points:
    where = f"{folder}/killed{point}"
    killed = child(["run", recipe, f"run.dir={where}"], point)
    # killed again while resuming, a little later than the first time
    again = child(["resume", where], 3) if os.path.exists(where + "/recipe.lock.json") else None
    words = ["resume", where] if os.path.exists(where + "/recipe.lock.json") else ["run", recipe, f"run.dir={where}"]
    results["kills"].append([point, killed, again, child(words, 0)])
print(json.dumps(results))
"""


def contents(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def killed_runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("killed")
    texts = json.dumps(
        ["The cat sat on the warm stone and looked at the sea. " * 6, "Nobody had opened the door. " * 12]
    )
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_folder, folder=folder, texts=texts))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, str(recipe), str(folder), "6"],
        capture_output=True, text=True, check=False, timeout=3600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    results["stderr"] = done.stderr
    return folder, results


def test_the_undisturbed_run_ends_well(killed_runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = killed_runs
    assert results["whole"] == 0, results["stderr"][-4000:]
    assert (folder / "whole" / "artifact" / "config.json").exists()
    assert results["total"] > 10


def test_every_killed_run_dies_and_resumes(killed_runs: tuple[Path, dict[str, Any]]) -> None:
    _, results = killed_runs
    for point, killed, _, resumed in results["kills"]:
        assert killed == -9, f"kill at write {point}"
        assert resumed == 0, f"resume after write {point}: {results['stderr'][-4000:]}"


def test_artifacts_are_identical_to_the_byte(killed_runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = killed_runs
    whole = contents(folder / "whole" / "artifact")
    assert any(name.endswith(".safetensors") for name in whole)
    for point in results["points"]:
        assert contents(folder / f"killed{point}" / "artifact") == whole, f"killed at write {point}"


def test_quantized_blocks_are_identical_to_the_byte(killed_runs: tuple[Path, dict[str, Any]]) -> None:
    folder, results = killed_runs

    def blocks(run: str) -> dict[str, str]:
        found = contents(folder / run / "stages" / "quantize" / "blocks")
        return {name: value for name, value in found.items() if name.endswith(".safetensors")}

    whole = blocks("whole")
    assert len(whole) == 2
    for point in results["points"]:
        assert blocks(f"killed{point}") == whole
