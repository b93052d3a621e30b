#!/usr/bin/env python3
"""How fast a model with latent attention decodes natively, and by transformers' modules with the same packed weights.

DeepSeek-V2-Lite's own sizes, cut to a few layers, with random codes. Engines take turns
(`bench model`'s protocol). Beside the speeds: bytes that a token leaves in the cache of the whole model, and what it
would leave with every head's keys and values in the place of latents.

    python scripts/measure_latent_decode.py [--layers 4] [--bits 4] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

from llmcompress.cli.bench import machine
from llmcompress.inference import speed
from llmcompress.inference.native import open_engine
from llmcompress.quant.spec import QuantSpec

CONFIG = Path(__file__).resolve().parent.parent / "tests/data/hub_configs/deepseek_v2_lite.json"
# tokens before, sequences
DECODE = ((16, 1), (512, 1), (2048, 1), (16, 8))
PROMPT, STEPS, BUDGET = 512, 8, 8.0


def random_model(layers: int, bits: int) -> Any:
    """DeepSeek-V2-Lite in bfloat16, fewer layers, random weights, those of ``bits`` bits in groups of 64."""
    from transformers import AutoConfig

    values = json.loads(CONFIG.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(values.pop("model_type"), **{**values, "num_hidden_layers": layers})
    return speed.random_packed(config, QuantSpec(bits, 64, symmetric=True))


def cache_bytes(config: Any, layers: int, size: int = 2) -> dict[str, int]:
    """Bytes of a token in all layers: latents, and keys and values of every head."""
    heads = config.num_attention_heads * (config.qk_nope_head_dim + config.qk_rope_head_dim + config.v_head_dim)
    return {
        "latents": size * layers * (config.kv_lora_rank + config.qk_rope_head_dim),
        "keys and values": size * layers * heads,
    }


def profile(engine: Any, context: int) -> dict[str, float]:
    """Seconds of a token by phase of the native step."""
    engine.lengths = [context] * engine.slots
    found: dict[str, float] = engine.profile(torch.tensor([7]))
    return found


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of 27; the first is dense")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="write what was found")
    options = parser.parse_args()
    model = random_model(options.layers, options.bits)
    engine = open_engine(model)
    candidates = {"native": speed.native(engine), "transformers' modules": speed.transformers(model)}
    cases = [speed.Case("prefill", PROMPT)]
    cases += [speed.Case("decode", context, batch, STEPS) for context, batch in DECODE]
    with torch.inference_mode():
        rows = speed.measure(candidates, cases, options.repeats, BUDGET, torch.get_num_threads())
    for row in rows:
        print(f"{row['case']:28} {row['candidate']:24} {row['tokens_per_second']:9.1f} tokens/s")
    phases = {context: profile(engine, context) for context, batch in DECODE if batch == 1}
    for context, parts in phases.items():
        told = ", ".join(f"{name} {1e3 * seconds:.2f}" for name, seconds in parts.items() if seconds > 0)
        print(f"native, one token after {context}, ms: {told}")
    kept = cache_bytes(model.config, 27)
    print(", ".join(f"{name}: {count} bytes a token" for name, count in kept.items()))
    if options.json is not None:
        found = {"machine": machine(), "layers": options.layers, "bits": options.bits, "cache": kept}
        found |= {"rows": rows, "phases": phases}
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
