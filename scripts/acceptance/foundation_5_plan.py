#!/usr/bin/env python3
"""Foundation 5: the peak memory that ``plan`` predicts, against the peak of the run, on three models of different size.

The peak is the kernel's: the high-water mark of the process. A run starts a new mark for every stage, so that its
report can show each stage's own; the peak of the whole is the highest of these and of the last.

python scripts/acceptance/foundation_5_plan.py [--reference FOLDER] [--only NAME ...]
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from harness import llmcompress_json, measured, verdict

TOLERANCE = 0.15
# shapes of SmolLM2-135M, and of OLMoE made narrower
LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
}  # fmt: skip
OLMOE: dict[str, Any] = {
    "model_type": "olmoe", "vocab_size": 50304, "hidden_size": 512, "intermediate_size": 256,
    "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8, "num_experts": 64,
    "num_experts_per_tok": 8, "tie_word_embeddings": False, "max_position_embeddings": 2048,
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", default="asset:reference_moe", help="the shipped model, or a folder")
    parser.add_argument("--only", nargs="*", default=["reference", "llama", "olmoe"])
    parser.add_argument("--make", nargs=2, metavar=("NAME", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_model(*options.make)
        return
    root = Path(tempfile.mkdtemp(prefix="llmcompress-plan-"))
    errors = []
    try:
        for name in options.only:
            errors.append(one(name, options.reference, root))
    finally:
        shutil.rmtree(root)
    worst = max(errors, key=abs)
    within = sum(abs(error) <= TOLERANCE for error in errors)
    verdict(
        within == 3, f"{within} of {len(errors)} plans within {TOLERANCE:.0%} of the measured peak, worst {worst:+.1%}"
    )


def one(name: str, reference: str, root: Path) -> float:
    """Plan and run one model; the relative error of the prediction."""
    model = reference
    if name != "reference":
        model = str(root / name)
        # in a process of its own: the kernel counts a parent's memory at the moment of the fork to the child's peak
        subprocess.run([sys.executable, __file__, "--make", name, model], check=True)
    recipe = root / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(content(name, model, reference, root / f"run-{name}"), sort_keys=False))
    predicted = llmcompress_json("plan", recipe)
    began = time.time()
    peak, seconds = measured("run", recipe, "--quiet")
    stages = measured_stages(root / f"run-{name}", predicted)
    peak = max(peak, *(record[1] for _, record in stages))
    error = predicted["ram"] / peak - 1
    worst = max(predicted["stages"], key=lambda stage: stage["ram"])
    print(
        f"{name}: {predicted['parameters'] / 1e6:.1f} M parameters, plan {predicted['ram'] / 1e6:.0f} MB "
        f"(in {worst['name']}), measured {peak / 1e6:.0f} MB: {error:+.1%}; {time.time() - began:.0f} s, "
        f"{seconds:.0f} CPU s",
        flush=True,
    )
    for stage, record in stages:
        print(f"  {stage}: plan {record[0] / 1e6:.0f} MB, measured {record[1] / 1e6:.0f} MB", flush=True)
    return error


def measured_stages(run: Path, predicted: dict[str, Any]) -> list[tuple[str, tuple[int, int]]]:
    """Each stage's predicted peak beside the process's peak when it ended."""
    found = []
    for stage in predicted["stages"]:
        record = json.loads((run / "stages" / stage["name"] / "state.json").read_text())
        found.append((stage["name"], (stage["ram"], record["peak_rss_bytes"])))
    return found


def content(name: str, model: str, reference: str, run: Path) -> dict[str, Any]:
    """The recipe: GPTQ (with router calibration on the MoEs), a short evaluation, a native artifact."""
    rules = {"attention": {"role": "attention", "bits": 4, "group_size": 64}}
    if name == "llama":
        rules["mlp"] = {"role": "mlp", "bits": 4, "group_size": 64}
    else:
        rules["experts"] = {"role": "experts", "bits": 3, "group_size": 64}
    heldout = {"kind": "jsonl", "path": "asset:text/heldout.jsonl.gz"}
    return {
        "version": 1,
        "name": name,
        "model": {"path": model, "tokenizer": reference},
        "run": {"dir": str(run), "device": "cpu", "threads": 1},
        "stages": {
            "load": {"type": "load"},
            "calibrate": {
                "type": "calibrate", "samples": 16, "length": 256,
                "source": {"kind": "jsonl", "path": "asset:text/calibration.jsonl.gz"},
            },
            "quantize": {"type": "gptq" if name == "llama" else "qesc", "rules": rules},
            "evaluate": {
                "type": "evaluate",
                "perplexity": {"heldout": {"source": heldout, "length": 256, "max_tokens": 2048}},
                "fidelity": {"source": heldout, "length": 256, "samples": 2},
            },
            "export": {"type": "export", "formats": ["native"]},
        },
    }  # fmt: skip


def make_model(name: str, folder: str) -> None:
    """Write a random bfloat16 model."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = dict(LLAMA if name == "llama" else OLMOE)
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)


if __name__ == "__main__":
    main()
