#!/usr/bin/env python3
"""Measure what ``llmcompress plan --cluster`` needs to know about a machine, and how well it then predicts.

Rates of one process are taken with one thread: products, attention, sums of second moments, factors and GPTQ's column
loop at several widths; what passes between products; memory that is new, files, messages; and from forward passes of
the reference model on few tokens what a call takes. llmcompress/pipeline/rates.py says what each figure is,
llmcompress/pipeline/work.py what is divided by it. Then a recipe is run on 1, 2 and 4 processes. What passes before the
first block is taken from the runs on 1 and 2; the predicted time and memory of the whole quantizing stage are held
against the measured ones, and the errors go into the file. Where processes are more than cores they share them, and the
prediction for that run is stretched accordingly: a cluster has a core, or a GPU, for each.

    python scripts/measure_cluster_rates.py --out rates.json                  both
    python scripts/measure_cluster_rates.py --out rates.json --keep           check rates that the file holds

It takes some minutes and 6 GB of disk, for a checkpoint that no cache holds.

With ``--device cuda`` the matrix work is measured on the GPU, in bfloat16 where the engine uses it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
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
from torch import Tensor

from llmcompress.algorithms.gptq import SOLVE_BYTES, GptqOptions, column_order, solve
from llmcompress.algorithms.grids import round_to_nearest
from llmcompress.algorithms.hessian import Gram, reversed_root
from llmcompress.algorithms.reference_targets import fit_to_reference
from llmcompress.algorithms.rounding import round_weights
from llmcompress.algorithms.router_calibration import SolverOptions, calibrate_router
from llmcompress.algorithms.routing import RouterRule
from llmcompress.distributed.balance import shares
from llmcompress.distributed.world import World
from llmcompress.durable import write_durably
from llmcompress.models import sizes
from llmcompress.models.capture import Routing
from llmcompress.models.handle import ModelHandle
from llmcompress.models.heap import MAPPED, keep_freed_memory
from llmcompress.models.layout import RouterView
from llmcompress.models.memory_limits import DEFAULT, total_ram
from llmcompress.models.tensor_file import all_finite
from llmcompress.models.walker import Walker
from llmcompress.pipeline.cluster import predict
from llmcompress.pipeline.rates import CURVES, NUMBERS, Rates
from llmcompress.pipeline.work import (
    Passed,
    Run,
    down_projections,
    first_projections,
    head_width,
    heads_of,
    inside,
    last_projection,
)
from llmcompress.quant.codecs import int_group
from llmcompress.quant.spec import QuantSpec
from llmcompress.quant.store import BlockPatch, PackedStore
from llmcompress.recipe.load import load_recipe
from llmcompress.stages.blockwise.block_solver import cpu

ROOT = Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "recipes" / "assets" / "reference_moe"
LINK_BYTES = 64 << 20
# of the checkpoint from which reading without a cache is measured
DISK_BYTES = 5_000_000_000
WIDTHS = (128, 256, 512, 1024, 2048, 4096)
HEAD_WIDTHS = (32, 64, 128, 256)
HIDDEN = (512, 1024, 2048)
# what is run to check the prediction: sums in shards and experts one at a time, whatever the number of processes
CHECK = ("smoke/eac_moe_tiny", "stages.calibrate.samples=32", "stages.calibrate.length=512",
         "stages.quantize.targets=own", "run.deterministic=true", "run.threads=1")  # fmt: skip


def seconds(act: Callable[[], Any], device: str = "cpu", least: float = 0.3) -> float:
    """Median time of a call, after one for warming up."""
    wait = torch.cuda.synchronize if device == "cuda" else int
    act()
    wait()
    found: list[float] = []
    while sum(found) < least:
        began = time.perf_counter()
        act()
        wait()
        found.append(time.perf_counter() - began)
    return median(found)


def matrix_rates(device: str) -> dict[str, Any]:
    """Products, Hessians, factors, column loops and fits at several widths, and what one matrix takes beside them."""
    generator = torch.Generator().manual_seed(0)
    spec, options = QuantSpec(3, 64), GptqOptions(act_order="groups", refit=True)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    found: dict[str, Any] = {name: [] for name in ("product", "hessian", "factor", "columns", "fit")}
    memory = memory_rate(device)
    alone = matrix_seconds(device, spec, options)
    for width in WIDTHS:
        x = torch.randn(512, width, generator=generator).to(device)
        w = torch.randn(width, width, generator=generator).to(device)
        spent = seconds(partial(torch.mm, x.to(dtype), w.T.to(dtype)), device)
        found["product"].append((width, 2.0 * 512 * width**2 / spent))
        gram = Gram(1, width, device)
        found["hessian"].append((width, 2.0 * 512 * width**2 / seconds(partial(gram.add, x), device)))
        hessian = gram.hessian()
        hessian.diagonal(dim1=-2, dim2=-1).add_(1.0)
        order = column_order(hessian, 64, options)
        place = torch.empty_like(hessian) if device == "cpu" else None
        root = seconds(partial(reversed_root, hessian, 0.01, None, order, place), device)
        found["factor"].append((width, width**3 / root))
        # so many matrices that all results are new memory, whose time is known
        count = max(1, -(-MAPPED // (4 * width**2)))
        stack, curvature = w.repeat(count, 1, 1), hessian.repeat(count, 1, 1)
        spent = seconds(partial(solve, stack, curvature, spec, options), device)
        turns = max(1, count // max(1, SOLVE_BYTES // (4 * width**2))) if device == "cpu" else 1
        loop = spent - count * root - turns * alone - 5 * count * width**2 / memory
        found["columns"].append((width, count * width**3 / max(loop, 0.1 * spent)))
        del stack, curvature
        cross = hessian * 0.01
        spent = seconds(partial(fit_to_reference, w[None], hessian, cross, 0.1), device)
        found["fit"].append((width, (width**3 / 3 + 4.0 * width**3) / spent))
    return {**found, "memory": memory, "matrix": alone}


def memory_rate(device: str) -> float:
    """Bytes per second of memory that is touched for the first time."""
    size = 256 << 20
    return size / seconds(lambda: torch.empty(size, dtype=torch.uint8, device=device).zero_(), device)


def matrix_seconds(device: str, spec: QuantSpec, options: GptqOptions) -> float:
    """Time to solve and pack a matrix that is all overhead."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(128, 64, generator=generator).to(device)
    w = torch.randn(1, 64, 64, generator=generator).to(device)
    hessian = (x.T @ x)[None]

    def one() -> None:
        found = solve(w, hessian, spec, options)
        int_group.encode(found.codes.cpu(), found.scale.cpu(), cpu(found.zero), spec)

    return seconds(one, device)


def attention_rates(device: str) -> list[tuple[int, float]]:
    """Pairs of tokens per second and head, at several widths of a head, with a mask as transformers makes it."""
    found = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for width in HEAD_WIDTHS:
        heads, length = max(1, 512 // width), 512
        q, k, v = (torch.randn(1, heads, length, width, device=device, dtype=dtype) for _ in range(3))
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        act = partial(torch.nn.functional.scaled_dot_product_attention, q, k, v, attn_mask=mask)
        found.append((width, heads * length**2 / seconds(act, device)))
    return found


def value_rates(device: str) -> dict[str, float]:
    """Rounding, packing, mirroring of second moments, bookkeeping of routers' fits."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(8, 1024, 1024, generator=generator).to(device)
    spec = QuantSpec(3, 64)
    codes, scale, zero = round_to_nearest(w, spec, "mse")
    place = torch.empty_like(w)
    # as many values as a stage without data rounds at once, in the type of most checkpoints
    stack = torch.randn(DEFAULT.rounded // 2048**2, 2048, 2048, generator=generator).to(device, torch.bfloat16)

    def nearest(values: Tensor, grid: Any) -> None:
        found = round_weights(values, spec, grid)
        int_group.encode(found.codes.cpu(), found.scale.cpu(), cpu(found.zero), spec)

    def packed() -> None:
        all_finite(w)
        int_group.encode(codes.cpu(), scale.cpu(), cpu(zero), spec)
        place.copy_(w)

    def mirrored() -> None:
        Gram.of(w, torch.ones(len(w), dtype=torch.int64)).take_hessian()

    rows, experts = 8192, 16
    x, logits = torch.randn(rows, 8, generator=generator), torch.randn(rows, experts, generator=generator)
    weight = torch.randn(experts, 8, generator=generator)
    view = RouterView("router", "softmax_topk", renormalizes=True)
    rule, fit = RouterRule.of(None, view, 2), SolverOptions()
    held = torch.arange(rows) % 10 == 0
    chosen = partial(
        calibrate_router, logits.to(device), x.to(device), weight.to(device), None, rule, fit, held.to(device)
    )

    def routed() -> None:
        weights, index = logits.softmax(-1).topk(2)
        Routing.of(index, weights, experts)

    logits = logits.to(device)
    return {
        "routed": rows * experts / seconds(routed, device),
        "rounded": stack.numel() / seconds(partial(nearest, stack, "minmax"), device),
        "searched": w.numel() / seconds(partial(nearest, w.to(stack.dtype), "mse"), device),
        "packed": w.numel() / seconds(packed, device),
        "squares": w.numel() / seconds(mirrored, device),
        "select": rows * experts / seconds(chosen, device),
    }


def file_rates(folder: Path) -> dict[str, float]:
    """Durable writing: bytes per second, and seconds of a block without content."""
    content = os.urandom(64 << 20)
    store, large = PackedStore(folder / "blocks"), folder / "large"
    flush = seconds(lambda: store.write_block(0, BlockPatch({}, {}, {})))
    return {"written": len(content) / seconds(lambda: write_durably(large, content)), "flush": flush}


def disk_rate(folder: Path, read: float) -> float:
    """Bytes per second of a checkpoint larger than memory: what reading it takes longer than at the rate ``read``.

    The machine's cache is dropped. A host below it may hold another one, of what was written last: the file is several
    GB and read from its beginning, block by block, as a run does that cannot keep what it has read.
    """
    model = folder / "uncached"
    words = [model, "--hidden", 2048, "--intermediate", 4096, "--experts", 16, "--gigabytes", DISK_BYTES / 1e9]
    subprocess.run([sys.executable, ROOT / "scripts" / "make_large_model.py", *map(str, words)], check=True)
    for path in model.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    handle, found = ModelHandle.open(str(model)), []
    handle.checkpoint.read_once()
    skeleton = handle.skeleton(torch.bfloat16)
    for block in handle.layout.blocks:
        began = time.perf_counter()
        handle.load_block(skeleton, block.index)
        found.append(time.perf_counter() - began)
        handle.free_block(skeleton, block.index)
    shutil.rmtree(model)
    nbytes = sizes.block_parameters(handle.layout.blocks[0]) * skeleton.dtype.itemsize
    return nbytes / max(median(found) - nbytes / read, 1e-3)


class Forward:
    """Forward passes through the first block of a model on random tokens.

    Args:
        folder: The model.
        device: Where it runs.
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.device, self.handle = device, ModelHandle.open(str(folder))
        self.layout, self.block = self.handle.layout, self.handle.layout.blocks[0]
        self.heads = heads_of(self.handle.config)
        self.model = self.handle.skeleton(torch.bfloat16 if device == "cuda" else torch.float32)
        self.handle.load_block(self.model, 0, device)

    def timed(self, windows: int, length: int, shards: int, whole: bool) -> float:
        """Seconds of a pass; not the whole one ends before the experts."""
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, self.layout.vocab, (windows, length), generator=generator)
        parts = [len(part) for part in shares(windows, shards)] if shards > 1 else None
        walker = Walker(self.model, tokens, self.device, shards=parts)
        hidden = walker.embed([block.name for block in self.layout.blocks])
        return seconds(lambda: walker.forward(self.block, hidden.clone(), advance=whole), self.device)

    def counted(self, windows: int, length: int, shards: int, whole: bool, rates: Rates) -> Passed:
        """What that pass consists of."""
        run, found = Run.of(windows, length, shards, self.heads, self.device == "cuda"), Passed()
        for sublayer in self.block.sublayers:
            found += inside(sublayer, run, rates, self.layout.hidden) + last_projection(sublayer, run, rates)
            if whole and sublayer.experts is not None:
                found += first_projections(sublayer.experts, run, rates)
                found += down_projections(sublayer.experts, run, rates)
        return found


def moved_rates(device: str) -> list[tuple[int, float]]:
    """Values per second that pass through what lies between products, one batch after another.

    Four values for each of an input: the norm's copy, the gathered one, the activation's, the one that is added up.
    """
    found = []
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for width in (192, *HIDDEN, 4096):
        x, kept, total = (torch.zeros(512, width, device=device, dtype=dtype) for _ in range(3))
        scale, weight = torch.ones(width, device=device, dtype=dtype), torch.ones(512, 1, device=device, dtype=dtype)
        places = torch.randperm(512, generator=torch.Generator().manual_seed(0)).to(device)

        def act(x: Tensor = x, kept: Tensor = kept, total: Tensor = total, scale: Tensor = scale) -> None:
            wide = x.float()
            kept.copy_(scale * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype))
            picked = kept.index_select(0, places)  # noqa: B023 - called within this iteration
            total.index_add_(0, places, torch.nn.functional.silu(picked) * picked * weight)  # noqa: B023

        found.append((width, 4.0 * x.numel() / seconds(act, device)))
    return found


def call_rates(device: str, known: Rates) -> dict[str, Any]:
    """What a pass on few tokens takes beside products, attention and values: per batch and per piece."""
    small = Forward(REFERENCE, device)
    width, hidden = head_width(small.block, small.heads), small.layout.hidden
    # eight windows of 32 tokens, each a batch of its own, with and without the experts
    whole, part = ((8, 32, 8, True), (8, 32, 8, False))
    rest = [small.timed(*case) - small.counted(*case, known).seconds(known, hidden, width) for case in (whole, part)]
    batches, pieces = small.counted(*part, known).batches, small.counted(*whole, known).pieces
    return {"batch": max(rest[1] / batches, 1e-7), "piece": max((rest[0] - rest[1]) / pieces, 1e-7)}


def read_rate(folder: Path, device: str) -> float:
    """Bytes per second of a block's first reading, in the type that is computed in, the file in the kernel's cache."""
    model = folder / "model"
    words = [model, "--hidden", 2048, "--intermediate", 4096, "--experts", 8, "--gigabytes", 0.01]
    subprocess.run([sys.executable, ROOT / "scripts" / "make_large_model.py", *map(str, words)], check=True)
    found = []
    for _ in range(3):
        # a file that was read before is mapped, page by page, already
        handle = ModelHandle.open(str(model))
        skeleton = handle.skeleton(torch.bfloat16 if device == "cuda" else torch.float32)
        began = time.perf_counter()
        handle.load_block(skeleton, 0, device)
        if device == "cuda":
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
        nbytes = sizes.block_parameters(handle.layout.blocks[0]) * skeleton.dtype.itemsize
        del handle, skeleton
    return nbytes / median(found)


def compute_rates(folder: Path, device: str) -> dict[str, Any]:
    """Everything that one process does by itself."""
    keep_freed_memory()
    found = matrix_rates(device) | {"attention": attention_rates(device), "moved": moved_rates(device)}
    found |= value_rates(device) | file_rates(folder) | {"read": read_rate(folder, device), "cache": total_ram()}
    found["disk"] = disk_rate(folder, found["read"])
    unknown = {**dict.fromkeys(NUMBERS, 1.0), "batch": 0.0, "piece": 0.0}
    known = Rates(**{**unknown, **found, "machine": "", "device": device, "error": {}})
    return found | call_rates(device, known)


def exchange(rank: int, port: int, answer: Any) -> None:
    """One end of the measurement of the link, by the engine's own messages."""
    import torch.distributed as dist

    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    world = World(rank, 2, count=2)
    found = []
    for size, count, rounds in ((LINK_BYTES // 4, 2, 5), (2, 40, 15)):
        data, took = torch.zeros(size), []
        for _ in range(rounds):
            world.barrier()
            began = time.perf_counter()
            for turn in range(count):
                # owners take turns, as they do when experts are dealt out
                world.sum_in_order([data], turn % 2)
            world.barrier()
            took.append((time.perf_counter() - began) / count)
        # one stall of a second among so many messages would be ten times all of them
        found.append(median(took))
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
    # a sum is two messages: a shape and the values
    return {"link": LINK_BYTES / large, "message": small / 2}


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
        for name in CURVES:
            data[name] = [(width, float(f"{rate:.4g}")) for width, rate in data[name]]
        data |= {name: float(f"{data[name]:.4g}") for name in NUMBERS if name in data}
    with tempfile.TemporaryDirectory(prefix="llmcompress-rates-") as work:
        # the faster of two: whatever else runs on the machine only adds to a time
        tries = [(number, turn) for number in sorted({1, *options.ranks}) for turn in range(2)]
        found = [(n, measured(list(CHECK), n, Path(work) / f"{n}_{turn}")) for n, turn in tries]
        runs = {n: min((run for m, run in found if m == n), key=lambda run: run["seconds"]) for n, _ in found}
    data |= {name: float(f"{value:.4g}") for name, value in starts(runs).items()}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    data["checked_on"] = " ".join(CHECK)
    data["runs"] = check(list(CHECK), runs, Rates.load(options.out))
    data["error"] = {f"{ranks} processes": row["error"] for ranks, row in data["runs"].items()}
    options.out.write_text(json.dumps(data, indent=1) + "\n")
    print(f"{options.out}: {data['machine']}")


if __name__ == "__main__":
    main()
