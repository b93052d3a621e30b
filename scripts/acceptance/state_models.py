"""What the Q-Mamba acceptance scripts share: a random Mamba-2 of a given size, and a recipe for its states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from harness import ROOT, llmcompress

# how the recipes keep states
SHIPPED: dict[str, Any] = yaml.safe_load((ROOT / "recipes" / "base" / "q_mamba.yaml").read_text())["stages"]["states"]
# shapes of mamba2-130m
MAMBA2_130M: dict[str, Any] = {
    "model_type": "mamba2", "hidden_size": 768, "num_hidden_layers": 24, "num_heads": 24, "head_dim": 64,
    "state_size": 128, "n_groups": 1, "chunk_size": 64, "vocab_size": 50288, "tie_word_embeddings": True,
}  # fmt: skip
# a model of a second, for kills and resumes
SMALL: dict[str, Any] = {
    **MAMBA2_130M, "hidden_size": 64, "num_hidden_layers": 4, "num_heads": 4, "head_dim": 32, "state_size": 32,
    "vocab_size": 256,
}  # fmt: skip


def make_model(values: dict[str, Any], folder: Path) -> None:
    """Write a random bfloat16 model; call it in a process of its own where memory is measured."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(values["model_type"], **{k: v for k, v in values.items() if k != "model_type"})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


def recipe(model: str | Path, run: Path, **changes: Any) -> dict[str, Any]:
    """W8A8H4 without text: weights rounded to nearest, calibration on random tokens.

    Args:
        model: Folder.
        run: Run folder.
        **changes: Fields of stages to set, by stage.
    """
    stages: dict[str, Any] = {
        "load": {"type": "load"},
        "calibrate": {"type": "calibrate", "source": {"kind": "synthetic"}, "samples": 4, "length": 64},
        "quantize": {
            "type": "rtn",
            "rules": {"projections": {"role": "ssm", "bits": 8, "group_size": -1, "symmetric": True}},
        },
        "activations": {"type": "activations", "granularity": "chunk"},
        "embeddings": {"type": "embeddings"},
        "states": {**SHIPPED, "samples": 1, "tokens": 16},
        "export": {"type": "export", "formats": ["native"]},
    }
    for name, fields in changes.items():
        stages[name] = {**stages[name], **fields}
    return {
        "version": 1, "name": "states", "model": {"path": str(model)},
        "run": {"dir": str(run), "device": "cpu", "threads": 1}, "stages": stages,
    }  # fmt: skip


def quantized(model: str | Path, folder: Path, **changes: Any) -> Path:
    """Run the recipe; the artifact's folder."""
    path = folder / "states.yaml"
    path.write_text(yaml.safe_dump(recipe(model, folder / "run", **changes), sort_keys=False))
    llmcompress("run", path, "--quiet")
    return folder / "run" / "artifact"
