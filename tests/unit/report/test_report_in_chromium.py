from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from llmcompress.report.build import build_report

SCRIPT = Path(__file__).parents[3] / "scripts" / "check_report.py"


def check(run_dir: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, str(SCRIPT), str(run_dir)], capture_output=True, text=True, timeout=1800)
    if done.returncode == 4:
        pytest.skip("Chromium is not installed")
    return done


@pytest.mark.slow
def test_the_report_has_no_findings(run_dir: Path) -> None:
    build_report(run_dir)
    done = check(run_dir)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": ok") == 4


@pytest.mark.slow
def test_the_check_finds_what_it_looks_for(run_dir: Path) -> None:
    report = build_report(run_dir)
    broken = '<body><div style="width:700px;color:#999;background:#888">wide</div><script>nothing()</script>'
    report.write_text(report.read_text(encoding="utf-8").replace("<body>", broken, 1), encoding="utf-8")
    done = check(run_dir)
    assert done.returncode == 1
    for finding in ("nothing is not defined", "scrolls sideways: 700 of 390 px", "contrast"):
        assert finding in done.stdout


def test_without_a_report_it_says_how_to_make_one(tmp_path: Path) -> None:
    done = check(tmp_path)
    assert done.returncode == 1
    assert "next: llmcompress report" in done.stderr
