#!/usr/bin/env python3
"""RQT 7, goal G6: a tree of Llama-2-7B's shapes on a GPU, 4 and 8 active members, random weights.

Judges what scripts/gpu_check.sh measures in one process: our tree product against bf16 products and our own 4-bit
products of the same members, and its share of the byte floor. Without a GPU the newest file of benchmarks/ is
judged, and the verdict says so.
"""

from __future__ import annotations

from typing import Any

from harness import gpu_figures, verdict

ACTIVE = (4, 8)
OVER_BF16, OVER_W4, FLOOR = 4.0, 1.2, 0.6


def judge(lines: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """(goal, found, wanted) for every shape; the goals against other products are those of 8 members."""
    goals = []
    for line in (line for line in lines if line["op"] == "delta_decode"):
        name = f"{line['rows']}x{line['columns']}, {line['models']} members"
        goals.append((f"{name}, share of the floor", line["floor_share"], FLOOR))
        if line["models"] == max(ACTIVE):
            goals.append((f"{name}, times bf16", line["over_bf16"], OVER_BF16))
            if "over_own_w4" in line:
                goals.append((f"{name}, times our 4 bits", line["over_own_w4"], OVER_W4))
    return goals


def main() -> None:
    found, passed, origin = gpu_figures()
    goals = judge(found["lines"])
    for name, value, wanted in goals:
        print(f"{'holds      ' if value >= wanted else 'FALLS SHORT'} {name}: {value:.3g}, wanted {wanted:.3g}")
    held = sum(value >= wanted for _, value, wanted in goals)
    verdict(
        bool(goals) and held == len(goals) and passed,
        f"{held} of {len(goals)} goals on {found['versions']['gpu']['name']}, {origin}",
    )


if __name__ == "__main__":
    main()
