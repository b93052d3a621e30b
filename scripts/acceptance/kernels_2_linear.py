#!/usr/bin/env python3
"""Kernels 2: low-bit linears beside torch's bf16, int4 and int8 at 1, 8 and 128 tokens (goals C1, C2 and C3).

All candidates of a shape are timed in turn in one process, weights cold, and the memory bandwidth is probed in the same
run. The exact kernels are what the goals are asked of; int8 activations are an option and are judged where the
goal names them. The rate of byte products from registers is measured as well. An exact 16-bit activation takes two of
them, so a goal of so many times another candidate needs 2 x times x its GFLOP/s. One that needs more than the CPU makes
falls short like any other, and is marked as beyond it; its three factors are printed and kept with it.

    python scripts/acceptance/kernels_2_linear.py [--threads 2] [--rounds 15] [--json benchmarks/kernels_linear.json]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, verdict
from llmcompress_kernels import bench, cpu
from llmcompress_kernels.bench.linear import BF16, DYNAMIC, INT4, SHAPES

# candidate → goals; C1 and C2 as multiples of bf16 and of torch's int4 operator
C1_BF16 = {"W4": 4.0, "W3": 4.8, "W2": 7.5}
C1_INT4 = {"W4": 1.5, "W3": 2.0, "W2": 3.0}
C1_FLOOR = {SHAPES[0]: 0.85, SHAPES[1]: 0.85, SHAPES[2]: 0.60}
C2_BF16 = {"W4": 3.0, "W3": 3.5, "W2": 4.0}
C3_BF16, C3_INT4, C3_DYNAMIC, C3_FLOOR = 1.7, 8.0, 1.0, 0.70
# byte products to one of an exact 16-bit activation
PLANES = 2
GEMM = 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=15.0, help="seconds per shape and number of tokens")
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "kernels_linear.json")
    options = parser.parse_args()
    if not cpu.ready():
        verdict(False, f"no native kernels: {cpu.unavailable()}")
    rows = bench.bench_linear(threads=options.threads, rounds=options.rounds, budget=options.budget)
    gemm = gemm_rate()
    peak = bench.byte_product_rate(options.threads)
    goals = judge(rows, gemm, peak)
    for row in rows:
        print(
            f"{row['in']:>5}x{row['out']:<5} {row['tokens']:>3} tokens {row['candidate']:<18} "
            f"{row['microseconds']:>9.1f} us "
            f"{row['share_of_bandwidth']:>6.0%} of bandwidth {row['gflop_per_s']:>7.0f} GFLOP/s "
            f"{row['times_bf16']:>6.2f} x bf16  error {row['relative_error']:.5f}"
        )
    for goal in goals:
        mark = "holds      " if goal["holds"] else "FALLS SHORT"
        more = ""
        if "needs_gop_per_s" in goal:
            more = f"; needs {PLANES} x {goal['wanted']:g} x {goal['against_gflop_per_s']:.1f} = "
            more += f"{goal['needs_gop_per_s']:.0f} GOP/s of byte products"
            if peak is not None:
                more += f", registers give {peak / 1e9:.0f}" + goal["beyond_this_cpu"] * ": beyond this CPU"
        print(f"{mark} {goal['goal']}: {goal['found']:.2f}, wanted {goal['wanted']:.2f}{more}")
    options.json.parent.mkdir(exist_ok=True)
    found = {"environment": bench.environment(options.threads), f"bf16_gemm_{GEMM}_gflop_per_s": gemm, "seed": 0}
    found["byte_products_gop_per_s"] = None if peak is None else round(peak / 1e9, 1)
    options.json.write_text(json.dumps({**found, "goals": goals, "rows": rows}, indent=1) + "\n")
    held = sum(goal["holds"] for goal in goals)
    beyond = sum(goal.get("beyond_this_cpu", False) for goal in goals)
    verdict(
        held == len(goals),
        f"{held} of {len(goals)} goals of C1, C2, C3 hold; {beyond} others need more byte products than this CPU makes",
    )


def gemm_rate() -> float:
    """GFLOP/s of a 2048-cubed bf16 product, what torch reaches at its best here."""
    a, b = (torch.randn(GEMM, GEMM).to(torch.bfloat16) for _ in range(2))
    timing = bench.interleave({"gemm": lambda: a @ b}, rounds=7, budget=10)["gemm"]
    return round(2 * GEMM**3 / timing.median / 1e9, 1)


def judge(rows: list[dict[str, Any]], gemm: float, peak: float | None) -> list[dict[str, Any]]:
    """Every goal with what was found."""
    goals: list[dict[str, Any]] = []

    def ask(goal: str, found: float, wanted: float, against_gflops: float | None = None) -> None:
        line = {"goal": goal, "found": round(found, 3), "wanted": wanted, "holds": found >= wanted}
        if against_gflops is not None and found < wanted:
            needs = PLANES * wanted * against_gflops
            line |= {"against_gflop_per_s": against_gflops, "needs_gop_per_s": round(needs, 1)}
            line["beyond_this_cpu"] = peak is not None and needs > peak / 1e9
        goals.append(line)

    for shape in SHAPES:
        at = {(row["tokens"], row["candidate"]): row for row in rows if (row["in"], row["out"]) == shape}
        label = f"{shape[0]}x{shape[1]}"

        def against(tokens: int, name: str, other: str, at: dict[Any, Any] = at) -> float:
            return at[tokens, other]["microseconds"] / at[tokens, name]["microseconds"]

        def rate(tokens: int, other: str, at: dict[Any, Any] = at) -> float:
            return float(at[tokens, other]["gflop_per_s"])

        for name, wanted in C1_BF16.items():
            ask(f"C1 {label} {name}, times bf16, 1 token", against(1, name, BF16), wanted)
            ask(f"C1 {label} {name}, times torch int4, 1 token", against(1, name, INT4), C1_INT4[name])
            share = at[1, name]["share_of_bandwidth"]
            ask(f"C1 {label} {name}, share of bandwidth, 1 token", share, C1_FLOOR[shape])
            few, many = C2_BF16[name], C3_BF16
            ask(f"C2 {label} {name}, times bf16, 8 tokens", against(8, name, BF16), few, rate(8, BF16))
            ask(f"C3 {label} {name}, times bf16, 128 tokens", against(128, name, BF16), many, rate(128, BF16))
            found = against(128, name, INT4)
            ask(f"C3 {label} {name}, times torch int4, 128 tokens", found, C3_INT4, rate(128, INT4))
            ask(f"C3 {label} {name}, share of bf16 GEMM rate", at[128, name]["gflop_per_s"] / gemm, C3_FLOOR)
        ask(f"C3 {label} W4 int8, times torch dynamic int8", against(128, "W4 int8", DYNAMIC), C3_DYNAMIC)
    return goals


if __name__ == "__main__":
    main()
