#!/usr/bin/env python3
"""Scale 3: GPTQ+QESC of two MoE models beside llmcompressor, GPTQModel and auto-round, and who skips experts.

``reference`` is the shipped MoE (6 layers of 16 experts). ``olmoe`` has OLMoE-1B-7B's own layout and vocabulary (64
experts, 8 per token, hidden 2048, expert width 1024), random weights and 2 of its 16 layers: 1.05 B parameters
(``--layers 1``: 0.63 B, for the same work per layer in half the time, which is told as a shortfall). Every tool gets
the same calibration tokens, 4 bits, the same groups, one thread, and its own environment; the environment variables
that name these are in foundation_7_peers.py. Times are of the whole process, from its start to the written artifact.

    python scripts/acceptance/scale_3_peers.py                         everything; peers' kept rows are used again
    python scripts/acceptance/scale_3_peers.py --job olmoe --tool gptqmodel       measure one row, judge nothing

A peer is stopped after 3.2 times our CPU seconds: that it is slower than the goal asks for is then known, how slow is
not, and which experts it quantizes is read from the smaller job. A row stays in runs/peers/ while the processor is the
same. llmcompressor runs in its faster settings: experts get the tokens that the router sends them (by default it sends
every token to every expert) and equal weights are solved in batches. auto-round runs without its optimization
(``--iters 0``): that is rounding, so it is listed but is no measure for a calibrated method. Goal: at least 3x faster
than the fastest calibrated peer that quantizes every expert soundly (scripts/acceptance/expert_artifacts.py reads the
artifacts). With one thread, CPU time is wall time less waiting; it is what is judged, because it can be measured beside
other work, and wall time is told where every tool had a core for itself.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import Any

import foundation_7_peers
import yaml
from expert_artifacts import artifact_folder, rounded_instead, survey
from foundation_5_plan import OLMOE
from foundation_7_peers import KEPT, PEERS, TOOLS, account, interpreter
from harness import ROOT, busy_seconds, keep_plan, verdict
from run_all import commit, cpu

WORK = Path(tempfile.gettempdir()) / "llmcompress-scale-peers"
TABLE = ROOT / "benchmarks" / "scale_peers.json"
REFERENCE = ROOT / "recipes" / "assets" / "reference_moe"
OURS, GOAL, ENOUGH, BITS = "llmcompress", 3.0, 3.2, 4
CORES = len(os.sched_getaffinity(0))
CALIBRATED = ("llmcompressor", "gptqmodel")
JOBS: dict[str, dict[str, int]] = {
    # the quickstart's calibration
    "reference": {"group": 64, "n": 128, "length": 512, "batched": 16},
    # 8 of 64 experts per token: 512 tokens per expert and layer
    "olmoe": {"group": 128, "n": 16, "length": 256, "batched": 8, "layers": 2},
}
SHAPE = {**OLMOE, "hidden_size": 2048, "intermediate_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 16,
         "max_position_embeddings": 4096, "bos_token_id": 1, "eos_token_id": 2,
         "pad_token_id": 0}  # fmt: skip


def make_olmoe(folder: str, layers: int) -> None:
    """Write the random model; in a process of its own, whose memory is then free."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    values = {**SHAPE, "num_hidden_layers": layers}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(REFERENCE / name, Path(folder) / name)


def model_of(job: str) -> Path:
    """Folder of a job's model."""
    if job == "reference":
        return REFERENCE
    layers = str(JOBS[job]["layers"])
    folder = WORK / f"{job}_{layers}"
    if not (folder / "tokenizer_config.json").exists():
        subprocess.run([sys.executable, __file__, "--make", folder, "--layers", layers], check=True)
    return folder


def recipe(job: str, model: Path, calibration: Path, out: Path) -> Path:
    """Ours: QESC (GPTQ of everything, routers calibrated) on the same tokens, native artifact, no evaluation."""
    shape = JOBS[job]
    rule = {"match": ".", "bits": BITS, "group_size": shape["group"]}
    # bfloat16 where the processor multiplies tiles of it (AMX); elsewhere float32 is faster
    dtype = "bfloat16" if "amx_bf16" in Path("/proc/cpuinfo").read_text() else "float32"
    content = {
        "version": 1, "name": f"scale_{job}", "model": {"path": str(model)},
        "run": {"dir": str(out), "device": "cpu", "threads": 1, "compute_dtype": dtype},
        "stages": {
            "load": {"type": "load"},
            "calibrate": {
                "type": "calibrate", "samples": shape["n"], "length": shape["length"],
                "source": {"kind": "text", "path": str(calibration)},
            },
            # a second pass that tells how many tokens change experts: no peer measures that
            "quantize": {"type": "qesc", "rules": {"all": rule}, "diagnose_experts": False},
            "export": {"type": "export", "formats": ["native"]},
        },
    }  # fmt: skip
    path = WORK / f"{job}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def command(tool: str, job: str, model: Path, calibration: Path, out: Path) -> list[str] | None:
    """What measures a tool; None where its environment is not named."""
    if tool == OURS:
        path = recipe(job, model, calibration, out)
        return [sys.executable, "-m", "llmcompress", "run", str(path), "--quiet", "--force"]
    if (python := interpreter(tool)) is None:
        return None
    shape = JOBS[job]
    words = [PEERS / "quantize.py", tool, model, calibration, out, "--bits", BITS, "--group", shape["group"]]
    words += ["--n", shape["n"], "--length", shape["length"]]
    words += ["--routed", "--batched", shape["batched"]] if tool == "llmcompressor" else []
    return [python, *map(str, words)]


def kept_row(tool: str, job: str) -> dict[str, Any] | None:
    """The row that was measured on this processor for this job, if there is one."""
    path = KEPT / f"scale_{tool}_{job}.json"
    row = json.loads(path.read_text()) if path.exists() else None
    return row if row and row["cpu"] == cpu() and row["shape"] == JOBS[job] else None


def measure(tool: str, job: str, limit: float | None) -> dict[str, Any] | None:
    """Run one tool on one job, for this many CPU seconds at most, look at what it wrote, keep the row."""
    WORK.mkdir(exist_ok=True)
    foundation_7_peers.WORK.mkdir(exist_ok=True)
    model, out, log = model_of(job), WORK / f"{tool}_{job}", WORK / f"{tool}_{job}.log"
    calibration, _ = foundation_7_peers.texts(model, JOBS[job]["n"] * JOBS[job]["length"])
    if (words := command(tool, job, model, calibration, out)) is None:
        return None
    shutil.rmtree(out, ignore_errors=True)
    if limit is not None:
        # a soft limit below the hard one: at the hard one the kernel kills, which looks like any other failure
        words = ["prlimit", f"--cpu={ceil(limit)}:{ceil(limit) + 30}", *words]
    began, busy = time.perf_counter(), busy_seconds()
    code, seconds, peak = account(words, log)
    wall = time.perf_counter() - began
    others = (busy_seconds() - busy - seconds) / wall
    for state in out.glob("stages/*/state.json"):  # our runner resets the kernel's peak at each stage and keeps it here
        peak = max(peak, json.loads(state.read_text()).get("peak_rss_bytes") or 0)
    said = log.read_text(errors="replace")
    row: dict[str, Any] = {
        "tool": tool, "job": job, "version": tool_version(tool, said), "cpu": cpu(), "shape": JOBS[job], "exit": code,
        "wall_s": round(wall, 1), "cpu_s": round(seconds, 1), "peak_gb": round(peak / 1e9, 2),
        "others": round(others, 2),
    }  # fmt: skip
    if code == 0 and tool == OURS:
        keep_plan(f"scale_3_{job}", out, [WORK / f"{job}.yaml"], peak=peak, others=others)
    if code == 0:
        row |= {"experts": survey(artifact_folder(out), model, BITS, JOBS[job]["group"])}
        row |= {"rounded": rounded_instead(out, said)}
    elif code == -signal.SIGXCPU:
        row["stopped"] = True
    else:
        row["error"] = next((line for line in reversed(said.splitlines()) if line.strip()), "")[:300]
    KEPT.mkdir(parents=True, exist_ok=True)
    (KEPT / f"scale_{tool}_{job}.json").write_text(json.dumps(row) + "\n")
    return row


def tool_version(tool: str, said: str) -> str:
    """Version of a tool and of its torch; a peer prints its own at its end."""
    if tool == OURS:
        return f"{version('llmcompress')} ({commit()}), torch {version('torch')}"
    rows = [line for line in said.splitlines() if line.startswith('{"tool"')]
    found = json.loads(rows[-1]) if rows else {"version": "unknown", "torch": "unknown"}
    return f"{found['version']}, torch {found['torch']}"


def sound(row: dict[str, Any]) -> bool:
    """Whether a tool ended, and every expert projection is in the artifact, quantized and still the model's."""
    found = row.get("experts") or {}
    return row["exit"] == 0 and found.get("quantized") == found.get("expected") and found.get("unsound") == 0


def shortfalls(job: str, rows: list[dict[str, Any]]) -> tuple[str, list[str]]:
    """How much faster we are on a job, and what does not hold."""
    own = next((row for row in rows if row["tool"] == OURS), None)
    # of a peer that was stopped it is known that it takes longer; which experts it quantizes, the smaller job tells
    others = [row for row in rows if row["tool"] in CALIBRATED and (sound(row) or row.get("stopped"))]
    if own is None or not others:
        return f"{job}: not measured on both sides", [f"{job}: not measured on both sides"]
    found = [] if sound(own) else [f"{job}: our own artifact is not complete"]
    fastest = min(others, key=lambda row: row["cpu_s"])
    ratio = fastest["cpu_s"] / own["cpu_s"]
    if ratio < GOAL:
        found.append(f"{job}: {ratio:.1f}x, goal {GOAL:.0f}x")
    more = "more than " if fastest.get("stopped") else ""
    figure = f"{job}: {more}{ratio:.1f}x fewer CPU seconds than {fastest['tool']}"
    # with one thread on a core of its own, wall time is CPU time and waiting for the disk
    if max(row["others"] for row in (own, *others)) <= CORES - 1 and not any(row.get("stopped") for row in others):
        quickest = min(others, key=lambda row: row["wall_s"])
        figure += f", {quickest['wall_s'] / own['wall_s']:.1f}x less wall time than {quickest['tool']}"
    return figure, found


def told(row: dict[str, Any]) -> str:
    """One row in words."""
    if row.get("stopped"):
        return f"{row['tool']} {row['job']}: stopped after {row['cpu_s']:.0f} CPU-s"
    if row["exit"] != 0:
        return f"{row['tool']} cannot do {row['job']}: {row['error']}"
    found = row["experts"]
    skipped = "" if sound(row) else f", {found['dense']} dense, {found['missing']} missing, {found['unsound']} unsound"
    rounded = f", {row['rounded']} of them rounded only" if row["rounded"] else ""
    return (f"{row['tool']} {row['job']}: {row['wall_s']:.0f} s, {row['cpu_s']:.0f} CPU-s, {row['peak_gb']} GB, "
            f"{found['quantized']} of {found['expected']} expert projections{skipped}{rounded}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs="*", choices=JOBS, default=list(JOBS))
    parser.add_argument("--tool", nargs="*", choices=(OURS, *TOOLS), help="measure these, judge nothing")
    parser.add_argument("--layers", type=int, default=2, help="of the random OLMoE; 2 are 1.05 B parameters")
    parser.add_argument("--limit", type=float, help="with --tool: CPU seconds after which it is stopped")
    parser.add_argument("--make", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_olmoe(options.make, options.layers)
        return
    JOBS["olmoe"]["layers"] = options.layers
    if options.tool:
        for job in options.job:
            for tool in options.tool:
                print(json.dumps(measure(tool, job, options.limit)), flush=True)
        return
    missing = [tool for tool in TOOLS if interpreter(tool) is None and not all(kept_row(tool, job) for job in JOBS)]
    rows, figures, found = [], [], []
    for job in options.job:
        own: list[dict[str, Any]] = []
        for tool in (OURS, *TOOLS):
            limit = None if tool == OURS else ENOUGH * own[0]["cpu_s"]
            row = kept_row(tool, job) or measure(tool, job, limit)
            if row is not None:
                own.append(row)
                print(json.dumps(row), flush=True)
        figure, short = shortfalls(job, own)
        short += ["olmoe: 0.63 B parameters, the line asks for 1 B"] if job == "olmoe" and options.layers < 2 else []
        rows, figures, found = rows + own, [*figures, figure], found + short
    found += [f"{job}: not measured" for job in JOBS if job not in options.job]
    machine = f"{cpu()}, one thread per tool"
    TABLE.write_text(json.dumps({"machine": machine, "bits": BITS, "jobs": JOBS, "rows": rows}, indent=1) + "\n")
    skipping = sorted({f"{row['tool']} ({row['job']})" for row in rows if not sound(row) and not row.get("stopped")})
    tail = f"Skips experts: {', '.join(skipping) or 'none'}. Short: {'; '.join(found) or 'nothing'}. "
    table = "; ".join(told(row) for row in rows)
    verdict(
        not found and not missing,
        f"{'; '.join(figures)}. {table}. {tail}Without: {', '.join(missing) or 'none'}",
    )


if __name__ == "__main__":
    main()
