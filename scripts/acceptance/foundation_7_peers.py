#!/usr/bin/env python3
"""Foundation 7: GPTQ of SmolLM2-135M and of a random tiny Mixtral beside llmcompressor, GPTQModel and auto-round.

Each peer runs in its own environment, named by its Python interpreter:

    LLMCOMPRESS_PEER_LLMCOMPRESSOR, LLMCOMPRESS_PEER_GPTQMODEL, LLMCOMPRESS_PEER_AUTO_ROUND

and LLMCOMPRESS_SMOLLM2 names the folder that scripts/smollm2_to_hf.py wrote. Every tool gets the same 128 x 512
calibration tokens and one thread; CPU seconds and peak memory are the kernel's account of the whole process.
A tool's result is kept in runs/peers/ and reused while processor and versions are the same; delete it to measure
again. Goals: at least 3x fewer CPU seconds than GPTQModel, perplexity at 4 and 3 bits not worse than the best peer's,
peak at most 1.2 GB; the tiny Mixtral likewise for time. 2 bits are reported without a goal, beside GPTQModel alone.

``llmcompress`` is GPTQ as the peers do it, on all of the tokens. ``llmcompress-targets`` is this project's option
``targets: full_precision`` on 48 windows, which costs less than GPTQ on all 128; no goal, a row beside.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from harness import ROOT, verdict
from run_all import cpu

PEERS = ROOT / "scripts" / "peers"
KEPT = ROOT / "runs" / "peers"
WORK = Path(tempfile.gettempdir()) / "llmcompress-peers"
ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
OURS = ("llmcompress", "llmcompress-targets")
TARGET_WINDOWS = 48
TOOLS = ("llmcompressor", "gptqmodel", "auto-round")
JOBS = [("smollm2", 4), ("smollm2", 3), ("smollm2", 2), ("mixtral", 4)]
SHAPE = {"smollm2": ["--n", "128", "--length", "512"], "mixtral": ["--n", "16", "--length", "256"]}


def interpreter(tool: str) -> str | None:
    """The peer's Python, if the environment names one."""
    return os.environ.get("LLMCOMPRESS_PEER_" + tool.upper().replace("-", "_"))


def account(command: list[str], log: Path) -> tuple[int, float, int]:
    """Run a command; return exit code, CPU seconds and peak bytes of that process."""
    # peers leave logs and caches in the folder they are started from
    with log.open("w") as handle:
        process = subprocess.Popen(
            command, stdout=handle, stderr=subprocess.STDOUT, env={**os.environ, **ONE_THREAD}, cwd=log.parent
        )
        _, status, usage = os.wait4(process.pid, 0)
    return os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def texts(model: Path, tokens: int) -> tuple[Path, Path]:
    """Calibration text of a little over ``tokens`` tokens and held-out text, from the shipped assets."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    found = []
    for name in ("calibration", "heldout"):
        with gzip.open(ROOT / "recipes" / "assets" / "text" / f"{name}.jsonl.gz", "rt", encoding="utf-8") as handle:
            found.append("\n\n".join(json.loads(row)["text"] for row in handle))
    ids = tokenizer(found[0]).input_ids[: tokens + 64]
    paths = (WORK / f"calibration_{tokens}.txt", WORK / "heldout.txt")
    paths[0].write_text(tokenizer.decode(ids), encoding="utf-8")
    paths[1].write_text(found[1], encoding="utf-8")
    return paths


def tiny_mixtral(smollm2: Path) -> Path:
    """Random Mixtral: hidden 512, intermediate 1024, 8 experts, 4 layers, SmolLM2's tokenizer."""
    import torch
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    folder = WORK / "mixtral"
    if not (folder / "model.safetensors").exists():
        torch.manual_seed(0)
        config = MixtralConfig(
            vocab_size=49152, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
            num_key_value_heads=4, num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=2048,
        )  # fmt: skip
        MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
        AutoTokenizer.from_pretrained(smollm2).save_pretrained(folder)
    return folder


def ours(tool: str, model: Path, calibration: Path, out: Path, bits: int, shape: list[str]) -> list[str]:
    """The command that does the same job with this project: asymmetric GPTQ, every linear and expert.

    Activations are bfloat16 where the processor multiplies tiles of it (AMX), else float32, which then is faster.
    """
    dtype = "bfloat16" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "float32"
    samples, targets = (shape[1], "own") if tool == "llmcompress" else (str(TARGET_WINDOWS), "full_precision")
    rule = f"{{match: '.', bits: {bits}, group_size: 64}}"
    return [
        sys.executable, "-m", "llmcompress", "run", "gptq_smollm2", "--quiet", "--force",
        "stages.evaluate~", "stages.export.formats=[native]", f"run.compute_dtype={dtype}",
        f"model.path={model}", f"run.dir={out}", f"stages.calibrate.source={{kind: text, path: '{calibration}'}}",
        f"stages.calibrate.samples={samples}", f"stages.calibrate.length={shape[3]}",
        f"stages.quantize.rules={{all: {rule}}}", f"stages.quantize.targets={targets}",
        # a second pass that tells how many tokens change experts: no peer measures that
        "stages.quantize.diagnose_experts=false",
    ]  # fmt: skip


def quantize(tool: str, job: str, bits: int, model: Path, data: tuple[Path, Path]) -> dict[str, Any] | None:
    """Measure one tool on one job, or reuse its kept result."""
    kept = KEPT / f"{tool}_{job}_{bits}.json"
    if kept.exists() and (row := json.loads(kept.read_text()))["cpu"] == cpu() and tool not in OURS:
        return row
    python, out = (sys.executable if tool in OURS else interpreter(tool)), WORK / f"{tool}_{job}_{bits}"
    if python is None:
        return None
    if tool in OURS:
        command, loader, folder = ours(tool, model, data[0], out, bits, SHAPE[job]), "llmcompress", out / "artifact"
    else:
        arguments = [tool, model, data[0], out, "--bits", bits, "--group", 64, *SHAPE[job]]
        command = [python, str(PEERS / "quantize.py"), *map(str, arguments)]
        loader, folder = ("gptqmodel" if tool == "gptqmodel" else "hf"), out
    code, seconds, peak = account(command, WORK / f"{tool}_{job}_{bits}.log")
    for state in out.glob("stages/*/state.json"):  # our runner resets the kernel's peak at each stage and keeps it here
        peak = max(peak, json.loads(state.read_text()).get("peak_rss_bytes") or 0)
    row = {"tool": tool, "job": job, "bits": bits, "cpu": cpu(), "exit": code, "cpu_seconds": round(seconds, 1),
           "peak_gb": round(peak / 1e9, 2), "perplexity": None}  # fmt: skip
    if code == 0 and job == "smollm2":
        config = next(iter(sorted(folder.rglob("config.json"))), folder / "config.json")
        check = [python, str(PEERS / "perplexity.py"), loader, config.parent, data[1], "--tokenizer", model]
        done = subprocess.run(list(map(str, check)), capture_output=True, text=True, env={**os.environ, **ONE_THREAD})
        if done.returncode == 0:
            row["perplexity"] = json.loads(done.stdout.strip().splitlines()[-1])["perplexity"]
        else:
            print(done.stderr[-1500:], file=sys.stderr)
    KEPT.mkdir(parents=True, exist_ok=True)
    kept.write_text(json.dumps(row) + "\n")
    return row


def shortfalls(rows: list[dict[str, Any]]) -> list[str]:
    """Goals that do not hold."""
    found = []
    by = {(r["tool"], r["job"], r["bits"]): r for r in rows}
    for job, bits in JOBS:
        own, gptqmodel = by.get(("llmcompress", job, bits)), by.get(("gptqmodel", job, bits))
        if own is None or own["exit"] != 0 or gptqmodel is None or gptqmodel["exit"] != 0:
            found.append(f"{job} {bits} bits: not measured on both sides")
            continue
        if (ratio := gptqmodel["cpu_seconds"] / own["cpu_seconds"]) < 3 and bits == 4:
            found.append(f"{job} {bits} bits: {ratio:.1f}x fewer CPU seconds than GPTQModel, goal 3x")
        best = min((by[t, job, bits]["perplexity"] or 1e30 for t in TOOLS if (t, job, bits) in by), default=1e30)
        if job == "smollm2" and bits > 2 and own["perplexity"] > best:
            found.append(f"{job} {bits} bits: perplexity {own['perplexity']} above the best peer's {best}")
        if job == "smollm2" and own["peak_gb"] > 1.2:
            found.append(f"{job} {bits} bits: peak {own['peak_gb']} GB, goal 1.2")
    return found


def main() -> None:
    smollm2 = os.environ.get("LLMCOMPRESS_SMOLLM2")
    missing = [tool for tool in TOOLS if interpreter(tool) is None]
    if smollm2 is None or len(missing) == len(TOOLS):
        verdict(False, "not measured: set LLMCOMPRESS_SMOLLM2 and LLMCOMPRESS_PEER_* (see the head of this script)")
    WORK.mkdir(exist_ok=True)
    rows = []
    for job, bits in JOBS:
        model = Path(smollm2) if job == "smollm2" else tiny_mixtral(Path(smollm2))
        data = texts(Path(smollm2), int(SHAPE[job][1]) * int(SHAPE[job][3]))
        peers = ("gptqmodel",) if bits == 2 else TOOLS
        for tool in (*(OURS if job == "smollm2" else OURS[:1]), *peers):
            if (row := quantize(tool, job, bits, model, data)) is not None:
                rows.append(row)
                print(json.dumps(row), flush=True)
    found = shortfalls(rows)
    table = "; ".join(
        f"{r['tool']} {r['job']} W{r['bits']}: {r['cpu_seconds']:.0f} CPU-s, {r['peak_gb']} GB, "
        f"perplexity {r['perplexity'] if r['exit'] == 0 else 'failed'}"
        for r in rows
    )
    verdict(not found and not missing, f"{table}. Short: {'; '.join(found) or 'nothing'}. Without: {missing or 'none'}")


if __name__ == "__main__":
    main()
