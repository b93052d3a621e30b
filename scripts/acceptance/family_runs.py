"""What the acceptance scripts of families share: the trained family, an artifact made from it, its members' texts."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path

from harness import ROOT, llmcompress, verdict

# of `make family`; another place for one that lies elsewhere
MODELS = Path(os.environ.get("FAMILY_MODELS", ROOT / "runs" / "family" / "models"))
MEMBERS = ("chat", "code", "doyle", "maths", "shakespeare", "spanish")
# a full tree and budget, little calibration, no evaluation: enough for bytes, speed and robustness
RECIPE = """version: 1
name: family
extends: {root}/recipes/smoke/rqt_tiny.yaml
vars: {{models: "{models}"}}
run: {{dir: "{run}"}}
stages:
  evaluate_family~:
"""


def need_models(models: Path = MODELS, remedy: str = "make family, or set FAMILY_MODELS") -> None:
    """End with a verdict if a family has not been trained."""
    if not (models / "training.json").exists():
        verdict(False, f"{models} is missing: {remedy}")


def quality_goals(methods: Mapping[str, Mapping[str, float]], stored: float) -> dict[str, bool]:
    """What RQT 2 and 3 ask of a table of ``evaluate_family``.

    Args:
        methods: Method → ``bits`` and ``mean_relative`` loss.
        stored: Bits a linear weight of the tree as its files are, headers included.
    """
    loss = {method: row["mean_relative"] for method, row in methods.items()}
    return {
        "2.0 to 2.2 bits with headers": 2.0 <= stored <= 2.2,
        "within gptq-4 + 2 points": loss["rqt"] <= loss["gptq-4"] + 0.02,
        "below bitdelta": loss["rqt"] < loss["bitdelta"],
        "below gptq-3": loss["rqt"] < loss["gptq-3"],
    }


def recipe(folder: Path, run: Path) -> Path:
    """Write the recipe of a small run."""
    path = folder / "family.yaml"
    path.write_text(RECIPE.format(root=ROOT, models=MODELS, run=run))
    return path


def artifact(folder: Path) -> Path:
    """Build a family from the trained models; returns the artifact's folder."""
    run = folder / "run"
    llmcompress("run", recipe(folder, run), "--quiet")
    return run / "artifact"


def prompts(member: str, count: int, characters: int = 60) -> list[str]:
    """Beginnings of a member's own held-out texts."""
    path = ROOT / "recipes/assets/text/family/heldout" / f"{member}.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    joined = "\n".join(texts)
    return [joined[i * 997 : i * 997 + characters] for i in range(count)]
