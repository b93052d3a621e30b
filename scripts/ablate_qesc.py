#!/usr/bin/env python3
"""Measure what each part of QESC contributes on a model: RTN, GPTQ, and QESC with parts switched on and off.

Every variant quantizes with the same rules and the same calibration windows; perplexity and expert-shift
rates are taken on held-out text. "closed" is the share of the perplexity gap between GPTQ and the dense
model that a variant closes.

    python scripts/ablate_qesc.py --out ablation.json
    python scripts/ablate_qesc.py --bits 3 --seeds 0 1 2 --only gptq qesc "qesc, full-precision targets"
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

PAPER: dict[str, Any] = {"router": {"k": "auto"}}
TARGETS: dict[str, Any] = {"targets": "full_precision"}
RESIDUAL: dict[str, Any] = {"targets": "residual_stream"}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rtn": ("rtn", {}),
    "gptq": ("gptq", {}),
    "qesc": ("qesc", PAPER),
    "qesc, all experts in the loss": ("qesc", {"router": {"off_topk_weight": 1.0}}),
    "qesc, no guard": ("qesc", {"router": {"holdout": 0.0, "guard": False}}),
    "qesc, adam": ("qesc", {"router": {"solver": "adam"}}),
    "full-precision targets alone": ("qesc", {**TARGETS, "router": {"calibrate": False}}),
    "qesc, full-precision targets": ("qesc", TARGETS),
    "residual-stream targets alone": ("qesc", {**RESIDUAL, "router": {"calibrate": False}}),
    "qesc, residual-stream targets": ("qesc", RESIDUAL),
}


def rules(bits: int, group: int) -> dict[str, Any]:
    """4-bit attention, experts of the asked width."""
    return {
        "attention": {"role": "attention", "bits": 4, "group_size": group},
        "experts": {"role": ["experts", "shared_experts", "mlp"], "bits": bits, "group_size": group},
    }


class Bench:
    """One model with its held-out text; builds and measures variants."""

    def __init__(self, args: argparse.Namespace) -> None:
        import torch

        from llmcompress.data.documents import read
        from llmcompress.data.sources import JsonlSource
        from llmcompress.evaluation.perplexity import perplexity, tokenize
        from llmcompress.models.handle import ModelHandle

        self.args = args
        self.handle = ModelHandle.open(args.model, "float32")
        self.tokenizer = self.handle.tokenizer()
        documents = read(JsonlSource(kind="jsonl", path=args.heldout))
        self.text = tokenize("\n\n".join(documents.texts), self.tokenizer).first(args.tokens)
        count = len(self.text.tokens) // args.length
        self.windows = self.text.tokens[: count * args.length].view(count, args.length)
        self.dense = self.handle.dense_model(torch.float32)
        self.dense_perplexity = perplexity(self.dense, self.text, args.length).perplexity

    def measure(self, name: str, seed: int) -> dict[str, Any]:
        """Quantize with one variant and measure the result."""
        import torch

        from llmcompress.data.calibration import build
        from llmcompress.data.sources import JsonlSource
        from llmcompress.evaluation.expert_shift import measure_shift
        from llmcompress.evaluation.perplexity import perplexity
        from llmcompress.models.assemble import compressed_model
        from llmcompress.stages import stage_types
        from llmcompress.stages.state import RunContext, RunState

        args = self.args
        kind, fields = VARIANTS[name]
        source = JsonlSource(kind="jsonl", path=args.calibration)
        calibration = build(source, self.tokenizer, args.samples, args.length, seed)
        stage = stage_types()[kind]
        config = stage.Config.model_validate({"type": kind, "rules": rules(args.bits, args.group), **fields})
        with tempfile.TemporaryDirectory(prefix="llmcompress-ablate-") as folder:
            root = Path(folder)
            state = RunState(model=self.handle, calibration=calibration)
            started = time.time()
            stage("quantize", config).run(
                state, RunContext(root, "quantize", root, seed, "cpu", "float32", {}, lambda event: None)
            )
            seconds = time.time() - started
            assert state.packed is not None
            model = compressed_model(self.handle, state.packed, {}, dtype=torch.float32)
            value = perplexity(model, self.text, args.length).perplexity
            shift = measure_shift(self.dense, model, self.handle.layout, self.windows)
        return {
            "variant": name,
            "seed": seed,
            "bits": args.bits,
            "perplexity": value,
            "seconds": round(seconds, 1),
            "cr_any": [round(row["cr_any"], 4) for row in shift],
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="asset:reference_moe")
    parser.add_argument("--calibration", default="asset:text/calibration.jsonl.gz")
    parser.add_argument("--heldout", default="asset:text/heldout.jsonl.gz")
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tokens", type=int, help="use only this many held-out tokens")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    bench = Bench(args)
    print(f"dense {bench.dense_perplexity:.3f} on {len(bench.text.tokens)} tokens", flush=True)
    rows = []
    for name in args.only:
        mine = [bench.measure(name, seed) for seed in args.seeds]
        rows += mine
        gptq = {row["seed"]: row["perplexity"] for row in rows if row["variant"] == "gptq"}
        for row in mine:
            if row["seed"] in gptq and name != "gptq":
                gap = gptq[row["seed"]] - bench.dense_perplexity
                row["closed"] = round((gptq[row["seed"]] - row["perplexity"]) / gap, 4)
        closed = [row["closed"] for row in mine if "closed" in row]
        mean = statistics.mean(row["perplexity"] for row in mine)
        share = f"  closed {min(closed):+.0%} to {max(closed):+.0%}" if closed else ""
        rates = [statistics.mean(column) for column in zip(*(row["cr_any"] for row in mine), strict=True)]
        print(f"{name:32s} perplexity {mean:.3f}{share}  cr_any {' '.join(f'{r:.3f}' for r in rates)}", flush=True)
    if args.out is not None:
        args.out.write_text(json.dumps({"dense": bench.dense_perplexity, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
