#!/usr/bin/env python3
"""S2R 5: two boxes, boxes in verifications, endless retries, empty answers and copied targets gain nothing."""

from __future__ import annotations

from harness import run_tests, verdict

TESTS = ["tests/paper/test_s2r_reward_hacking.py"]


def main() -> None:
    code, passed, failed = run_tests(*TESTS)
    verdict(code == 0 and passed >= 10, f"{passed} ways to cheat tried, {failed} failed")


if __name__ == "__main__":
    main()
