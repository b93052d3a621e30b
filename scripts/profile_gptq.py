#!/usr/bin/env python3
"""Where the time and memory of GPTQ go: the first blocks of a dense model, run by the engine's own parts.

    python scripts/profile_gptq.py FOLDER [--blocks 2] [--bits 4] [--group 64] [--samples 128] [--length 512] [--ops]

Per block: CPU seconds in user and kernel mode, page faults, resident memory and its peak, context switches that the
scheduler forced (figures with many are not to be trusted). ``--ops`` adds torch's operations of the last block.
Calibration text: the shipped one, tokenized with the folder's tokenizer. One thread.
"""

from __future__ import annotations

import argparse
import resource
from pathlib import Path
from typing import Any

MIB = 1 << 20


def prepare(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Open the model and compute the hidden states before its first block: handle, skeleton, walker, states."""
    import torch

    from llmcompress.data.calibration import build
    from llmcompress.data.sources import JsonlSource
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.walker import Walker

    handle = ModelHandle.open(args.folder)
    source = JsonlSource(kind="jsonl", path="asset:text/calibration.jsonl.gz")
    tokens = build(source, handle.tokenizer(), args.samples, args.length, seed=0).tokens
    model = handle.skeleton(getattr(torch, args.dtype))
    walker = Walker(model, tokens)
    hidden = walker.embed([block.name for block in handle.layout.blocks])
    handle.free_embeddings(model)
    return handle, model, walker, hidden


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--ops", action="store_true")
    args = parser.parse_args()

    import torch

    from llmcompress.algorithms.gptq import GptqOptions
    from llmcompress.models.heap import keep_freed_memory
    from llmcompress.pipeline import device
    from llmcompress.quant.spec import QuantSpec
    from llmcompress.stages.blockwise.block_solver import BlockSolver
    from llmcompress.stages.blockwise.method import SecondOrder

    torch.set_num_threads(1)
    device.make_deterministic()
    keep_freed_memory()
    handle, model, walker, hidden = prepare(args)
    # what the gptq stage does by default, asymmetric
    method = SecondOrder(grid="mse", options=GptqOptions(act_order="groups", refit=True))
    spec = QuantSpec(args.bits, args.group, symmetric=False)

    def run(block: Any) -> None:
        handle.load_block(model, block.index)
        plan = {linear.name: spec for linear in block.linears()}
        walker.forward(block, hidden, BlockSolver(handle, model, block, plan, method))
        handle.free_block(model, block.index)

    for block in handle.layout.blocks[: args.blocks]:
        device.reset_peaks()
        before = resource.getrusage(resource.RUSAGE_SELF)
        if args.ops and block.index + 1 == args.blocks:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                run(block)
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=15, max_name_column_width=40))
        else:
            run(block)
        after = resource.getrusage(resource.RUSAGE_SELF)
        print(
            f"block {block.index}: user {after.ru_utime - before.ru_utime:.2f} s, "
            f"kernel {after.ru_stime - before.ru_stime:.2f} s, {after.ru_minflt - before.ru_minflt} page faults, "
            f"{after.ru_nivcsw - before.ru_nivcsw} forced switches, resident {device.current_rss() // MIB} MiB, "
            f"peak {device.peak_rss() // MIB} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
