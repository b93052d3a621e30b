"""Scripts that nothing else runs in CI: they must at least find what they import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("train_reference", "--out"), ("train_family", "--out"), ("make_family_texts", "--out"),
        ("measure_retries", "--split"), ("measure_columns", "--seconds"), ("measure_delta_states", "--windows"),
    ],
)  # fmt: skip
def test_a_script_tells_its_options(name: str, option: str) -> None:
    done = subprocess.run([sys.executable, SCRIPTS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert option in done.stdout
