#!/usr/bin/env python3
"""Foundation 2: RTN, GPTQ and QESC on the reference MoE, held-out text, same settings, three seeds.

2-bit experts and 4-bit attention: perplexity dense < QESC < GPTQ < RTN, QESC closing at least a quarter of
the gap between GPTQ and dense; on held-out text the share of tokens with any changed expert lower than
GPTQ's in at least 80 % of the layers. At 3 bits QESC within 3 % of dense.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from pathlib import Path

from harness import llmcompress, verdict

SEEDS = (0, 1, 2)
DROP = ("stages.prune~", "stages.export~", "stages.evaluate.generation~", "stages.evaluate.perplexity.maths~")


def measure(recipe: str, seed: int, bits: int, folder: Path) -> dict:
    """Run one recipe; return dense and compressed perplexity and the change rate of every layer."""
    drop = [d for d in DROP if recipe == "quickstart" or d != "stages.prune~"]
    run = folder / f"{recipe}_{bits}_{seed}"
    overrides = [f"run.dir={run}", f"run.seed={seed}", f"stages.quantize.rules.experts.bits={bits}", *drop]
    llmcompress("run", recipe, *overrides, "--quiet")
    results = run / "stages" / "evaluate"
    rows = {f"{r['task']}.{r['metric']}": r for r in json.loads((results / "metrics.json").read_text())}
    text = rows["heldout.perplexity"]
    shift = json.loads((results / "expert_shift.json").read_text())
    rates = [layer["cr_any"] for layer in shift]
    shutil.rmtree(run)
    figure = {"dense": text["dense"], "compressed": text["compressed"], "cr_any": rates, "tokens": text["n"]}
    print(recipe, f"seed {seed}, {bits} bits:", json.dumps(figure), flush=True)
    return figure


def spread(values: list[float]) -> str:
    """Mean and half range."""
    return f"{statistics.mean(values):.2f} ± {(max(values) - min(values)) / 2:.2f}"


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="llmcompress-quality-"))
    found = {
        name: [measure(recipe, seed, bits, folder) for seed in SEEDS]
        for name, recipe, bits in (
            ("rtn", "quickstart_rtn", 2),
            ("gptq", "quickstart_gptq", 2),
            ("qesc", "quickstart", 2),
            ("qesc3", "quickstart", 3),
        )
    }
    shutil.rmtree(folder)
    dense = found["qesc"][0]["dense"]
    value = {name: [f["compressed"] for f in figures] for name, figures in found.items()}
    ordered = all(dense < q < g < r for q, g, r in zip(value["qesc"], value["gptq"], value["rtn"], strict=True))
    closed = [(g - q) / (g - dense) for q, g in zip(value["qesc"], value["gptq"], strict=True)]
    lower = [
        sum(q < g for q, g in zip(a["cr_any"], b["cr_any"], strict=True)) / len(a["cr_any"])
        for a, b in zip(found["qesc"], found["gptq"], strict=True)
    ]
    three = max(value["qesc3"]) / dense - 1
    verdict(
        ordered and min(closed) >= 0.25 and min(lower) >= 0.8 and three <= 0.03,
        f"held-out perplexity dense {dense:.2f}, QESC {spread(value['qesc'])}, GPTQ {spread(value['gptq'])}, "
        f"RTN {spread(value['rtn'])}; gap closed {min(closed):.0%} to {max(closed):.0%} (goal 25 %); cr_any lower in "
        f"{min(lower):.0%} of layers (goal 80 %); 3 bits {three:+.1%} (goal 3 %); {len(SEEDS)} seeds",
    )


if __name__ == "__main__":
    main()
