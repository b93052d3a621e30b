#!/usr/bin/env python3
"""Measure what ``llmcompress plan --cluster`` needs to know about a machine, and how well it then predicts.

Rates of one process are taken at several widths with one thread: forward passes of random Mixtral blocks, sums of
second moments, GPTQ solves. Then a recipe is run on 1, 2 and 4 processes. What passes before the first block is taken
from the runs on 1 and 2; the predicted time and memory of the whole quantizing stage are held against the measured
ones, and the errors go into the file. Where processes are more than cores they share them, and the prediction for that
run is stretched accordingly: a cluster has a core, or a GPU, for each.

    python scripts/measure_cluster_rates.py --out rates.json                  both
    python scripts/measure_cluster_rates.py --out rates.json --keep           check rates that the file holds

With ``--device cuda`` the matrix work is measured on the GPU, in bfloat16 where the engine uses it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from llmcompress.algorithms.gptq import GptqOptions, round_to_nearest, solve
from llmcompress.algorithms.hessian import Gram
from llmcompress.models import sizes
from llmcompress.models.handle import ModelHandle
from llmcompress.models.walker import Walker
from llmcompress.pipeline.cluster import Rates, predict
from llmcompress.quant.codecs import int_group
from llmcompress.quant.spec import QuantSpec
from llmcompress.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "recipes" / "assets" / "reference_moe"
TOKENS, LINK_BYTES, MESSAGES = 2048, 64 << 20, 200
WIDTHS = (128, 256, 512, 1024, 2048, 4096)
HIDDEN = (1024, 2048)
# what is run to check the prediction: sums in shards and experts one at a time, whatever the number of processes
CHECK = ("smoke/eac_moe_tiny", "stages.calibrate.samples=32", "stages.calibrate.length=512",
         "stages.quantize.targets=own", "run.deterministic=true", "run.threads=1")  # fmt: skip


def seconds(act: Callable[[], Any], device: str = "cpu", least: float = 0.3) -> float:
    """Mean time of a call, after one for warming up."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    act()
    wait()
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < least:
        act()
        wait()
        count += 1
    return spent / count


def matrix_rates(device: str) -> dict[str, list[tuple[int, float]]]:
    """Hessians and solves at several widths, one matrix at a time as several processes do it."""
    generator = torch.Generator().manual_seed(0)
    spec, options = QuantSpec(3, 64), GptqOptions(act_order="groups", refit=True)
    found: dict[str, list[tuple[int, float]]] = {"hessian": [], "solve": []}
    for width in WIDTHS:
        x = torch.randn(512, width, generator=generator).to(device)
        w = torch.randn(1, width, width, generator=generator).to(device)
        gram = Gram(1, width, device)
        found["hessian"].append((width, 2.0 * 512 * width**2 / seconds(partial(gram.add, x), device)))
        hessian = gram.hessian()
        hessian.diagonal(dim1=-2, dim2=-1).add_(1.0)
        found["solve"].append((width, 2.0 * width**3 / seconds(partial(solve, w, hessian, spec, options), device)))
    return found


def forward_rate(folder: Path, device: str) -> tuple[int, float, float]:
    """Hidden size, operations per second of a block's forward pass, and bytes per second of reading it."""
    handle = ModelHandle.open(str(folder))
    layout, block = handle.layout, handle.layout.blocks[0]
    generator = torch.Generator().manual_seed(0)
    model = handle.skeleton(torch.bfloat16 if device == "cuda" else torch.float32)
    tokens = torch.randint(0, layout.vocab, (TOKENS // 256, 256), generator=generator)
    walker = Walker(model, tokens, device)
    hidden = walker.embed([block.name for block in layout.blocks])
    handle.load_block(model, 0).to(device)
    work = sizes.forward_flops(layout, TOKENS, 256) / len(layout.blocks)
    forward = work / seconds(lambda: walker.forward(block, hidden.clone()), device)

    def read() -> None:
        for view in block.tensors():
            handle.checkpoint.tensor(view.name)

    nbytes = sizes.block_parameters(block) * handle.checkpoint.dtype.itemsize
    return layout.hidden, forward, nbytes / seconds(read)


def compute_rates(folder: Path, device: str) -> dict[str, Any]:
    """Forward passes, Hessians, solves, rounding, reading."""
    found = [forward_rate(REFERENCE, device)]
    for hidden in HIDDEN:
        model = folder / str(hidden)
        words = [model, "--hidden", hidden, "--intermediate", 2 * hidden, "--experts", 8, "--gigabytes", 0.01]
        subprocess.run([sys.executable, ROOT / "scripts" / "make_large_model.py", *map(str, words)], check=True)
        found.append(forward_rate(model, device))
    w = torch.randn(1, 1024, 1024, generator=torch.Generator().manual_seed(0)).to(device)
    spec = QuantSpec(3, 64)

    def rounded() -> None:
        int_group.decode(int_group.encode(*round_to_nearest(w, spec, "mse"), spec))

    return {
        "forward": [(hidden, rate) for hidden, rate, _ in found], "read": found[-1][2],
        "weights": w.numel() / seconds(rounded, device), **matrix_rates(device),
    }  # fmt: skip


def exchange(rank: int, port: int, answer: Any) -> None:
    """One end of the measurement of the link."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = []
    for size, count in ((LINK_BYTES, 3), (8, MESSAGES)):
        data = torch.zeros(size, dtype=torch.uint8)
        dist.barrier()
        began = time.perf_counter()
        for _ in range(count):
            dist.send(data, 1) if rank == 0 else dist.recv(data, 0)
        dist.barrier()
        found.append((time.perf_counter() - began) / count)
    if rank == 0:
        answer.put(found)
    dist.destroy_process_group()


def link_rates() -> dict[str, float]:
    """Bytes per second and seconds per message between two processes of this machine."""
    import torch.multiprocessing as mp

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answer = mp.get_context("spawn").SimpleQueue()
    mp.spawn(exchange, (port, answer), nprocs=2)
    large, small = answer.get()
    return {"link": LINK_BYTES / large, "message": small}


def measured(words: list[str], ranks: int, folder: Path) -> dict[str, Any]:
    """Wall time, time of each block and highest peak of the stages on several processes, as a run records them."""
    loaded = load_recipe(words[0], words[1:])
    names = [stage.name for stage in loaded.stages() if stage.distributed]
    command = [sys.executable, "-m", "llmcompress", "run", *words, f"run.dir={folder}", "--quiet"]
    subprocess.run([*command, "--until", names[-1], "--nproc", str(ranks)], check=True, stdout=subprocess.DEVNULL)
    states = [json.loads((folder / "stages" / name / "state.json").read_text()) for name in names]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    blocks = [event["data"]["seconds"] for event in events if event["kind"] == "block_end" and event["stage"] in names]
    peak = max(state["peak_rss_bytes"] for state in states)
    return {"seconds": sum(state["seconds"] for state in states), "blocks": blocks, "peak": peak}


def starts(runs: dict[int, dict[str, Any]]) -> dict[str, float]:
    """What comes before and between blocks: from the run on one process, and what several take longer."""
    outside = {ranks: run["seconds"] - len(run["blocks"]) * median(run["blocks"]) for ranks, run in runs.items()}
    alone = outside[1]
    return {"start": max(alone, 1e-3), "join": max(outside.get(2, alone) - alone, 1e-3)}


def check(words: list[str], runs: dict[int, dict[str, Any]], rates: Rates) -> dict[str, dict[str, float]]:
    """Predicted beside measured time and memory, per number of processes."""
    loaded = load_recipe(words[0], words[1:])
    config = ModelHandle.open(loaded.recipe.model.path).config
    cores, found = len(os.sched_getaffinity(0)), {}
    for number, run in runs.items():
        rows = [own[0] for own in predict(loaded, config, rates.device, [number], rates).values()]
        crowding = max(1.0, number / cores) if rates.device == "cpu" else 1.0
        predicted, ram = crowding * sum(row.seconds for row in rows), max(row.ram for row in rows)
        found[str(number)] = {
            "predicted_s": round(predicted, 2), "measured_s": round(run["seconds"], 2),
            "error": round(predicted / run["seconds"] - 1, 3), "block_s": round(median(run["blocks"]), 3),
            "predicted_bytes": ram, "measured_bytes": run["peak"], "memory_error": round(ram / run["peak"] - 1, 3),
        }  # fmt: skip
        print(f"{number} processes: {found[str(number)]}", flush=True)
    return found


def machine_name(device: str) -> str:
    """What was measured on."""
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    model = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model\t")]
    cores = f"{names[0] if names else platform.processor()}{f' model {model[0]}' if model else ''}, {len(names)} cores"
    gpu = f"{torch.cuda.get_device_name()}, " if device == "cuda" else ""
    return f"{gpu}{cores}, torch {torch.__version__}, one thread per process"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="with 1 and 2")
    parser.add_argument("--keep", action="store_true", help="take the rates from the file and check them again")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.keep:
        data = json.loads(options.out.read_text())
    else:
        data = {"machine": machine_name(options.device), "device": options.device, "error": {}, "runs": {}}
        with tempfile.TemporaryDirectory(prefix="llmcompress-rates-") as work:
            data |= compute_rates(Path(work), options.device) | link_rates()
        for name in ("forward", "hessian", "solve"):
            data[name] = [(width, float(f"{rate:.4g}")) for width, rate in data[name]]
        data |= {name: float(f"{data[name]:.4g}") for name in ("weights", "read", "link", "message")}
    with tempfile.TemporaryDirectory(prefix="llmcompress-rates-") as work:
        runs = {
            number: measured(list(CHECK), number, Path(work) / str(number)) for number in sorted({1, *options.ranks})
        }
    data |= {name: float(f"{value:.4g}") for name, value in starts(runs).items()}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    data["checked_on"] = " ".join(CHECK)
    data["runs"] = check(list(CHECK), runs, Rates.load(options.out))
    data["error"] = {f"{ranks} processes": row["error"] for ranks, row in data["runs"].items()}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{options.out}: {data['machine']}")


if __name__ == "__main__":
    main()
