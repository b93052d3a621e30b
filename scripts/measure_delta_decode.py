#!/usr/bin/env python3
"""How fast Qwen3-Next decodes natively with states in fp32 and in low bits; random weights, few layers and experts.

    python scripts/measure_delta_decode.py [--layers 4] [--experts 64] [--batches 1 8] [--samples 5] [--out FILE]

Sizes are those of Qwen3-Next-80B-A3B but for layers and experts; speed does not depend on weights. Ways to keep states
take turns sample by sample; a sample is eight tokens of every sequence. Shown are the median of whole steps, what of
that is between the projections of delta rules (convolution, rule, gated norm; of the first thread), and the bytes of
the states of all sequences.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from llmcompress_kernels import bench
from transformers import AutoConfig

from llmcompress.durable import write_durably
from llmcompress.inference import speed
from llmcompress.inference.native import open_engine
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import attach, detach
from llmcompress.quant.spec import QuantSpec

CONFIG = Path(__file__).resolve().parents[1] / "tests" / "data" / "hub_configs" / "qwen3_next_80b_a3b.json"
POLICIES: dict[str, dict[str, Any] | None] = {
    "fp32": None,
    "H8": {"bits": 8, "codec": "dsq"},
    "H4": {"bits": 4, "codec": "dsq", "rounding": "dither"},
    "H4, R = 4": {"bits": 4, "codec": "dsq", "rounding": "dither", "window": 4},
}
TOKENS, PROMPT = 8, 16


def engines(options: argparse.Namespace, batch: int) -> dict[str, Any]:
    """One model, an engine for each way to keep its states, ``batch`` sequences in each."""
    values = json.loads(CONFIG.read_text(encoding="utf-8"))
    family = values.pop("model_type")
    values |= {"num_hidden_layers": options.layers, "num_experts": options.experts}
    model = speed.random_packed(AutoConfig.for_model(family, **values), QuantSpec(4, 64))
    layout, found = layout_from_config(model.config.to_dict()), {}
    for name, policy in POLICIES.items():
        if policy is not None:
            attach(model, layout, policy)
        found[name] = open_engine(model, slots=batch, positions=2 * PROMPT, threads=options.threads)
        detach(model, layout)
        for slot in range(batch):
            found[name].prompt(slot, torch.arange(3 + slot, 3 + slot + PROMPT).tolist())
    return found


def sample(engine: Any, batch: int) -> tuple[float, float]:
    """Seconds of a step of all sequences, and those between the projections of delta rules."""
    phases = engine.profile(torch.arange(batch) + 5, TOKENS)
    return sum(phases.values()), phases["mixer"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--samples", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    rows = []
    for batch in args.batches:
        ways = engines(args, batch)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
        for _ in range(args.samples + 1):
            for name, engine in ways.items():
                seconds[name].append(sample(engine, batch))
        for name, engine in ways.items():
            # the first warms up
            whole, rules = (statistics.median(part) for part in zip(*seconds[name][1:]))
            cache = engine.cache
            kept = cache.states.nbytes if cache.low is None else cache.low.nbytes
            rows.append({"batch": batch, "states": name, "seconds": whole, "rules": rules, "bytes": kept})
            times = f"{1e3 * whole:8.2f} ms a step, {1e3 * rules:7.2f} of them in delta rules"
            print(f"batch {batch}, {name:<10} {times}; states of {kept / 1e6:.1f} MB", flush=True)
    if args.out is not None:
        content = {
            "environment": bench.environment(args.threads), "transformers": transformers.__version__,
            "layers": args.layers, "experts": args.experts, "threads": args.threads, "rows": rows,
        }  # fmt: skip
        write_durably(args.out, (json.dumps(content, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
