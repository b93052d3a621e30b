"""A model larger than its budget of memory, from writing it to generating with what came out; see the script."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "acceptance" / "scale_1_memory.py"


@pytest.mark.slow
def test_a_model_is_compressed_in_less_memory_than_it_has_bytes(tmp_path: Path) -> None:
    words = ["--gigabytes", "1.2", "--ram", "1GiB", "--generate-ram", "1280MiB", "--work", tmp_path, "--no-keep"]
    words += ["--hidden", "1024", "--intermediate", "2048", "--experts", "4", "--tokens", "256"]
    done = subprocess.run([sys.executable, SCRIPT, *map(str, words)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1.2 GB model" in done.stdout and "of 1GiB" in done.stdout
