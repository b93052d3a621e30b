#!/usr/bin/env python3
"""S2R 3: the three ways with compression, each from a recipe.

(a) quantize, then teach adapters on the packed weights; (b) teach, then quantize; (c) the taught model's own traces
as calibration data against those of the untaught model. In (a) at least half of what quantization cost has to come
back.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from harness import llmcompress, verdict

SHOWN = ("accuracy", "first_accuracy", "verification_accuracy", "error_recall", "correct_precision", "trials", "tokens")


def read(run: Path, stage: str, name: str) -> dict[str, Any]:
    """Figures a stage kept under a name."""
    return json.loads((run / "stages" / stage / f"behaviour_{name}.json").read_text())


def show(name: str, figures: dict[str, Any]) -> float:
    """Print a line of the table; return the accuracy."""
    print(f"{name}:", json.dumps({k: round(figures[k], 4) for k in SHOWN if figures.get(k) is not None}), flush=True)
    return float(figures["accuracy"])


def main() -> None:
    folder = Path(tempfile.mkdtemp(prefix="llmcompress-s2r-legs-"))
    b, a, c = folder / "b", folder / "a", folder / "c"
    llmcompress("run", "s2r_then_gptq", f"run.dir={b}", "--quiet")
    base = show("base", read(b, "init", "before"))
    taught = show("taught, dense", read(b, "behaviour", "dense"))
    after = show("(b) taught, then 3 bits, calibrated on its traces (c)", read(b, "behaviour", "compressed"))
    # the same model calibrated on the first attempts of the untaught one, as anybody without traces would have
    plain = f"model.path={b / 'stages' / 'reinforce' / 'model'}"
    llmcompress(
        "run", "s2r_then_gptq", f"run.dir={c}", plain, "stages.init~", "stages.reinforce~", "stages.export~",
        "stages.traces.sampling.max_new_tokens=16", "stages.traces.keep=all", "stages.traces.problems=1200", "--quiet",
    )  # fmt: skip
    first = show("(c) the same, calibrated on first attempts alone", read(c, "behaviour", "compressed"))
    llmcompress("run", "gptq_then_s2r", f"run.dir={a}", "--quiet")
    broken = show("(a) base at 3 bits", read(a, "init", "before"))
    back = show("(a) the same, taught with adapters", read(a, "behaviour", "compressed"))
    shutil.rmtree(folder)
    cost, regained = base - broken, back - broken
    share = regained / cost if cost > 0 else float("inf")
    verdict(
        cost > 0 and share >= 0.5,
        f"accuracy in %: base {100 * base:.1f}, at 3 bits {100 * broken:.1f}, taught with adapters {100 * back:.1f} "
        f"({share:.1f} times the loss regained); taught dense {100 * taught:.1f}, then 3 bits {100 * after:.1f} on its "
        f"traces, {100 * first:.1f} on first attempts; one seed",
    )


if __name__ == "__main__":
    main()
