#!/usr/bin/env python3
"""Measure what ``llmcompress plan --cluster`` needs to know about a machine, and how well it then predicts.

Rates are taken on a model's own shapes with one thread; then the recipe is run on 1, 2 and 4 processes and the
predicted time of its quantizing stage is held against the measured one. Where the machine has fewer free cores than
processes, that shows in the error.

    python scripts/measure_cluster_rates.py --out rates.json [--recipe smoke/eac_moe_tiny] [--ranks 1 2 4]
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
from pathlib import Path
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

TOKENS, LINK_BYTES, MESSAGES = 4096, 64 << 20, 200


def seconds(act: Callable[[], Any], least: float = 0.3) -> float:
    """Mean time of a call, after one for warming up."""
    act()
    count, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < least:
        act()
        count += 1
    return spent / count


def compute_rates(handle: ModelHandle) -> dict[str, float]:
    """Forward, Hessians, solves, rounding and reading, on this model's shapes."""
    layout = handle.layout
    bank = next((block.bank for block in layout.blocks if block.bank is not None), None)
    wide = next(layout.blocks[0].linears())
    _, rows, columns = bank.shape(bank.gate_up) if bank is not None else (1, wide.out_features, wide.in_features)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(512, columns, generator=generator)
    spec, options = QuantSpec(3, 64), GptqOptions(act_order="groups", refit=True)
    w = torch.randn(1, rows, columns, generator=generator)
    gram = Gram(1, columns)
    gram.add(torch.randn(4 * columns, columns, generator=generator))
    hessian = gram.hessian()
    model = handle.skeleton(torch.float32)
    walker = Walker(model, torch.randint(0, layout.vocab, (TOKENS // 256, 256), generator=generator))
    hidden = walker.embed([block.name for block in layout.blocks])
    block = layout.blocks[0]
    handle.load_block(model, 0)
    share = sizes.forward_flops(layout, TOKENS, 256) / len(layout.blocks)

    def rounded() -> None:
        codes, scale, zero = round_to_nearest(w, spec, "mse")
        int_group.decode(int_group.encode(codes, scale, zero, spec))

    def read() -> None:
        for view in block.tensors():
            handle.checkpoint.tensor(view.name)

    nbytes = sizes.block_parameters(block) * handle.checkpoint.dtype.itemsize
    return {
        "forward": share / seconds(lambda: walker.forward(block, hidden.clone())),
        "hessian": 2.0 * 512 * columns**2 / seconds(lambda: gram.add(x)),
        "solve": (columns**3 + rows * columns**2) / seconds(lambda: solve(w, hessian, spec, options)),
        "weights": rows * columns / seconds(rounded),
        "read": nbytes / seconds(read),
    }


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


def stage_seconds(recipe: str, ranks: int, folder: Path) -> float:
    """Wall time of the stages that run on several processes, as measured by a run."""
    words = [sys.executable, "-m", "llmcompress", "run", recipe, "run.threads=1", f"run.dir={folder}", "--quiet"]
    loaded = load_recipe(recipe)
    last = [stage.name for stage in loaded.stages() if stage.distributed][-1]
    subprocess.run([*words, "--until", last, "--nproc", str(ranks)], check=True, stdout=subprocess.DEVNULL)
    states = [folder / "stages" / stage.name / "state.json" for stage in loaded.stages() if stage.distributed]
    return sum(float(json.loads(path.read_text())["seconds"]) for path in states)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--recipe", default="smoke/eac_moe_tiny")
    parser.add_argument("--ranks", type=int, nargs="*", default=[1, 2, 4])
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = load_recipe(options.recipe)
    handle = ModelHandle.open(loaded.recipe.model.path)
    cores = len(os.sched_getaffinity(0))
    names = [x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x]
    machine = f"{names[0] if names else platform.processor()}, {cores} cores, torch {torch.__version__}"
    rates = Rates(machine=machine, **compute_rates(handle), **link_rates(), error={})
    data = {name: getattr(rates, name) for name in Rates.__slots__}
    data["checked_on"], data["runs"] = options.recipe, {}
    with tempfile.TemporaryDirectory(prefix="llmcompress-rates-") as work:
        for ranks in options.ranks:
            rows = predict(loaded, handle.config, "cpu", [ranks], rates)
            predicted = sum(own[0].seconds for own in rows.values())
            measured = stage_seconds(options.recipe, ranks, Path(work) / str(ranks))
            data["runs"][str(ranks)] = {"predicted": round(predicted, 3), "measured": round(measured, 3)}
            data["error"][str(ranks)] = round(predicted / measured - 1, 4)
            print(f"{ranks} processes: predicted {predicted:.1f} s, measured {measured:.1f} s", flush=True)
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{options.out}: {machine}")


if __name__ == "__main__":
    main()
