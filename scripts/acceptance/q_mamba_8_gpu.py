#!/usr/bin/env python3
"""Q-Mamba 8, goals G4 and G5: 4-bit states, and a whole decode step of Mamba2-2.7B's shapes, on a GPU, random weights.

Judges what scripts/gpu_check.sh measures in one process. G4: the update of a state, in the replay window of the
recipes, against the same update with an fp16 and an fp32 state and the byte floor, 64 sequences and more; with 16
tokens a window against fp16. G5: a step with 4-bit weights and such states against bf16 weights and fp16 states, and
its byte floor; and a prompt of 4096 tokens with 8-bit weights and activations, as the recipes make them, against bf16
ones with the same kernels between the projections. Without a GPU the newest file of benchmarks/ is judged, and the
verdict says so; what is not in it falls short.
"""

from __future__ import annotations

from typing import Any

from harness import gpu_figures, verdict

WINDOW, LONG = 4, 16
MANY = 64
OVER_FP16, OVER_FP32, LONG_OVER_FP16, STATE_FLOOR = 2.3, 4.5, 3.0, 0.7
STEP_FEW, STEP_MANY, FROM, STEP_FLOOR = 3.0, 2.4, 128, 0.65
PROMPT = 1.3


def judge(lines: list[dict[str, Any]]) -> list[tuple[str, float | None, float]]:
    """(goal, found or None, wanted)."""
    goals: list[tuple[str, float | None, float]] = []
    for line in lines:
        batch = line.get("batch", 0)
        if line["op"] == "dsq_state_update" and batch >= MANY:
            name = f"state update, {batch} sequences, windows of"
            for tokens, figure, wanted in (
                (WINDOW, "over_fp16", OVER_FP16),
                (WINDOW, "over_fp32", OVER_FP32),
                (WINDOW, "floor_share", STATE_FLOOR),
                (LONG, "over_fp16", LONG_OVER_FP16),
            ):
                goals.append((f"{name} {tokens}, {figure}", line.get(f"dsq4_w{tokens}_{figure}"), wanted))
        if line["op"] == "mamba2-2.7b step":
            name = f"decode step, {batch} sequences"
            wanted = STEP_FEW if batch < FROM else STEP_MANY
            goals.append((f"{name}, over bf16", line.get(f"over_w16s16_w{WINDOW}"), wanted))
            goals.append((f"{name}, share of the floor", line.get(f"floor_share_w{WINDOW}"), STEP_FLOOR))
    prompts = [line for line in lines if line["op"] == "mamba2-2.7b prompt"]
    over = prompts[-1].get("w8a8_over_w16a16") if prompts else None
    return [*goals, ("prompt in int8, over bf16", over, PROMPT)]


def main() -> None:
    found, passed, origin = gpu_figures()
    goals = judge(found["lines"])
    held, missing = 0, 0
    for name, value, wanted in goals:
        if value is None:
            missing += 1
            print(f"NOT MEASURED {name}, wanted {wanted:.3g}")
            continue
        held += value >= wanted
        print(f"{'holds       ' if value >= wanted else 'FALLS SHORT '} {name}: {value:.3g}, wanted {wanted:.3g}")
    verdict(
        held == len(goals) and passed,
        f"{held} of {len(goals)} goals on {found['versions']['gpu']['name']}, {missing} not measured, {origin}",
    )


if __name__ == "__main__":
    main()
