#!/usr/bin/env python3
"""Run the C++ for AVX-512 on a CPU that has AVX2 alone: its intrinsics become functions of SIMDe and of emulated/.

    apt-get install libsimde-dev
    python scripts/check_emulated.py [--cases 150] [--seed 0] [--only gemm call state tree decode hybrid columns]

The families take the tests of check_sanitizers.py, columns its own; a skipped test is a failure, unless this CPU lacks
what it needs. Libraries are compiled once and kept as others are. --brief is a selection that the test suite runs. It
shows wrong lanes, masks, tails and alignments, not what a compiler makes of the real intrinsics, nor speed.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "scripts")]

from check_sanitizers import TESTS, judge  # noqa: E402
from emulated import toolchain  # noqa: E402
from llmcompress_kernels import build  # noqa: E402

EVERY = {
    **TESTS,
    "columns": ["tests/kernels/test_columns.py"],
}
BRIEF = {
    "state": ["tests/kernels/test_state_ops.py", "-k", "definitions_codes or decode_step or float_update"],
    "tree": ["tests/kernels/test_cpu_tree.py"],
}
NEEDS = {
    "gemm": ("products_avx512",),
    "call": ("products_avx512", "call"),
    "state": ("state",),
    "tree": ("tree_avx512",),
    "decode": ("products_avx512", "decode_avx512"),
    "hybrid": ("products_avx512", "decode_avx512", "state"),
    "columns": ("columns",),
}
FAMILIES = tuple(NEEDS)
AVX512 = "not avx2 and not portable and not avxvnni and not neon"


def main() -> int:
    """1 if a family is not clean."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=150)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--brief", action="store_true", help="fewer tests, of gemm, state and tree")
    options = parser.parse_args()
    chosen = [name for name in options.only if not options.brief or name == "gemm" or name in BRIEF]
    toolchain.install()
    failed = build.prepare(sorted({library for name in chosen for library in NEEDS[name]}))
    if failed:
        print("\n".join(failed.values()))
        return 1
    path = os.pathsep.join(filter(None, (*sys.path[:3], os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    found = {name: judge(name, command(name, options), environment) for name in chosen}
    bad = {name: told for name, told in found.items() if told is not None}
    for name, told in bad.items():
        print(f"{name}: {told}")
    print(f"emulated AVX-512 is not clean: {', '.join(bad)}" if bad else f"emulated AVX-512: {', '.join(found)}")
    return 1 if bad else 0


def command(name: str, options: argparse.Namespace) -> list[str]:
    """What Python is to run for a family."""
    if name == "gemm":
        return ["-m", "emulated.products", str(options.cases), str(options.seed)]
    *tests, chosen = (BRIEF if options.brief else EVERY)[name]
    # other instruction sets have been run already
    only = f"({chosen}) and {AVX512}" if "-k" in tests else AVX512
    tests = [*tests[:-1], "-k", only] if "-k" in tests else [*tests, chosen, "-k", only]
    return ["-m", "pytest", "-p", "emulated.toolchain", *tests]


if __name__ == "__main__":
    raise SystemExit(main())
