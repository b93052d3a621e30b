"""Random products by emulated AVX-512: near float64, and those of one matrix to the bit what AVX2 makes of them.

python -m emulated.products CASES SEED
"""

from __future__ import annotations

import sys

import torch
from emulated import toolchain
from llmcompress_kernels import check, cpu
from torch import Tensor


def product(case: check.Gemm, seed: int, isa: str) -> Tensor:
    """What an instruction set makes of a case, ``[tokens, rows]``."""
    assert cpu.set_isa(isa)
    generator = torch.Generator().manual_seed(seed)
    side = check.random_stack((case.rows, case.columns), case.bits, case.group, case.symmetric, generator)
    side = check.interleaved(side) if case.interleaved else side
    x = torch.randn(case.tokens, case.columns, generator=generator).to(case.dtype)
    sizes = (case.bits, case.group, case.columns, case.int8)
    return torch.ops.llmcompress.group_gemm(x, side.weight, side.scale, side.zero, *sizes)  # type: ignore[no-any-return]


def main() -> int:
    """Print what is off and a summary; 1 if anything is."""
    count, seed = int(sys.argv[1]), int(sys.argv[2])
    toolchain.install()
    assert cpu.ready()
    cpu.ISAS = ("avx512",)
    names, good, failures = check.run(count, seed)
    same = {}
    for number, case in enumerate(check.random_cases(count, seed + 1)):
        if isinstance(case, check.Gemm):
            same[number] = torch.equal(product(case, number, "avx512"), product(case, number, "avx2"))
            failures += [] if same[number] else [f"{case}: AVX2 gives other bits"]
    print(*failures, sep="\n")
    print(f"{good} of {count} near float64 on {', '.join(names)}; {sum(same.values())} of {len(same)} as on AVX2")
    return int(bool(failures) or names != ["avx512"])


if __name__ == "__main__":
    sys.exit(main())
