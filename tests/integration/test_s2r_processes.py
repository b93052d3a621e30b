"""S2R in several processes, through the command line: the bytes of one process, one error when one dies, a resume with
fewer."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

RECIPE = """
version: 1
name: shared
model: {path: "asset:reference_reasoner"}
run: {device: cpu, threads: 1, deterministic: true}
vars:
  task: {kind: countdown, high: 15, limit: 60, compact: true}
  measure: {problems: 24, max_new_tokens: 30, batch: 8}
stages:
  load: {type: load}
  init:
    {type: s2r_init, task: "${vars.task}", problems: 40, samples: 3, epochs: 2, pair_epochs: 1, batch: 16, lr: 1.0e-3,
     anchor: 0.5, decay: cosine, weight_decay: 0.1, validation: {share: 0.3, every: 1, patience: 2},
     sampling: {temperature: 0.8, max_new_tokens: 14, batch: 32}, measure: "${vars.measure}"}
  reinforce:
    {type: s2r_rl, level: process, task: "${vars.task}", steps: 4, prompts: 4, samples: 4, updates: 2, lr: 1.0e-4,
     checkpoint_every: 1, problems: 12, screen: {samples: 2, min_accuracy: 0, max_accuracy: 1},
     baseline: {scope: running, min_group: 1}, measure: "${vars.measure}",
     sampling: {temperature: 1.0, max_new_tokens: 30, batch: 4}}
  traces: {type: s2r_traces, task: "${vars.task}", problems: 24, keep: all, samples: 4, length: 16,
           sampling: {temperature: 0.8, max_new_tokens: 14, batch: 8}}
  behaviour: {type: s2r_evaluate, task: "${vars.task}", measure: "${vars.measure}", majority: true,
              sampling: {max_new_tokens: 14, batch: 8}}
"""
KEPT = (
    "stages/init/model/model.safetensors", "stages/init/trajectories.jsonl", "stages/init/samples/00000.json",
    "stages/init/curve.json", "stages/reinforce/model/model.safetensors", "stages/reinforce/curve.json",
    "stages/reinforce/behaviour_after.json", "stages/reinforce/samples/00000.json", "stages/traces/tokens.safetensors",
    "stages/behaviour/majority.json", "stages/behaviour/metrics.json",
)  # fmt: skip


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "llmcompress", *map(str, words), "--quiet"]


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one_and_one_finishes_what_two_began(
    tmp_path: Path, kill_one_of_two: Callable[..., str]
) -> None:
    source, one, two = tmp_path / "shared.yaml", tmp_path / "one", tmp_path / "two"
    source.write_text(RECIPE)
    subprocess.run(command("run", source, f"run.dir={one}"), check=True, capture_output=True)
    progress = two / "stages/reinforce/progress.safetensors"
    kill_one_of_two(command("run", source, f"run.dir={two}", "--nproc", "2"), progress.exists)
    assert not (two / "stages/reinforce/model").exists()
    subprocess.run(command("resume", two), check=True, capture_output=True)
    # two processes from beginning to end
    three = tmp_path / "three"
    subprocess.run(command("run", source, f"run.dir={three}", "--nproc", "2"), check=True, capture_output=True)
    for name in KEPT:
        # a curve that went through a checkpoint names its figures in another order
        read = json.loads if name.endswith(".json") else bytes
        for other in (two, three):
            assert read((one / name).read_bytes()) == read((other / name).read_bytes()), name
