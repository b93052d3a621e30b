#!/usr/bin/env python3
"""Q-Mamba 3: process memory of W8A8H4 against bf16 weights with fp32 states, batch 1, 32 and 128.

A Mamba-2 of 130m's shape with random weights. In processes of their own, model and cache are built, a short prompt is
read and some tokens are decoded; counted is what the kernel says is resident then, minus what was resident with the
libraries imported and a first small model run. Holds where at least half is saved at every batch.

    python scripts/acceptance/q_mamba_3_memory.py [--batches 1 32 128]
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import verdict
from state_models import MAMBA2_130M, SMALL, make_model, quantized

PROMPT, STEPS = 8, 4


def resident() -> int:
    """Bytes of this process in memory right now, with freed memory given back first."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    rows = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(row.split()[1]) * 1024 for row in rows if row.startswith(("Private_", "Shared_Clean:")))


def child(folder: str, warm: str, batch: int) -> None:
    """Print the resident bytes that model and cache of one batch take."""
    import torch

    from llmcompress import hf

    torch.set_num_threads(1)

    def use(path: str, rows: int) -> tuple[object, object]:
        model, _ = hf.load(path, dtype=torch.bfloat16)
        ids = torch.randint(3, 200, (rows, PROMPT), generator=torch.Generator().manual_seed(0))
        with torch.inference_mode():
            out = model(ids, use_cache=True, logits_to_keep=1)
            for _ in range(STEPS):
                cache = out.cache_params
                out = model(ids[:, :1], cache_params=cache, use_cache=True)
        return model, cache

    # code, operator caches and thread pools of the same paths, on a model too small to matter
    kept = use(warm, 2)
    del kept
    before = resident()
    kept = use(folder, batch)
    print(resident() - before, file=sys.stdout)
    del kept


def measure(folder: Path, warm: Path, batch: int) -> int:
    command = [sys.executable, __file__, "--child", str(folder), str(warm), str(batch)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return int(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", nargs="*", type=int, default=[1, 32, 128])
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1], int(options.child[2]))
        return
    root = Path(tempfile.mkdtemp(prefix="llmcompress-memory-"))
    try:
        folders = {}
        for name, shape in (("large", MAMBA2_130M), ("small", SMALL)):
            (root / name).mkdir()
            make_model(shape, root / name / "dense")
            folders[name] = (root / name / "dense", quantized(root / name / "dense", root / name))
        saved = []
        for batch in options.batches:
            dense = measure(folders["large"][0], folders["small"][0], batch)
            packed = measure(folders["large"][1], folders["small"][1], batch)
            saved.append(1 - packed / dense)
            print(
                f"batch {batch}: bf16 with fp32 states {dense / 1e6:.0f} MB, W8A8H4 {packed / 1e6:.0f} MB", flush=True
            )
    finally:
        shutil.rmtree(root)
    text = ", ".join(f"{share:.0%} at batch {batch}" for share, batch in zip(saved, options.batches))
    verdict(min(saved) >= 0.5, f"process memory saved: {text} (target 50 %)")


if __name__ == "__main__":
    main()
