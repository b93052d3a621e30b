"""Several processes on one run, through the command line: same bytes, one error when one dies."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

TEXTS = ["The cat sat on the warm stone and looked at the sea. " * 6, "Nobody had opened the green door. " * 10]


def recipe(model: Path, folder: Path) -> Path:
    texts = json.dumps(TEXTS)
    path = folder / "tiny.yaml"
    path.write_text(f"""
version: 1
name: tiny
model: {{path: {model}}}
run: {{device: cpu, threads: 1, deterministic: true}}
stages:
  load: {{type: load}}
  calibrate: {{type: calibrate, source: {{kind: inline, texts: {texts}}}, samples: 8, length: 16}}
  quantize: {{type: qesc, targets: full_precision, rules: {{all: {{match: proj, bits: 3, group_size: 16}}}}}}
  routers: {{type: router_calibration}}
  export: {{type: export, formats: [native]}}
""")
    return path


def command(*words: str | Path) -> list[str]:
    return [sys.executable, "-m", "llmcompress", *map(str, words), "--quiet"]


def blocks(run: Path) -> dict[str, bytes]:
    """Blocks of all stages: one that processes share, and one that the first does alone while the others wait."""
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.glob("stages/*/blocks/*.safetensors"))}


@pytest.mark.slow
def test_two_processes_write_the_bytes_of_one_and_a_killed_one_can_be_replaced(
    tiny_folder: Path, tmp_path: Path, kill_one_of_two: Callable[..., str]
) -> None:
    source = recipe(tiny_folder, tmp_path)
    one, two = tmp_path / "one", tmp_path / "two"
    subprocess.run(command("run", source, f"run.dir={one}"), check=True)
    said = kill_one_of_two(command("run", source, f"run.dir={two}", "--nproc", "2"), lambda: blocks(two))
    assert "Traceback" not in said
    subprocess.run(command("resume", two, "--nproc", "2"), check=True)
    assert blocks(one) and blocks(two) == blocks(one)
    assert (two / "report.html").exists()
    lines = [json.loads(line) for line in (two / "events.jsonl").read_text().splitlines()]
    assert [line["data"]["status"] for line in lines if line["kind"] == "run_end"][-1] == "finished"
