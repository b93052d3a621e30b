#!/usr/bin/env python3
"""Kernels 1: every CPU implementation within stated tolerances of float64, 5 000 random shapes, opcheck, sanitizers.

The grid takes every operator, instruction set, width, group and type on odd sizes with outputs filled with NaN; random
cases follow; the same cases run once more with the C++ compiled under AddressSanitizer and UBSan.

    python scripts/acceptance/kernels_1_correctness.py [--cases 5000] [--sanitized 300] [--seed 0]
"""

from __future__ import annotations

import argparse
import itertools
import subprocess
import sys
from collections.abc import Iterator

import torch
from harness import ROOT, verdict
from llmcompress_kernels import check, cpu

SHAPES = (
    (1, 16, 64),
    (1, 1, 1),
    (2, 33, 100),
    (3, 48, 257),
    (5, 16, 31),
    (8, 80, 256),
    (9, 32, 130),
    (0, 16, 64),
    (21, 7, 65),
)
GROUPS = (32, 64, 128, 1 << 20)
MOE_SIZES = ((1, 4, 4, 64, 32), (7, 2, 4, 70, 33), (90, 1, 2, 32, 16), (0, 2, 3, 64, 32), (9, 3, 6, 96, 48))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--sanitized", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if not cpu.ready():
        verdict(False, f"no native kernels: {cpu.unavailable()}")
    names = [name for name in cpu.ISAS if cpu.set_isa(name)]
    tried, failures = 0, []
    for name in names:
        cpu.set_isa(name)
        worst: dict[str, float] = {}
        for number, case in enumerate(grid()):
            tried += 1
            found = case.run(torch.Generator().manual_seed(number))
            kind = f"{type(case).__name__} {str(case.dtype)[6:]}{' int8' if case.int8 else ''}"
            worst[kind] = max(worst.get(kind, 0.0), found)
            if not found <= case.tolerance:
                failures.append(f"{name} {case}: error {found:.2e}, allowed {case.tolerance:.1e}")
        print(f"{name}: " + ", ".join(f"{kind} {value:.1e}" for kind, value in sorted(worst.items())))
    cpu.set_isa(None)
    _, good, more = check.run(options.cases, options.seed)
    print(f"{good} of {options.cases} random cases within tolerance on {', '.join(names)}")
    operators()
    print("opcheck passes")
    command = [sys.executable, str(ROOT / "scripts" / "check_sanitizers.py"), "--cases", str(options.sanitized)]
    sanitized = subprocess.run(command, capture_output=True, text=True, check=False)
    print(sanitized.stdout.strip().splitlines()[-1] if sanitized.stdout else sanitized.stderr[-2000:])
    for line in [*failures, *more]:
        print(line)
    holds = not failures and not more and sanitized.returncode == 0 and good == options.cases
    figure = f"{tried - len(failures)} of {tried} grid cases and {good} of {options.cases} random ones within tolerance"
    verdict(holds, f"{figure} on {', '.join(names)}; sanitizers {'clean' if sanitized.returncode == 0 else 'REPORT'}")


def grid() -> Iterator[check.Gemm | check.Moe]:
    """Every combination that the issue names, once interleaved and once in the stored order."""
    product = itertools.product(check.BITS, GROUPS, check.DTYPES, SHAPES, (True, False), (True, False))
    for bits, group, dtype, (tokens, rows, columns), symmetric, int8 in product:
        for ordered in (False, True) if rows % 16 == 0 else (False,):
            yield check.Gemm(tokens, rows, columns, bits, min(group, columns), symmetric, dtype, ordered, int8)
    widths = [(bits, bits) for bits in check.BITS] + [(2, 4), (3, 8), (16, 4), (4, 16)]
    choices = itertools.product(widths, check.DTYPES, MOE_SIZES, check.ACTIVATIONS, (True, False))
    for pair, dtype, (tokens, slots, experts, hidden, inner), activation, biases in choices:
        ordered = hidden % 16 == 0 and inner % 16 == 0
        yield check.Moe(
            tokens, slots, experts, hidden, inner, pair, 32, biases, activation, biases, 0.2, dtype, ordered, False
        )


def operators() -> None:
    """PyTorch's own operator checks; raises where one fails."""
    generator = torch.Generator().manual_seed(0)
    for ordered in (False, True):
        sides = [
            check.random_stack((3, 32, 64), 3, 32, False, generator),
            check.random_stack((3, 64, 16), 4, 16, True, generator),
        ]
        side = check.random_stack((32, 64), 3, 32, False, generator)
        if ordered:
            side, sides = check.interleaved(side), [check.interleaved(s) for s in sides]
        x = torch.randn(2, 64, generator=generator)
        torch.library.opcheck(
            torch.ops.llmcompress.group_gemm.default, (x, side.weight, side.scale, side.zero, 3, 32, 64)
        )
        flat = [(s.weight, s.scale, s.zero, None, s.bits, s.group_size) for s in sides]
        index = torch.tensor([[0, 3], [2, 1]])
        arguments = (x, index, torch.rand(2, 2), *flat[0], *flat[1], 16, "silu", 1.7, 7.0)
        torch.library.opcheck(torch.ops.llmcompress.moe_group_gemm.default, arguments)


if __name__ == "__main__":
    main()
