#!/usr/bin/env python3
"""S2R 3: the three ways with compression, each from a recipe.

(a) quantize the reasoner that was taught, then teach it again with adapters on the packed weights; (b) teach and
reinforce, then quantize; (c) the model's own traces as calibration data against first attempts. In (a) at least half of
what quantization cost has to come back.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from harness import verdict
from s2r_runs import KEPT, ensure, figures_of, reinforced, runs_folder, taught

# one of those of s2r_2_gain.py, so that the runs are the same
SEED = 6
SHOWN = ("accuracy", "first_accuracy", "verification_accuracy", "error_recall", "correct_precision", "trials", "tokens")


def show(name: str, figures: dict[str, Any]) -> float:
    """Show a line of the table at once, on stderr; return the accuracy."""
    shown = {key: round(figures[key], 4) for key in SHOWN if figures.get(key) is not None}
    print(f"{name}:", json.dumps(shown), file=sys.stderr, flush=True)
    return float(figures["accuracy"])


def main() -> None:
    with runs_folder() as folder:
        sft = taught(folder, SEED)
        model = f"model.path={sft / 'stages' / 'init' / 'model'}"
        a = ensure(folder / "legs_a", "gptq_then_s2r", model, "stages.init~")
        dense = show("taught", figures_of(a, "behaviour", "dense"))
        broken = show("(a) the same at 3 bits", figures_of(a, "recover", "before"))
        back = show("(a) the same, taught again with adapters", figures_of(a, "behaviour", "compressed"))
        orl = reinforced(folder, SEED, "s2r_tiny", "orl")
        strong = show("reinforced", figures_of(orl, "reinforce", "after"))
        # what s2r_then_gptq would teach is taught already
        given = (f"model.path={orl / 'stages' / 'reinforce' / 'model'}", "stages.init~", "stages.reinforce~")
        b = ensure(folder / "legs_b", "s2r_then_gptq", *given)
        after = show("(b) reinforced, then 3 bits on its own traces", figures_of(b, "behaviour", "compressed"))
        # the same model calibrated on first attempts, as anybody without traces would have
        c = ensure(
            folder / "legs_c", "s2r_then_gptq", *given, "stages.export~", "stages.traces.sampling.max_new_tokens=16",
            "stages.traces.keep=all", "stages.traces.problems=1200",
        )  # fmt: skip
        first = show("(c) the same on first attempts alone", figures_of(c, "behaviour", "compressed"))
    cost, regained = dense - broken, back - broken
    share = regained / cost if cost > 0 else float("inf")
    verdict(
        cost > 0 and share >= 0.5,
        f"accuracy in %: (a) taught {100 * dense:.1f}, at 3 bits {100 * broken:.1f}, taught again with adapters "
        f"{100 * back:.1f} ({100 * share:.0f} % of the loss regained); (b) reinforced {100 * strong:.1f}, at 3 bits on "
        f"its own traces {100 * after:.1f}, (c) on first attempts {100 * first:.1f}; one seed{KEPT}",
    )


if __name__ == "__main__":
    main()
