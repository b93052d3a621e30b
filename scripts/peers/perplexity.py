#!/usr/bin/env python3
"""Perplexity of a folder on a text, by the same arithmetic for every tool; run it with the tool's interpreter.

    PEER_PYTHON scripts/peers/perplexity.py hf|gptqmodel|llmcompress FOLDER TEXT [--tokenizer FOLDER]

``llmcompress`` folders need ``import llmcompress.hf`` before transformers can read them.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def load(args: argparse.Namespace):
    """Load the folder the way its tool documents."""
    if args.loader == "gptqmodel":
        from gptqmodel import GPTQModel

        return GPTQModel.load(args.folder, device="cpu").model
    if args.loader == "llmcompress":
        import llmcompress.hf  # noqa: F401 - registers the format
    return AutoModelForCausalLM.from_pretrained(args.folder, dtype=torch.bfloat16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("loader", choices=["hf", "gptqmodel", "llmcompress"])
    parser.add_argument("folder")
    parser.add_argument("text")
    parser.add_argument("--tokenizer")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.folder)
    model = load(args).eval()
    ids = tokenizer(Path(args.text).read_text(encoding="utf-8"), return_tensors="pt").input_ids[0][: args.tokens]
    total, count = 0.0, 0
    with torch.no_grad():
        for row in ids[: len(ids) // args.length * args.length].view(-1, 1, args.length):
            logits = model(row).logits[0, :-1].float()
            total += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
            count += args.length - 1
    print(json.dumps({"perplexity": round(math.exp(total / count), 4), "tokens": count}))


if __name__ == "__main__":
    main()
