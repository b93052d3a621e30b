"""Run the GPU benches and write one JSON file.

    python kernels/bench/gpu_run.py --out benchmarks/gpu_<name>.json [--only moe,dense] [--match REGEX] [--dry-run]

Needs torch and triton. humming-kernels and gemlite are measured where they are installed. ``--dry-run`` imports
everything, lists what would run, and needs no GPU. ``--only`` takes parts: moe, dense, state, tree, mixtral, mamba;
``--match`` takes names. ``--alone`` measures no peers, ``--skip`` leaves out some: triton, humming, gemlite.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).resolve().parent)]

TOKENS = (1, 4, 8, 16, 32, 64, 256)
PREFILL = 4096
BITS = (4, 3, 2)
BATCHES = (1, 16, 64, 128, 512)
ORDER = ("mixtral", "mamba", "state", "tree", "moe", "dense")


def versions() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    import torch

    found: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
    }
    for name in ("triton", "numpy", "humming-kernels", "gemlite"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["commit"], found["sources"] = commit(), sources()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory_gb": round(properties.total_memory / 1e9, 1),
            "l2_mb": round(properties.L2_cache_size / 1e6, 1),
        }
    return found


def commit() -> str | None:
    """The commit that the kernels are of, or None: no repository here, or they differ from what it holds."""

    def git(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)

    try:
        changed = git("status", "--porcelain", "--", "kernels")
        return (
            git("rev-parse", "--short", "HEAD").stdout.strip() or None
            if changed.returncode == 0 == len(changed.stdout)
            else None
        )
    except OSError:
        return None


def sources() -> str:
    """Hash of the kernels and of these scripts, which a copy without its repository has as well."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*")):
        if path.is_file() and path.suffix in (".py", ".cu", ".cuh", ".h", ".cpp", ".json"):
            digest.update(path.relative_to(ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def plan() -> list[tuple[str, Any]]:
    """Everything that is measured: a name and a function of the copy rate that gives a list of lines."""
    import gpu_mamba
    import gpu_matrix
    import gpu_mixtral
    import gpu_state
    import gpu_tree

    found: list[tuple[str, Any]] = []
    for bits in BITS:
        for tokens in TOKENS:
            found.append((f"moe w{bits} {tokens} tokens", lambda r, b=bits, t=tokens: [gpu_matrix.routed(t, b, r)]))
        found.append((f"moe w{bits} {PREFILL} tokens", lambda r, b=bits: [gpu_matrix.routed(PREFILL, b, r)]))
        found.append((f"moe w{bits} pruned", lambda r, b=bits: [gpu_matrix.routed(PREFILL, b, r, 0.3)]))
        for tokens in (1, 8, 32, 256):
            found.append(
                (f"dense w{bits} {tokens} tokens", lambda r, b=bits, t=tokens: list(gpu_matrix.dense(t, b, r)))
            )
    for batch in BATCHES:
        found.append((f"state batch {batch}", lambda r, n=batch: [gpu_state.update(n, r)]))
        found.append((f"mamba batch {batch}", lambda r, n=batch: [gpu_mamba.step(n, r)]))
        found.append((f"mamba parts batch {batch}", lambda r, n=batch: [gpu_mamba.parts(n, r)]))
    found.append((f"mamba prompt {PREFILL} tokens", lambda r: [gpu_mamba.prompt(PREFILL, r)]))
    for rows, columns in gpu_tree.SHAPES:
        for models in gpu_tree.ACTIVE:
            name = f"tree {rows}x{columns} {models} models"
            found.append((name, lambda r, n=rows, k=columns, m=models: [gpu_tree.tree(n, k, r, m)]))
    found.append(("mixtral-8x7b w3", lambda r: [gpu_mixtral.generate(3, r)]))
    return found


def parts_of(known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A type of arguments: some of the parts, separated by commas. A wrong word would measure nothing."""

    def parts(text: str) -> tuple[str, ...]:
        found = tuple(text.split(","))
        if unknown := sorted(set(found) - set(known)):
            raise argparse.ArgumentTypeError(f"no part {', '.join(unknown)}; there are {', '.join(known)}")
        return found

    return parts


def chosen(options: argparse.Namespace) -> list[tuple[str, Any]]:
    """What the options leave of :func:`plan`; what peers have to compile for comes last, where time may end."""

    def part(item: tuple[str, Any]) -> str:
        return re.split(r"[ -]", item[0])[0]

    work = [item for item in plan() if part(item) in options.only and re.search(options.match, item[0])]
    return sorted(work, key=lambda item: ORDER.index(part(item)))


def main() -> int:
    """Measure until the time is up; exit code 1 if something failed or did not fit."""
    parser = argparse.ArgumentParser(description="GPU benches of the kernels.")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=330.0, help="start no measurement after this time")
    parser.add_argument("--only", type=parts_of(ORDER), default=ORDER, help="parts, separated by commas")
    parser.add_argument("--match", default="", help="regular expression that names have to match")
    parser.add_argument("--alone", action="store_true", help="measure no peers")
    parser.add_argument("--skip", default="", help="peers that are left out, separated by commas")
    parser.add_argument("--early", action="store_true", help="steps of Mamba-2 whose launches overlap as well")
    parser.add_argument("--dry-run", action="store_true")
    options = parser.parse_args()
    work = chosen(options)
    if options.dry_run:
        print("\n".join(name for name, _ in work))
        print(json.dumps(versions()))
        return 0
    import gpu_mamba
    import gpu_matrix
    import torch
    from gpu_timing import copy_rate, read_rate

    gpu_mamba.EARLY = options.early
    gpu_matrix.PEERS, gpu_matrix.SKIPPED = not options.alone, set(options.skip.split(","))
    if not torch.cuda.is_available():
        print("no GPU: nothing can be measured")
        return 1
    began, copied, read = time.perf_counter(), copy_rate(), read_rate()
    rate = max(copied, read)
    result: dict[str, Any] = {
        "measured": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": versions(),
        "copy_gb_per_second": round(copied / 1e9, 1),
        "read_gb_per_second": round(read / 1e9, 1),
        "lines": [],
        "failed": {},
    }
    options.out.parent.mkdir(exist_ok=True)

    def save() -> None:
        """After every measurement, so that an end of time loses only what was not measured."""
        result["seconds"] = round(time.perf_counter() - began, 1)
        part = options.out.with_suffix(".part")
        part.write_text(json.dumps(result, indent=1) + "\n")
        part.replace(options.out)

    for name, measure in work:
        if time.perf_counter() - began > options.seconds:
            result["failed"][name] = "no time left"
            continue
        try:
            for line in measure(rate):
                result["lines"].append(line)
                print(json.dumps(line), flush=True)
        except Exception as error:  # one failure must not lose the rest
            result["failed"][name] = f"{type(error).__name__}: {error}"[:1000]
            print(f"{name}: {result['failed'][name]}", flush=True)
        save()
        torch.cuda.empty_cache()
    save()
    print(f"wrote {options.out}")
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
