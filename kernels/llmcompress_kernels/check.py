"""Random cases for the operators, their float64 truth, and how far an implementation may be from it.

    python -m llmcompress_kernels check --cases 200 --seed 0        # every instruction set that this CPU has

Sizes are drawn so that odd ones, single rows, empty inputs and last groups that end early are frequent. Outputs are
filled with NaN before they are computed, so an element that was never written shows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels import cpu, ops
from llmcompress_kernels.ops import Stack
from llmcompress_kernels.reference.group_gemm import decode, interleave
from llmcompress_kernels.reference.moe_group_gemm import ACTIVATIONS, DENSE_BITS, first_rows

BITS = (2, 3, 4, 8)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# relative Frobenius error against float64 on the same codes; 16-bit types round their output (2**-9 and 2**-12)
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 3e-3, torch.float16: 6e-4}
INT8_TOLERANCE = 8e-3
# two projections, an activation and a weighted sum
MOE_TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1.5e-3}
MOE_INT8_TOLERANCE = 3e-2
# below this many outputs the error of rounding to int8 is a matter of luck
FEW_OUTPUTS = 256


@dataclass(frozen=True)
class Gemm:
    """One call of ``group_gemm``."""

    tokens: int
    rows: int
    columns: int
    bits: int
    group: int
    symmetric: bool
    dtype: torch.dtype
    interleaved: bool
    int8: bool = False

    @property
    def tolerance(self) -> float:
        """Largest error allowed, see :func:`error`."""
        if not self.int8:
            return TOLERANCE[self.dtype]
        return INT8_TOLERANCE * (3 if self.tokens * self.rows < FEW_OUTPUTS else 1)

    def run(self, generator: torch.Generator) -> float:
        """Call the operator on random values and return its error; infinite if an output was not written."""
        side = random_stack((self.rows, self.columns), self.bits, self.group, self.symmetric, generator)
        x = torch.randn(self.tokens, self.columns, generator=generator).to(self.dtype)
        weight = decode(side.weight, side.scale, side.zero, self.bits, self.group, self.columns).double()  # type: ignore[arg-type]
        if self.interleaved:
            side = interleaved(side)
        arguments = (x, side.weight, side.scale, side.zero, self.bits, self.group, self.columns, self.int8)
        with nan_filled():
            found = torch.ops.llmcompress.group_gemm(*arguments)
        expected = x.double() @ weight.T
        # where sums cancel by chance, errors are compared with the size that they would have otherwise
        usual = float(x.double().norm() * weight.norm()) / max(1, self.columns) ** 0.5
        made = error(found, expected, self.dtype, usual)
        if self.int8 and made > self.tolerance:
            twin = torch.ops.llmcompress.group_gemm_definition(*arguments)
            return unlucky(made, error(found, twin.double(), self.dtype, usual), self.tolerance, TOLERANCE[self.dtype])
        return made


@dataclass(frozen=True)
class Moe:
    """One call of ``moe_group_gemm``."""

    tokens: int
    slots: int
    experts: int
    hidden: int
    intermediate: int
    bits: tuple[int, int]
    group: int
    symmetric: bool
    activation: str
    biases: bool
    skipped: float
    dtype: torch.dtype
    interleaved: bool
    int8: bool = False

    @property
    def tolerance(self) -> float:
        """Largest error allowed, see :func:`error`."""
        if not self.int8:
            return MOE_TOLERANCE[self.dtype]
        return MOE_INT8_TOLERANCE * (2 if self.tokens * self.hidden < FEW_OUTPUTS else 1)

    def run(self, generator: torch.Generator) -> float:
        """Call the operator on random values and return its error; infinite if an output was not written."""
        rows = first_rows(self.intermediate, self.activation)
        shapes = (rows, self.hidden), (self.hidden, self.intermediate)
        sides, truths = [], []
        for (rows, columns), bits in zip(shapes, self.bits):
            size = columns**-0.5
            bias = torch.randn(self.experts, rows, generator=generator).to(self.dtype) if self.biases else None
            if bits == DENSE_BITS:
                weight = (torch.randn(self.experts, rows, columns, generator=generator) * size).to(self.dtype)
                sides.append(Stack(weight, bias=bias))
                truths.append(Stack(weight.double(), bias=bias))
                continue
            shape = (self.experts, rows, columns)
            side = random_stack(
                shape, bits, min(self.group, columns), self.symmetric, generator, size / (1 << bits) * 3
            )
            weight = decode(side.weight, side.scale, side.zero, bits, side.group_size, columns).double()  # type: ignore[arg-type]
            truths.append(Stack(weight, bias=bias))
            side = replace(side, bias=bias)
            sides.append(interleaved(side) if self.interleaved else side)
        x = torch.randn(self.tokens, self.hidden, generator=generator).to(self.dtype)
        index = torch.rand(self.tokens, self.experts, generator=generator).argsort(-1)[:, : self.slots]
        index = index.masked_fill(torch.rand(index.shape, generator=generator) < self.skipped, self.experts)
        weights = torch.rand(index.shape, generator=generator).to(self.dtype)
        arguments = (*self._arguments(x, index, weights, *sides), self.int8)
        with nan_filled():
            found = torch.ops.llmcompress.moe_group_gemm(*arguments)
        expected = torch.ops.llmcompress.moe_group_gemm_definition(
            *self._arguments(x.double(), index, weights.double(), *truths)
        )
        made = error(found, expected, self.dtype, 0.0)
        if self.int8 and made > self.tolerance:
            # the same values in fp32: kernels round nothing in between, where a step of fp16 may move an int8 by one
            twin = torch.ops.llmcompress.moe_group_gemm_definition(
                *self._arguments(x.float(), index, weights.float(), *sides), self.int8
            )
            return unlucky(
                made, error(found, twin.double(), self.dtype, 0.0), self.tolerance, MOE_TOLERANCE[self.dtype]
            )
        return made

    def _arguments(self, x: Tensor, index: Tensor, weights: Tensor, up: Stack, down: Stack) -> tuple[Any, ...]:
        sides = [(s.weight, s.scale, s.zero, s.bias, s.bits, s.group_size) for s in (up, down)]
        return (x, index, weights, *sides[0], *sides[1], self.intermediate, self.activation, 1.5, 2.0)


def random_stack(
    shape: tuple[int, ...], bits: int, group: int, symmetric: bool, generator: torch.Generator, step: float = 0.05
) -> Stack:
    """A packed weight with random codes, zero points, and scales around ``step``."""
    groups = -(-shape[-1] // group)
    codes = torch.randint(0, 1 << bits, shape, dtype=torch.uint8, generator=generator)
    scale = (torch.rand(*shape[:-1], groups, generator=generator) + 0.5).mul(step).to(torch.float16)
    zero = torch.randint(0, 1 << bits, (*shape[:-1], groups), dtype=torch.uint8, generator=generator)
    return Stack(ops.pack(codes, bits), scale, None if symmetric else ops.pack(zero, bits), None, bits, group)


def interleaved(side: Stack) -> Stack:
    """The same weight with the words of 16 rows side by side."""
    scale, zero = side.scale, side.zero
    return replace(
        side,
        weight=interleave(side.weight),
        scale=None if scale is None else interleave(scale),
        zero=None if zero is None else interleave(zero),
    )


def error(found: Tensor, expected: Tensor, dtype: torch.dtype, usual: float) -> float:
    """Relative Frobenius distance; infinite for a wrong shape or type, or a value that is not finite."""
    if found.shape != expected.shape or found.dtype != dtype or not bool(torch.isfinite(found).all()):
        return float("inf")
    size = max(float(expected.norm()), usual)
    return float((found.double() - expected).norm()) / size if size else float(found.abs().sum())


def unlucky(made: float, beside_twin: float, allowed: float, exact: float) -> float:
    """The error to judge where rounding the inputs to 8 bits cost more than usual.

    With few values a large one among them may widen every step, which is no fault of a kernel: it is then held to its
    definition, which rounds the same inputs, as tightly as a call without rounding is held to float64.

    Args:
        made: Error against float64 without rounding.
        beside_twin: Error against the definition with rounding.
        allowed: Largest error of the usual case.
        exact: Largest error of a call without rounding.

    Returns:
        ``allowed`` where kernel and definition agree, else ``made``.
    """
    return allowed if beside_twin <= exact else made


@contextlib.contextmanager
def nan_filled() -> Iterator[None]:
    """The native kernels fill their outputs with NaN first, meanwhile."""
    if not cpu.ready():
        yield
        return
    library = cpu.library()
    library.llmcompress_fill_with_nan(1)
    try:
        yield
    finally:
        library.llmcompress_fill_with_nan(0)


def random_cases(count: int, seed: int) -> Iterator[Gemm | Moe]:
    """Cases in random order of sizes; every fifth is a mixture of experts."""
    generator = torch.Generator().manual_seed(seed)

    def pick(values: Any) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    for number in range(count):
        bits, dtype, ordered = pick(BITS), pick(DTYPES), pick((True, False))
        if number % 5 == 4:
            lanes = 16 if ordered else 1
            hidden, inner = lanes * pick(range(1, 5 if ordered else 70)), lanes * pick(range(1, 5 if ordered else 50))
            experts = pick(range(1, 7))
            yield Moe(
                pick((0, 1, 2, 3, 9, 17)), pick(range(1, experts + 1)), experts, hidden, inner,
                (pick((*BITS, DENSE_BITS)), pick((*BITS, DENSE_BITS))), pick((32, 64, 128)), pick((True, False)),
                pick(ACTIVATIONS), pick((True, False)), pick((0.0, 0.3, 1.0)), dtype, ordered, pick((1, 0, 0)) == 1,
            )  # fmt: skip
            continue
        rows = 16 * pick(range(1, 6)) if ordered else pick(range(1, 80))
        columns = pick((1, 2, 5, 31, 32, 33, 63, 64, 100, 127, 200, 256, 257, 300, 511, 777))
        group = min(columns, pick((16, 32, 64, 96, 128, 256, 1 << 20)))
        if bits == 3 and group == 16 and columns > 16:
            group = 32  # groups that do not begin at a word run by the definition
        tokens = pick((0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 31))
        yield Gemm(tokens, rows, columns, bits, group, pick((True, False)), dtype, ordered, pick((True, False, False)))


def run(count: int, seed: int) -> tuple[list[str], int, list[str]]:
    """Run random cases, in turn on every instruction set that this CPU has.

    Returns:
        Instruction sets, number of cases that hold, and a line for every case that does not.
    """
    names = [name for name in cpu.ISAS if cpu.set_isa(name)]
    failures = []
    for number, case in enumerate(random_cases(count, seed)):
        name = names[number % len(names)]
        cpu.set_isa(name)
        found = case.run(torch.Generator().manual_seed(seed + number))
        if not found <= case.tolerance:
            failures.append(f"{name} {case}: error {found:.2e}, allowed {case.tolerance:.1e}")
    cpu.set_isa(None)
    return names, count - len(failures), failures
