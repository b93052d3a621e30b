"""Scripts that nothing else runs in CI: they must at least find what they import."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parent.parent.parent / "scripts"


@pytest.mark.parametrize("name", ["train_reference", "train_family", "make_family_texts"])
def test_a_script_tells_its_options(name: str) -> None:
    done = subprocess.run([sys.executable, SCRIPTS / f"{name}.py", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--out" in done.stdout
