"""Compile the CUDA C++ kernels for GPUs that are not here, and report what the machine code is made of.

    python -m llmcompress_kernels.cuda.aot [--arch 80 90]

prints one JSON object per instance. Needs nvcc and cuobjdump (the one that triton brings will do), no GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from llmcompress_kernels import build
from llmcompress_kernels.cuda import skinny, toolchain

SOURCES = tuple(build.SOURCES / "cuda" / "skinny" / f"skinny_{bits}.cu" for bits in skinny.BITS)
# bytes of shared memory of a multiprocessor, of which every block takes 1024 more than it asks for
SHARED_PER_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024}


def missing() -> str | None:
    """Why nothing can be compiled or looked into here, or None."""
    try:
        toolchain.find()
    except build.BuildError as error:
        return str(error)
    return None if _cuobjdump() else "no cuobjdump (pip install triton brings one)"


def _cuobjdump() -> str | None:
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found or spec is None or spec.origin is None:
        return found
    bundled = Path(spec.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.is_file() else None


def compile_all(arch: int, folder: Path) -> list[dict[str, Any]]:
    """Every instance of the kernel for one architecture.

    Args:
        arch: 80 for A100, 90 for H100.
        folder: For the machine code.

    Returns:
        Per instance ``form`` ("whole": blocks take whole strips, "shared": they share them), ``arch``, ``bits``,
        ``type``, ``tokens`` of its tile, ``registers``, ``stack`` and ``spills`` in bytes, ``copies`` (asynchronous
        ones), ``step`` (instructions of the products of a step, or of half of one, by name, where one scale serves all
        its columns) and ``per_weight``, how many of them a weight takes.

    Raises:
        BuildError: It does not compile.
    """
    found = []
    for source in SOURCES:
        cubin = folder / f"{source.stem}-{arch}.cubin"
        command = [toolchain.find(), *toolchain.FLAGS, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", str(source)]
        done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise build.BuildError(done.stderr[-2000:])
        resources = _resources(done.stderr)
        tool = _cuobjdump()
        assert tool is not None
        told = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
        parts = re.split(r"Function : (\S+)", told)
        found += [_report(arch, name, resources[name], code) for name, code in zip(parts[1::2], parts[2::2])]
    return found


def _resources(log: str) -> dict[str, dict[str, int]]:
    """Registers, stack and spills of every entry of ``ptxas -v``."""
    found = {}
    for entry in log.split("Compiling entry function '")[1:]:
        name = entry.split("'", 1)[0]
        stack, stores, loads = map(
            int,
            re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups(),  # type: ignore[union-attr]
        )
        registers = int(re.search(r"Used (\d+) registers", entry)[1])  # type: ignore[index]
        found[name] = {"registers": registers, "stack": stack, "spills": stores + loads}
    return found


def _report(arch: int, name: str, resources: dict[str, int], code: str) -> dict[str, Any]:
    bits, bf16, tiles = map(int, re.search(r"ILi(\d)ELb(\d)ELi(\d)E", name).groups())  # type: ignore[union-attr]
    # those of sums make no codes into numbers
    straight = [part for part in _straight(code) if part["LOP3"] > part["HMMA"] > 0]
    # one piece of code per number of scales in a step; the fewest scales take the fewest instructions per weight. A
    # lane has a row's weight for every column of the 16 of a product
    least = min(straight, key=lambda counts: counts.total() / counts["HMMA"])
    return {
        "form": "whole" if "strips" in name else "shared",
        "arch": arch, "bits": bits, "type": "bf16" if bf16 else "fp16", "tokens": 8 * tiles, **resources,
        "copies": code.count("LDGSTS"), "steps": len(straight), "step": dict(least),
        "per_weight": round(least.total() / (16 * least["HMMA"] / (2 * tiles)), 2),
    }  # fmt: skip


def _straight(code: str) -> list[Counter[str]]:
    """Instructions between jumps, by name."""
    found: list[Counter[str]] = [Counter()]
    for match in re.finditer(r"/\*[0-9a-f]{4,}\*/\s+([^;/]*);", code):
        name = _opcode(match[1].strip())
        found[-1][name] += 1
        if name == "BRA":
            found.append(Counter())
    return found


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def main() -> int:
    """Compile and print; exit code 1 if that is not possible."""
    parser = argparse.ArgumentParser(description="Compile the CUDA C++ kernels ahead of time.")
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90])
    options = parser.parse_args()
    reason = missing()
    if reason is not None:
        print(reason)  # noqa: T201
        return 1
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.arch:
            for report in compile_all(arch, Path(folder)):
                print(json.dumps(report), flush=True)  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
