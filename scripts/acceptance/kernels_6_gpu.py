#!/usr/bin/env python3
"""Kernels 6: goals G1-G3 on a GPU: MoE decode and prefill beside bf16 and humming-kernels, a whole Mixtral at 3 bits.

Runs scripts/gpu_check.sh and judges the JSON file that it writes. Without a GPU the newest file of benchmarks/ is
judged, and the verdict says so.
"""

from __future__ import annotations

from typing import Any

from harness import gpu_figures, verdict

FEW, FEW_OVER_BF16 = (1, 4, 8, 16), 3.0
FLOOR = {4: 0.7, 3: 0.6, 2: 0.5}
OVER_W4 = {3: 1.2, 2: 1.5}
OVER_HUMMING = {4: 1.0, 3: 1.15, 2: 1.15}
PREFILL, PREFILL_OVER_BF16, SAVED = 4096, 0.9, 0.9
RESIDENT_GB = 24.0


def main() -> None:
    found, passed, origin = gpu_figures()
    goals = judge(found["lines"])
    for name, value, wanted, holds in goals:
        print(f"{'holds      ' if holds else 'FALLS SHORT'} {name}: {value:.3g}, wanted {wanted:.3g}")
    held = sum(goal[3] for goal in goals)
    verdict(
        bool(goals) and held == len(goals) and passed and not found["failed"],
        f"{held} of {len(goals)} goals on {found['versions']['gpu']['name']}, "
        f"copies at {found['copy_gb_per_second']} GB/s, reads at {found.get('read_gb_per_second', '?')}, {origin}"
        + (f"; not measured: {', '.join(found['failed'])}" if found["failed"] else ""),
    )


def judge(lines: list[dict[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """Compare the measured lines with the goals: (goal, found, wanted, holds)."""
    moe = {(r["bits"], r["tokens"], r["skipped"]): r for r in lines if r["op"] == "moe_group_gemm"}
    goals: list[tuple[str, float, float, bool]] = []

    def at_least(name: str, value: float, wanted: float) -> None:
        goals.append((name, value, wanted, value >= wanted))

    for (bits, tokens, skipped), line in sorted(moe.items()):
        few = tokens in FEW
        if not skipped and few:
            at_least(f"W{bits}, {tokens} tokens, share of the floor", line["floor_share"], FLOOR[bits])
        if not skipped and few and bits == 4 and "over_bf16" in line:
            at_least(f"W4, {tokens} tokens, times bf16 grouped GEMM", line["over_bf16"], FEW_OVER_BF16)
        if not skipped and few and bits != 4 and (4, tokens, 0.0) in moe:
            at_least(
                f"W{bits}, {tokens} tokens, times our W4",
                moe[4, tokens, 0.0]["ours_us"] / line["ours_us"],
                OVER_W4[bits],
            )
        if not skipped and tokens == PREFILL and "over_bf16" in line:
            at_least(f"W{bits}, {PREFILL} tokens, times bf16 grouped GEMM", line["over_bf16"], PREFILL_OVER_BF16)
        if skipped and (bits, tokens, 0.0) in moe:
            saved = 1 - line["ours_us"] / moe[bits, tokens, 0.0]["ours_us"]
            at_least(f"W{bits}, time saved per slot pruned", saved / (1 - line["slots_used"]), SAVED)
    for line in lines:
        if line["op"] == "group_gemm" and line["tokens"] <= 16 and "over_humming" in line:
            name = f"dense {line['rows']}x{line['columns']} W{line['bits']}, {line['tokens']} tokens"
            at_least(f"{name}, times humming-kernels", line["over_humming"], OVER_HUMMING[line["bits"]])
        if line["op"] == "mixtral-8x7b":
            goals.append(
                (
                    "Mixtral-8x7B at 3 bits, GB resident",
                    line["resident_gb"],
                    RESIDENT_GB,
                    line["resident_gb"] < RESIDENT_GB,
                )
            )
    return goals


if __name__ == "__main__":
    main()
