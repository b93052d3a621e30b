#!/usr/bin/env python3
"""How fast dense families decode natively and through transformers' modules, with random weights and few layers.

    python scripts/measure_families.py --families gemma2 phi3 --layers 4 [--bits 4] [--case "prefill 512"] [--out FILE]

Sizes are transformers' defaults of a family, those of a released model (Gemma-2-2B, Phi-3-mini, …). Weights are random
and rounded to nearest: speed does not depend on them. Three ways alternate sample by sample: the native engine,
transformers' modules on the same packed weights, and transformers on bf16 ones. Embedding and head have their full
size, whatever the number of layers. Cases measured before stay in the file.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompress_kernels import bench
from transformers import AutoConfig

from llmcompress.inference import speed
from llmcompress.inference.engine import Engine
from llmcompress.quant.spec import QuantSpec

CASES = (speed.Case("decode", 16, 1, 4), speed.Case("decode", 512, 1, 4), speed.Case("prefill", 512))


def candidates_of(family: str, options: argparse.Namespace) -> dict[str, speed.Candidate]:
    """The three ways to run a family."""
    config = AutoConfig.for_model(family, num_hidden_layers=options.layers)
    packed = speed.rounded(speed.random_model(config), QuantSpec(options.bits, 64))
    return {
        "native": speed.native(Engine(packed)),
        "modules": speed.transformers(packed),
        "bf16": speed.transformers(speed.dense_twin(packed)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=["gemma2"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--case", action="append", help="only this one; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds per case")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    told: dict[str, Any] = {
        "environment": bench.environment(options.threads), "transformers": version("transformers"),
        "layers": options.layers, "bits": options.bits, "families": {},
    }  # fmt: skip
    if options.out is not None and options.out.is_file():
        told["families"] = json.loads(options.out.read_text())["families"]
    for family in options.families:
        candidates = candidates_of(family, options)
        for case in CASES:
            if options.case and case.name not in options.case:
                continue
            found = speed.measure(candidates, [case], options.rounds, options.budget, options.threads)
            for row in found:
                rate = row["tokens_per_second"]
                print(f"{family:<12} {row['case']:<24} {row['candidate']:<8} {rate:>8.1f} tokens/s", flush=True)
            kept = [row for row in told["families"].get(family, []) if row["case"] != case.name]
            told["families"][family] = kept + found
            if options.out is not None:
                options.out.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
