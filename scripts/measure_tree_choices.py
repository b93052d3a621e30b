#!/usr/bin/env python3
"""What each choice of the residual tree gives at the same bits: groups of columns, what errors count, sweeps.

    python scripts/measure_tree_choices.py --models runs/family/models [--texts FOLDER] [--seeds 0 1] [--out FILE]

Builds the family of ``make family`` with the recipe ``rqt_tiny``, one choice after the other added to the plainest
form, and measures on text of each member how far its predictions move from those of its dense original (KL divergence,
nats a token) and the relative loss of perplexity. ``--texts`` has ``<member>.jsonl.gz``; choose by other text than what
is judged in the end. Calibration windows are the same in all variants of a seed. What is in the file is not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent / "acceptance"))

from harness import ROOT, llmcompress

from llmcompress.data.calibration import build
from llmcompress.data.sources import JsonlSource
from llmcompress.models.family_artifact import FamilyArtifact
from llmcompress.models.family_model import dense_member
from llmcompress.models.handle import ModelHandle

NARROW, RELATIVE, STILL = "group_size=96", "bits.importance=relative", "sweeps=0"
VARIANTS = {
    "plain, groups of 96": (NARROW, RELATIVE, STILL),
    "groups of 192": (RELATIVE, STILL),
    "and bits by the loss": (STILL,),
    "and sweeps": (),
}
LENGTH, WINDOWS = 256, 24


@torch.inference_mode()
def moved(dense: Any, found: Any, windows: torch.Tensor) -> tuple[float, float]:
    """KL divergence of the second model's predictions from the first one's, nats a token, and the relative loss."""
    kl = before = after = 0.0
    for rows in windows.split(8):
        old, new = (model(rows).logits[:, :-1].float().log_softmax(-1) for model in (dense, found))
        kl += float((old.exp() * (old - new)).sum())
        before, after = (
            total + float(F.nll_loss(part.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"))
            for total, part in ((before, old), (after, new))
        )
    tokens = windows.numel() - len(windows)
    return kl / tokens, math.expm1((after - before) / tokens)


def measure(models: Path, texts: Path, settings: tuple[str, ...], seed: int, folder: Path) -> dict[str, Any]:
    """Build one variant; figures by member."""
    run = folder / "run"
    llmcompress(
        "run", "rqt_tiny", f"run.dir={run}", f"run.seed={seed}", f"vars.models={models}", "stages.evaluate_family~",
        *(f"stages.rqt.{each}" for each in settings), "--quiet",
    )  # fmt: skip
    artifact = FamilyArtifact(run / "artifact")
    rows: dict[str, Any] = {"bits": artifact.plan.linear_bits(), "members": {}}
    for name in sorted(artifact.members):
        source = texts / f"{name}.jsonl.gz"
        if not source.exists():
            continue
        handle = ModelHandle.open(models / name)
        text = JsonlSource(kind="jsonl", path=str(source))
        windows = build(text, handle.tokenizer(), WINDOWS, LENGTH, 0, allow_fewer=True).tokens
        dense = handle.dense_model(torch.float32)
        kl, loss = moved(dense, dense_member(artifact, name, torch.float32), windows)
        rows["members"][name] = {"kl": kl, "loss": loss}
    count = len(rows["members"])
    return rows | {key: sum(row[key] for row in rows["members"].values()) / count for key in ("kl", "loss")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, default=ROOT / "runs" / "family" / "models")
    parser.add_argument("--texts", type=Path, default=ROOT / "recipes" / "assets" / "text" / "family" / "heldout")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "rqt_choices.json")
    options = parser.parse_args()
    found = json.loads(options.out.read_text()) if options.out.exists() else {"torch": torch.__version__}
    for seed in options.seeds:
        for name, settings in VARIANTS.items():
            rows = found.setdefault(name, {})
            if str(seed) not in rows:
                with tempfile.TemporaryDirectory() as folder:
                    rows[str(seed)] = measure(options.models, options.texts, settings, seed, Path(folder))
                options.out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
            each = ", ".join(f"{member} {row['kl']:.4f}" for member, row in rows[str(seed)]["members"].items())
            print(
                f"seed {seed}  {name:22s} KL {rows[str(seed)]['kl']:.5f}  loss {rows[str(seed)]['loss']:.2%}  ({each})"
            )


if __name__ == "__main__":
    main()
