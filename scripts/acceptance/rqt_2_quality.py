#!/usr/bin/env python3
"""RQT 2: the small family at 2.0 to 2.2 bits beside GPTQ at 3 and 4 bits and BitDelta, three calibration seeds.

Codes, scales and exponents of the linear weights count, and the headers of the files. Mean relative perplexity loss on
each member's own held-out text: at most that of independent 4-bit GPTQ plus two points, and below that of BitDelta and
of independent 3-bit GPTQ in every seed; and each member is better on its own text than every other member. Needs the
family of ``make family``.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from family_runs import MODELS, need_models, quality_goals
from harness import llmcompress, verdict

SEEDS = (0, 1, 2)
BASELINES = "[gptq-3,gptq-4,bitdelta,bitdelta-4,low_rank,rtvq]"


def measure(seed: int, folder: Path) -> dict[str, Any]:
    """Run the recipe once; return the table of the evaluation and the bits of what is stored."""
    run = folder / f"seed{seed}"
    llmcompress(
        "run", "rqt_tiny", f"run.dir={run}", f"run.seed={seed}", f"vars.models={MODELS}",
        f"stages.evaluate_family.baselines={BASELINES}", "--quiet",
    )  # fmt: skip
    rows = json.loads((run / "stages/evaluate_family/family.json").read_text())
    rows["bits"] = json.loads((run / "stages/export_family/sizes.json").read_text())["linear_bits"]
    rows["plan_bits"] = rows["methods"]["rqt"]["bits"]
    return rows


def own_is_best(cross: dict[str, dict[str, float]]) -> list[str]:
    """Members that another member beats on their own text."""
    return [name for name in cross if any(cross[other][name] <= cross[name][name] for other in cross if other != name)]


def main() -> None:
    need_models()
    with tempfile.TemporaryDirectory() as folder:
        seeds = [measure(seed, Path(folder)) for seed in SEEDS]
    table = {method: [rows["methods"][method]["mean_relative"] for rows in seeds] for method in seeds[0]["methods"]}
    for method, values in table.items():
        bits = seeds[0]["methods"][method]["bits"]
        shown = ", ".join(f"{value:.2%}" for value in values)
        print(f"{method:12s} {bits:5.2f} bits  mean loss {statistics.mean(values):.2%}  ({shown})")
    beaten = sorted({name for rows in seeds for name in own_is_best(rows["cross"]["rqt"])})
    dense = own_is_best(seeds[0]["cross"]["dense"])
    goals = [quality_goals(rows["methods"], rows["bits"]) for rows in seeds]
    conditions = {
        **{name: all(each[name] for each in goals) for name in goals[0]},
        f"own text (beaten: {beaten or 'none'}; dense: {dense or 'none'})": not beaten,
    }
    failed = [name for name, holds in conditions.items() if not holds]
    means = ", ".join(f"{method} {statistics.mean(values):.2%}" for method, values in table.items())
    bits = f"{seeds[0]['bits']:.3f} bits with the files' headers ({seeds[0]['plan_bits']:.3f} without)"
    verdict(not failed, f"{bits}; mean loss {means}; short of: {failed or 'nothing'}")


if __name__ == "__main__":
    main()
