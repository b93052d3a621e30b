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

SOURCE = build.SOURCES / "cuda" / "skinny" / "skinny.cu"
# bytes of shared memory of a multiprocessor, of which every block takes 1024 more than it asks for
SHARED_PER_PROCESSOR = {80: 164 * 1024, 90: 228 * 1024}
ROWS_OF_A_WARP, LANES = 32, 32
# columns of one turn of the loop over a step's columns
TURN = {2: 64, 3: 64, 4: 32}
GROUP = 128


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
        Per instance ``arch``, ``bits``, ``type``, ``tokens`` of its tile, ``registers``, ``stack`` and ``spills`` in
        bytes, ``shared`` bytes with groups of 128 for all its tokens, ``copies`` (asynchronous ones), ``loop``
        (instructions of the loop over a step's columns by name), ``turn`` (columns of one turn of it), and
        ``per_weight``: instructions per weight of a step with its copies and scales, groups of 128, at most.

    Raises:
        BuildError: It does not compile.
    """
    cubin = folder / f"skinny-{arch}.cubin"
    command = [toolchain.find(), *toolchain.FLAGS, "-cubin", f"-arch=sm_{arch}", "-Xptxas=-v", str(SOURCE)]
    done = subprocess.run([*command, "-o", str(cubin)], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise build.BuildError(done.stderr[-2000:])
    resources = _resources(done.stderr)
    tool = _cuobjdump()
    assert tool is not None
    told = subprocess.run([tool, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    parts = re.split(r"Function : (\S+)", told)
    return [_report(arch, name, resources[name], code) for name, code in zip(parts[1::2], parts[2::2])]


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
    inner, outer = _loops(code)
    # what a turn does at the end of a group only is FFMA, and zeros for the next one
    turn, step = TURN[bits], skinny.COLUMNS[bits]
    executed = inner.total() - (1 - turn / GROUP) * (inner["FFMA"] + inner["CS2R"])
    executed = outer.total() - inner.total() + step // turn * executed
    return {
        "arch": arch, "bits": bits, "type": "bf16" if bf16 else "fp16", "tokens": 8 * tiles, **resources,
        "shared": shared(bits, 8 * tiles, GROUP), "copies": outer["LDGSTS"], "loop": dict(inner), "turn": turn,
        "per_weight": round(executed / (step * ROWS_OF_A_WARP / LANES), 2),
    }  # fmt: skip


def _loops(code: str) -> tuple[Counter[str], Counter[str]]:
    """Instructions of the innermost loop that multiplies, and of the loop over steps around it."""
    at = [(int(m[1], 16), m[2].strip()) for m in re.finditer(r"/\*([0-9a-f]{4,})\*/\s+([^;/]*);", code)]
    found = []
    for address, text in at:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            body = [t for a, t in at if int(branch[1], 16) <= a <= address]
            counts = Counter(_opcode(t) for t in body)
            if counts["HMMA"]:
                found.append(counts)
    found.sort(key=lambda counts: counts.total())
    return found[0], next(counts for counts in found if counts["LDGSTS"])


def _opcode(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0].split(".")[0]


def shared(bits: int, at_once: int, group: int) -> int:
    """Bytes of shared memory of a block for so many tokens, as ``Memory::bytes`` of skinny.cuh has them."""
    step = skinny.COLUMNS[bits]
    tables = 8 * 128 + 8 * 8 * (1 if at_once <= 8 else 2) + 2 * skinny.MOST_SLOTS + 16
    words, x = 128 * (step * bits // 8 + 16), at_once * (2 * step + (16 if bits == 2 else 64))
    stages = 2 if bits == 3 else 3
    return tables + stages * (words + x) + 2 * max(1, step // group) * 128 * 8


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
