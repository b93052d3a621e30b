#!/usr/bin/env python3
"""Kernels 3: a 60-expert MoE block, skewed routing, beside transformers' grouped_mm in bf16; what pruning saves (C5).

python scripts/acceptance/kernels_3_moe.py [--threads 2] [--rounds 15] [--json benchmarks/kernels_moe.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from harness import ROOT, verdict
from llmcompress_kernels import bench, cpu
from llmcompress_kernels.bench.moe import bench_pruning

from llmcompress.inference.speed import dense_experts

DECODE = {"W4": 4.0, "W2": 7.0}
PREFILL_TOKENS, PREFILL = 128, 3.0
FLOOR = 0.75
SAVED_PER_SKIPPED = 0.9
SHARES = (0.1, 0.2, 0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=15.0, help="seconds per number of tokens")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "kernels_moe.json")
    options = parser.parse_args()
    if not cpu.ready():
        verdict(False, f"no native kernels: {cpu.unavailable()}")
    rows = bench.bench_moe(
        dense_experts(), (1, 8, PREFILL_TOKENS), threads=options.threads, rounds=options.rounds, budget=options.budget
    )
    pruned = [
        row
        for bits in (4, 2)
        for row in bench_pruning(bits, SHARES, PREFILL_TOKENS, options.threads, options.rounds, options.budget)
    ]
    goals = judge(rows, pruned)
    for row in rows:
        print(
            f"{row['tokens']:>3} tokens {row['candidate']:<10} {row['milliseconds']:>8.3f} ms "
            f"{row['share_of_bandwidth']:>6.0%} of bandwidth {row['gflop_per_s']:>6.0f} GFLOP/s "
            f"{row['times_dense']:>6.2f} x grouped_mm bf16"
        )
    for row in pruned:
        print(f"W{row['bits']}: {row['slots_skipped']:.1%} of slots skipped, {row['time_saved']:.1%} of time saved")
    for goal in goals:
        mark = "holds      " if goal["holds"] else "FALLS SHORT"
        print(f"{mark} {goal['goal']}: {goal['found']:.2f}, wanted {goal['wanted']:.2f}")
    options.json.parent.mkdir(exist_ok=True)
    found = {
        "environment": bench.environment(options.threads),
        "seed": 0,
        "goals": goals,
        "rows": rows,
        "pruning": pruned,
    }
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    held = sum(goal["holds"] for goal in goals)
    verdict(held == len(goals), f"{held} of {len(goals)} goals of C5 hold")


def judge(rows: list[dict[str, Any]], pruned: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every goal of C5 with what was found."""
    at = {(row["tokens"], row["candidate"]): row for row in rows}
    asked = []
    for name, wanted in DECODE.items():
        asked.append((f"{name}, times grouped_mm, 1 token", at[1, name]["times_dense"], wanted))
        asked.append((f"{name}, share of bandwidth, 1 token", at[1, name]["share_of_bandwidth"], FLOOR))
    for name in ("W4", "W3", "W2"):
        times = at[PREFILL_TOKENS, name]["times_dense"]
        asked.append((f"{name}, times grouped_mm, {PREFILL_TOKENS} tokens", times, PREFILL))
    for row in pruned:
        label = f"W{row['bits']}, time saved per slot skipped, {row['slots_skipped']:.0%} skipped"
        asked.append((label, row["saved_per_skipped"], SAVED_PER_SKIPPED))
    return [{"goal": g, "found": round(f, 3), "wanted": w, "holds": f >= w} for g, f, w in asked]


if __name__ == "__main__":
    main()
