#!/usr/bin/env python3
"""Scale 1: a random Mixtral far larger than its budget of memory is compressed to 3 bits within ``host.ram``.

Attention by GPTQ on a few short windows, experts by rounding, perplexity of both models block by block, a native
artifact; then a fresh process loads the artifact and generates. Peaks are the kernel's (``VmHWM`` of each stage, whose
mark a run resets, and the child's at its end), held against the budget and against ``plan``.

    python scripts/acceptance/scale_1_memory.py                     30 GB, budget 8 GiB; about 45 GB of disk

With --gigabytes 1.2 --ram 1GiB --generate-ram 1280MiB --hidden 1024 --intermediate 2048 --experts 4 --tokens 256 the
same in small; tests/integration/test_memory.py runs that.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml
from harness import ROOT, busy_seconds, keep_plan, llmcompress_json, measured, verdict

from llmcompress.recipe.schema import parse_size

TOLERANCE = 0.15


def content(model: Path, run: Path, ram: str, tokens: int) -> dict[str, Any]:
    """The recipe."""
    rule = {"bits": 3, "group_size": 128}
    heldout = {"kind": "jsonl", "path": "asset:text/heldout.jsonl.gz"}
    return {
        "version": 1, "name": "large", "model": {"path": str(model)}, "host": {"ram": ram},
        "run": {"dir": str(run), "device": "cpu", "threads": 1, "compute_dtype": "bfloat16"},
        "stages": {
            "load": {"type": "load", "check_finite": False},
            "calibrate": {
                "type": "calibrate", "samples": 4, "length": 128,
                "source": {"kind": "jsonl", "path": "asset:text/calibration.jsonl.gz"},
            },
            "attention": {
                "type": "gptq", "diagnose_experts": False, "rules": {"attention": {"role": "attention", **rule}},
            },
            "experts": {
                "type": "rtn", "diagnose_experts": False, "rules": {"experts": {"role": "experts", **rule}},
            },
            "evaluate": {
                "type": "evaluate",
                "perplexity": {"heldout": {"source": heldout, "length": 128, "max_tokens": tokens}},
            },
            "export": {"type": "export", "formats": ["native"]},
        },
    }  # fmt: skip


def tree_bytes(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=30.2)
    parser.add_argument("--ram", default="8GiB")
    parser.add_argument("--generate-ram", default="16GiB")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=1024, help="held-out tokens of the evaluation")
    parser.add_argument("--no-keep", dest="keep", action="store_false", help="leave nothing for scale_5_plan.py")
    parser.add_argument("--work", type=Path, help="folder for model and run, removed afterwards; default: temporary")
    options = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="llmcompress-scale-", dir=options.work))
    try:
        run(options, root)
    finally:
        shutil.rmtree(root)


def run(options: argparse.Namespace, root: Path) -> None:
    """Make the model, compress it, generate with it, and judge."""
    free = shutil.disk_usage(root).free
    if free < 1.35e9 * options.gigabytes:
        verdict(False, f"not measured: {free / 1e9:.0f} GB of disk free, {1.35 * options.gigabytes:.0f} GB needed")
    maker = ROOT / "scripts" / "make_large_model.py"
    model, folder, recipe = root / "model", root / "run", root / "large.yaml"
    shape = [f"--{name}={getattr(options, name)}" for name in ("gigabytes", "hidden", "intermediate", "experts")]
    subprocess.run([sys.executable, maker, model, *shape], check=True)
    recipe.write_text(yaml.safe_dump(content(model, folder, options.ram, options.tokens), sort_keys=False))
    predicted = llmcompress_json("plan", recipe)
    began, busy = time.time(), busy_seconds()
    peak, own = measured("run", recipe, "--quiet")
    seconds = time.time() - began
    others = (busy_seconds() - busy - own) / seconds
    for stage in predicted["stages"]:
        record = json.loads((folder / "stages" / stage["name"] / "state.json").read_text())
        peak = max(peak, record["peak_rss_bytes"])
        print(f"  {stage['name']}: plan {stage['ram'] / 1e9:.2f} GB, measured {record['peak_rss_bytes'] / 1e9:.2f} GB, "
              f"{record['seconds']:.0f} s", flush=True)  # fmt: skip
    if options.keep:
        keep_plan("scale_1", folder, [recipe], peak=peak, others=others)
    written = tree_bytes(folder)
    heavy = tree_bytes(model)
    shutil.rmtree(model)
    words = ["generate", folder / "artifact", "--prompt", "The old house", "--max-new-tokens", "4", "--quiet"]
    generating, _ = measured(*words)
    budget, larger = parse_size(options.ram), parse_size(options.generate_ram)
    error, disk = predicted["ram"] / peak - 1, predicted["disk"] / written - 1
    holds = (
        peak <= budget and generating <= larger and abs(error) <= TOLERANCE and abs(disk) <= TOLERANCE
        and heavy >= 0.99e9 * options.gigabytes
    )  # fmt: skip
    verdict(
        holds,
        f"{heavy / 1e9:.1f} GB model to 3 bits in {seconds:.0f} s: peak {peak / 2**30:.2f} GiB of {options.ram} "
        f"(plan {error:+.1%}), {written / 1e9:.2f} GB written (plan {disk:+.1%}), loads and generates in "
        f"{generating / 2**30:.2f} GiB of {options.generate_ram}",
    )


if __name__ == "__main__":
    main()
