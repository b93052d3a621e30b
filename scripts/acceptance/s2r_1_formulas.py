#!/usr/bin/env python3
"""S2R 1: every formula against a hand-computed or brute-force answer, and the round trip of segments on random text."""

from __future__ import annotations

from harness import run_tests, verdict

TESTS = ["tests/paper/test_s2r_actions.py", "tests/paper/test_s2r_objectives.py", "tests/unit/training",
         "tests/unit/evaluation/test_self_correction.py"]  # fmt: skip


def main() -> None:
    code, passed, failed = run_tests(*TESTS)
    verdict(code == 0 and passed > 50, f"{passed} checks of formulas, {failed} failed")


if __name__ == "__main__":
    main()
