#!/usr/bin/env python3
"""Print how long the heads of a Mamba-2 model remember, on held-out text: ``ln 2 / (|A| E[dt])`` tokens.

python scripts/half_lives.py recipes/assets/reference_mamba2
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from training.data import read_texts
from training.scan import half_lives

BINS = (0, 10, 30, 100, 300, 1000, float("inf"))
TEXT = Path(__file__).resolve().parent.parent / "recipes" / "assets" / "text" / "heldout.jsonl.gz"


def main() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(sys.argv[1])
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text)[:512] for text in read_texts(TEXT)]
    seen: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            seen[name] = inputs[0].detach().flatten(0, -2)

        return hook

    for name, module in model.named_modules():
        if hasattr(module, "A_log"):
            module.in_proj.register_forward_pre_hook(note(name))
    with torch.inference_mode():
        model(torch.tensor([row for row in ids if len(row) == 512]), use_cache=False)
    lives = half_lives(model, seen)
    for name, row in lives.items():
        print(f"{name:<28}", "  ".join(f"{life:7.1f}" for life in row))
    every = [life for row in lives.values() for life in row]
    for low, high in pairwise(BINS):
        print(f"{low:>5} to {high:<5}: {sum(low <= life < high for life in every)} of {len(every)} heads")


if __name__ == "__main__":
    main()
