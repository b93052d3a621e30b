#!/usr/bin/env python3
"""How fast families decode natively and through transformers' modules, with random weights and few layers.

    python scripts/measure_families.py --families gemma2 phi3 --layers 4 [--bits 4] [--case "prefill 512"] [--out FILE]
    python scripts/measure_families.py --families tests/data/hub_configs/nemotron3_nano_30b.json --set KEY=JSON

Sizes are transformers' defaults of a family, those of a released model (Gemma-2-2B, Phi-3-mini, …), or those of a
``config.json``. Weights are random: speed does not depend on them. Three ways alternate sample by sample: the native
engine, transformers' modules on the same packed weights, and transformers on bf16 ones (not with ``--packed``, which
saves most of the time). Embedding and head have their full size, whatever the number of layers. Cases measured before
stay in the file, with the commit, changed sizes and CPU of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from llmcompress_kernels import bench
from transformers import AutoConfig

from llmcompress.inference import speed
from llmcompress.inference.native import open_engine
from llmcompress.quant.spec import QuantSpec

CASES = (speed.Case("decode", 16, 1, 4), speed.Case("decode", 512, 1, 4), speed.Case("prefill", 512))


def config_of(family: str, options: argparse.Namespace) -> Any:
    """Sizes of a family or a file, with fewer layers."""
    path, values = Path(family), {}
    if path.suffix == ".json":
        values = json.loads(path.read_text(encoding="utf-8"))
        family = values.pop("model_type")
    values |= {"num_hidden_layers": options.layers}
    for key in ("layer_types", "layers_block_type"):
        if key in values:
            values[key] = values[key][: options.layers]
    return AutoConfig.for_model(family, **{**values, **dict(options.set or ())})


def assignment(text: str) -> tuple[str, Any]:
    """``key=JSON`` of the command line."""
    key, _, value = text.partition("=")
    return key, json.loads(value)


def candidates_of(family: str, options: argparse.Namespace) -> dict[str, speed.Candidate]:
    """The ways to run a family."""
    dtype = getattr(torch, options.dtype)
    packed = speed.random_packed(config_of(family, options), QuantSpec(options.bits, 64), dtype)
    found = {"native": speed.native(open_engine(packed)), "modules": speed.transformers(packed)}
    return found if options.packed else {**found, "bf16": speed.transformers(speed.dense_twin(packed))}


def commit() -> str:
    """The checkout's commit, with a plus where code differs from it."""

    def told(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=Path(__file__).parents[1], capture_output=True, text=True)
        return found.stdout.strip()

    return told("rev-parse", "--short", "HEAD") + "+" * bool(told("status", "--porcelain", "llmcompress", "kernels"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--families", nargs="+", default=["gemma2"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--set", action="append", type=assignment, metavar="KEY=JSON", help="of the config")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--case", action="append", help="only this one; may be repeated")
    parser.add_argument("--packed", action="store_true", help="leave bf16 out")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the packed model")
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
    measured = {"commit": commit(), "layers": options.layers, "dtype": options.dtype, "set": dict(options.set or ())}
    measured |= {"cpu": told["environment"]["cpu"], "isa": told["environment"]["isa"]}
    for given in options.families:
        family = Path(given).stem
        candidates = candidates_of(given, options)
        for case in CASES:
            if options.case and case.name not in options.case:
                continue
            found = speed.measure(candidates, [case], options.rounds, options.budget, options.threads)
            found = [row | measured for row in found]
            for row in found:
                rate = row["tokens_per_second"]
                print(f"{family:<12} {row['case']:<24} {row['candidate']:<8} {rate:>8.1f} tokens/s", flush=True)
            key = case.name, options.dtype
            kept = [r for r in told["families"].get(family, []) if (r["case"], r.get("dtype", "bfloat16")) != key]
            told["families"][family] = kept + found
            if options.out is not None:
                options.out.write_text(json.dumps(told, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
