#!/usr/bin/env python3
"""Quantize one HF folder with one peer tool, weight-only, on CPU; run it with that tool's own interpreter.

    PEER_PYTHON scripts/peers/quantize.py llmcompressor|gptqmodel|auto-round MODEL CALIB.txt OUT --bits 4 --group 64

Calibration: the first ``--n`` x ``--length`` tokens of the text, the same for every tool. Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path


def calibration(args: argparse.Namespace):
    """Token windows ``[n, length]`` from the start of the text."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    text = Path(args.text).read_text(encoding="utf-8")
    ids = tokenizer(text, return_tensors="pt").input_ids[0][: args.n * args.length]
    return tokenizer, ids.view(args.n, args.length)


def llmcompressor(args: argparse.Namespace) -> None:
    """GPTQ, symmetric groups (what its compressed-tensors output can serve)."""
    import torch
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import GPTQModifier
    from transformers import AutoModelForCausalLM

    tokenizer, ids = calibration(args)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    data = Dataset.from_dict({"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()})
    weights = {"num_bits": args.bits, "type": "int", "symmetric": True, "strategy": "group", "group_size": args.group}
    recipe = GPTQModifier(
        config_groups={"all": {"targets": ["Linear"], "weights": weights}},
        ignore=["lm_head", "re:.*mlp[.]gate$", "re:.*block_sparse_moe[.]gate$"],
        batched_quantization=args.batched or "auto",
    )
    oneshot(
        model=model, dataset=data, recipe=recipe, max_seq_length=args.length, num_calibration_samples=args.n,
        moe_calibrate_all_experts=not args.routed,
    )  # fmt: skip
    model.save_pretrained(args.out, save_compressed=True)
    tokenizer.save_pretrained(args.out)


def gptqmodel(args: argparse.Namespace) -> None:
    """GPTQ with its defaults."""
    cores = os.cpu_count() or 1
    if cores < 4:  # its loader pool wants more workers than a small machine has, and dies
        os.cpu_count = lambda: 4
    from gptqmodel import GPTQModel, QuantizeConfig

    _, ids = calibration(args)
    rows = [{"input_ids": row.tolist(), "attention_mask": [1] * args.length} for row in ids]
    model = GPTQModel.load(args.model, QuantizeConfig(bits=args.bits, group_size=args.group, device="cpu"))
    model.quantize(rows, batch_size=4)
    model.save(args.out)


def auto_round(args: argparse.Namespace) -> None:
    """Signed-gradient rounding with ``--iters`` steps; 0 is its quick mode."""
    import torch
    from auto_round import AutoRound
    from transformers import AutoModelForCausalLM

    tokenizer, ids = calibration(args)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16)
    AutoRound(
        model, tokenizer, bits=args.bits, group_size=args.group, sym=True, iters=args.iters, nsamples=args.n,
        seqlen=args.length, batch_size=8, dataset=[row[None] for row in ids], device_map="cpu",
    ).quantize_and_save(args.out, format="auto_round")  # fmt: skip


TOOLS = {"llmcompressor": llmcompressor, "gptqmodel": gptqmodel, "auto-round": auto_round}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tool", choices=TOOLS)
    parser.add_argument("model")
    parser.add_argument("text")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--n", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--iters", type=int, default=0)
    parser.add_argument(
        "--routed", action="store_true",
        help="llmcompressor: calibrate experts on the tokens routed to them, not on all",
    )  # fmt: skip
    parser.add_argument("--batched", type=int, default=0, help="llmcompressor: this many equal weights in one solve")
    args = parser.parse_args()
    began = time.time()
    TOOLS[args.tool](args)
    size = sum(p.stat().st_size for p in Path(args.out).rglob("*.safetensors"))
    from importlib.metadata import version

    row = {"tool": args.tool, "version": version(args.tool), "torch": version("torch"), "bits": args.bits}
    row |= {"group": args.group, "wall_s": round(time.time() - began, 1), "file_mb": round(size / 1e6, 1)}
    print(json.dumps(row))


if __name__ == "__main__":
    main()
