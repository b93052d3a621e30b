"""The C++ kernels against float64: every instruction set, width, group, type, odd shapes, NaN-filled outputs."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from llmcompress_kernels import check, cpu, ops, processors, select
from llmcompress_kernels.reference.group_gemm import deinterleave, interleave, quantize_activations

pytestmark = pytest.mark.skipif(not cpu.ready(), reason="no native kernels")

# tokens, rows, columns: single ones, tails of every kind, more than one block of tokens
SHAPES = [
    (1, 16, 64),
    (1, 1, 1),
    (2, 33, 100),
    (3, 48, 257),
    (5, 16, 31),
    (8, 80, 256),
    (9, 32, 128),
    (0, 16, 64),
    (21, 7, 65),
]


def test_threads_that_spin_are_no_more_than_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    for have, expected in ((4, 4), (8, 6), (1, 1)):
        monkeypatch.setattr(processors, "count", lambda have=have: have)
        assert cpu.team(None) == expected
        # what is asked for is done
        assert cpu.team(7) == 7


@pytest.fixture(params=cpu.ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this CPU has."""
    if not cpu.set_isa(request.param):
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    cpu.set_isa(None)


@pytest.mark.parametrize("bits", check.BITS)
@pytest.mark.parametrize("group", [32, 64, 128, 1 << 20])
def test_group_gemm_is_near_float64(isa: str, bits: int, group: int) -> None:
    for number, ((tokens, rows, columns), dtype) in enumerate(itertools.product(SHAPES, check.DTYPES)):
        for symmetric, int8, ordered in ((True, False, False), (False, False, True), (False, True, False)):
            case = check.Gemm(
                tokens, rows, columns, bits, min(group, columns), symmetric, dtype, ordered and rows % 16 == 0, int8
            )
            found = case.run(torch.Generator().manual_seed(number))
            assert found <= case.tolerance, f"{case}: {found:.2e}"


@pytest.mark.parametrize("activation", check.ACTIVATIONS)
def test_moe_group_gemm_is_near_float64(isa: str, activation: str) -> None:
    cases = [
        check.Moe(7, 2, 4, 64, 48, (4, 2), 32, True, activation, True, 0.3, torch.bfloat16, True),
        check.Moe(7, 2, 4, 70, 33, (3, 8), 32, False, activation, False, 0.0, torch.float32, False),
        check.Moe(1, 4, 4, 64, 32, (3, 3), 64, False, activation, True, 0.0, torch.float16, True),
        check.Moe(90, 1, 1, 32, 16, (16, 4), 32, True, activation, True, 0.1, torch.bfloat16, True),  # two units
        check.Moe(5, 3, 6, 64, 64, (2, 16), 32, True, activation, False, 0.5, torch.float32, True),
        check.Moe(4, 2, 3, 64, 32, (16, 16), 32, True, activation, True, 0.0, torch.float32, False),
        check.Moe(6, 2, 3, 64, 32, (4, 4), 32, True, activation, False, 1.0, torch.float32, True),  # all skipped
        check.Moe(0, 2, 3, 64, 32, (4, 4), 32, True, activation, False, 0.0, torch.float32, True),
        check.Moe(24, 2, 3, 64, 32, (4, 4), 32, True, activation, False, 0.0, torch.float32, True, int8=True),
    ]
    for case in cases:
        found = case.run(torch.Generator().manual_seed(3))
        assert found <= case.tolerance, f"{case}: {found:.2e}"


def test_random_cases() -> None:
    names, good, failures = check.run(400, seed=1)
    assert not failures, failures
    assert good == 400
    assert "portable" in names


@pytest.mark.slow
def test_many_random_cases() -> None:
    _, _, failures = check.run(5000, seed=2)
    assert not failures, failures


@pytest.mark.parametrize("bits", check.BITS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("int8", [False, True])
def test_integers_are_exact(isa: str, bits: int, dtype: torch.dtype, int8: bool) -> None:
    """Small integers times codes, with scales that are powers of two: not one bit may be off."""
    side = check.random_stack((32, 160), bits, 64, False, torch.Generator().manual_seed(bits))
    scale = torch.full_like(side.scale, 0.125)
    x = torch.randint(-31, 32, (11, 160)).float()
    x[:, ::32] = 127  # the int8 scale is then exactly one
    weight = (
        ops.unpack(side.weight, bits, 160).double()
        - ops.unpack(side.zero, bits, 3).double().repeat_interleave(64, 1)[:, :160]
    )
    expected = (x.double() @ weight.T * 0.125).float().to(dtype)
    found = ops.group_gemm(x.to(dtype), side.weight, scale, side.zero, bits, 64, 160, int8)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("bits", check.BITS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_fit(isa: str, bits: int, int8: bool, sign: int) -> None:
    """The largest codes times -128 in the low plane, for as long as a chunk can be: 16 bits hold a part of them."""
    columns, largest = 256, (1 << bits) - 1
    packed = ops.pack(torch.full((64, columns), largest, dtype=torch.uint8), bits)
    scale, zero = torch.full((64, 1), 0.125, dtype=torch.float16), ops.pack(torch.zeros(64, 1, dtype=torch.uint8), bits)
    # 127 steps of the int8 scale; 16000 of 2^14 steps, which are 62.5 times 256
    value = sign * (127 / 64 if int8 else 16000 / 8192)
    x = torch.full((13, columns), value, dtype=torch.bfloat16)
    expected = torch.full((13, 64), value * columns * largest * 0.125).to(torch.bfloat16)
    for side in ((packed, scale, zero), (interleave(packed), interleave(scale), interleave(zero))):
        for tokens in (1, 2, 5, 13):
            found = ops.group_gemm(x[:tokens], *side, bits, columns, columns, int8)
            assert torch.equal(found, expected[:tokens])


@pytest.mark.parametrize("bits", check.BITS)
@pytest.mark.parametrize(("dtype", "int8"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)])
@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_the_width_of_a_chunk_does_not_change_its_numbers(
    isa: str, bits: int, dtype: torch.dtype, int8: bool, tokens: int
) -> None:
    """Chunks of whole registers are quantized by a path of their own; a shorter one with the same values is not."""
    whole, part = (64, 48) if int8 else (128, 112)
    generator = torch.Generator().manual_seed(bits)
    sizes = torch.tensor([1e-3, 1, 1e3]).repeat(3)[:tokens, None]
    x = torch.randn(tokens, whole, generator=generator) * sizes
    x[:, part:] = 0
    x = x.to(dtype)
    if tokens > 1:
        x[1] = 0
        x[2, 5] = float("inf")
    side = check.random_stack((64, whole), bits, whole, False, generator)
    codes = ops.unpack(side.weight, bits, whole)[:, :part].contiguous()
    wide = ops.group_gemm(x, side.weight, side.scale, side.zero, bits, whole, whole, int8)
    short = ops.group_gemm(
        x[:, :part].contiguous(), ops.pack(codes, bits), side.scale, side.zero, bits, whole, part, int8
    )
    assert torch.equal(wide.nan_to_num(7), short.nan_to_num(7))
    assert wide.isfinite().all() == (tokens == 1)


def test_int8_agrees_with_its_definition(isa: str) -> None:
    side = check.random_stack((48, 200), 4, 64, False, torch.Generator().manual_seed(0))
    x = torch.randn(9, 200)
    arguments = (x, side.weight, side.scale, side.zero, 4, 64, 200, True)
    found, expected = ops.group_gemm(*arguments), torch.ops.llmcompress.group_gemm_definition(*arguments)
    assert float((found - expected).norm() / expected.norm()) < 1e-5
    rounded = quantize_activations(x, 64)
    assert 1e-3 < float((rounded - x).norm() / x.norm()) < 8e-3


@pytest.mark.parametrize(
    ("bits", "symmetric", "group"),
    [
        *((2, False, 96), (3, False, 96), (4, True, 96), (8, False, 96), (8, True, 96)),
        *((2, False, 64), (3, False, 64), (4, False, 64), (2, True, 1100), (8, False, 1100), (8, True, 1100)),
    ],
)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_many_tokens_give_the_bits_of_one(
    isa: str, bits: int, symmetric: bool, group: int, int8: bool, dtype: torch.dtype
) -> None:
    """Up to 16 tokens run in blocks of 1 to 8, more in panels of 384 columns, 128 tokens and two blocks of rows."""
    stack = check.random_stack((48, 1100), bits, group, symmetric, torch.Generator().manual_seed(bits))
    side = check.interleaved(stack)
    # int8 rows of 8 bits and one scale have it multiplied in at the end; float32 leaves the loop, others follow it
    operands = (side.weight, side.scale, side.zero, bits, group, 1100, int8)
    x = torch.randn(139, 1100, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[1] = 0
    x[5, 3] = float("nan")
    alone = torch.stack([ops.group_gemm(row, *operands) for row in x])
    assert alone.isnan().all(1).nonzero().flatten().tolist() == [5]
    for tokens in (*range(2, 26), 139):
        found = ops.group_gemm(x[:tokens], *operands)
        assert torch.equal(found.isnan(), alone[:tokens].isnan())
        assert torch.equal(found.nan_to_num(7), alone[:tokens].nan_to_num(7))


def test_results_do_not_depend_on_threads_batch_or_order(isa: str) -> None:
    side = check.random_stack((512, 300), 3, 32, False, torch.Generator().manual_seed(0))
    other = check.interleaved(side)
    x = torch.randn(37, 300).to(torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = ops.group_gemm(x, side.weight, side.scale, side.zero, 3, 32, 300)
        torch.set_num_threads(2)
        found = ops.group_gemm(x, other.weight, other.scale, other.zero, 3, 32, 300)
        # threads share out the rounding of one block of tokens
        few = {n: ops.group_gemm(x[:n], other.weight, other.scale, other.zero, 3, 32, 300) for n in (2, 5, 8, 12)}
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found, alone)
    for tokens, some in few.items():
        assert torch.equal(some, alone[:tokens])
    for row in range(37):
        assert torch.equal(ops.group_gemm(x[row], other.weight, other.scale, other.zero, 3, 32, 300), alone[row])
        assert torch.equal(ops.group_gemm(x[row], side.weight, side.scale, side.zero, 3, 32, 300), alone[row])


def test_interleaving_keeps_every_byte() -> None:
    tensor = torch.randint(-(2**31), 2**31 - 1, (3, 48, 5), dtype=torch.int32)
    assert torch.equal(deinterleave(interleave(tensor)), tensor)
    assert interleave(tensor).numel() == tensor.numel()
    assert torch.equal(interleave(tensor)[1, 2, 4, 7], tensor[1, 39, 4])


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_value_that_is_not_finite_spoils_its_own_token_only(isa: str, value: float) -> None:
    side = check.random_stack((16, 64), 4, 32, True, torch.Generator().manual_seed(0))
    x = torch.randn(3, 64)
    clean = ops.group_gemm(x, side.weight, side.scale, None, 4, 32, 64)
    x[1, 40] = value
    found = ops.group_gemm(x, side.weight, side.scale, None, 4, 32, 64)
    assert not torch.isfinite(found[1]).any()
    assert torch.equal(found[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("size", [1e-25, 1e25])
def test_extreme_sizes_keep_their_accuracy(isa: str, size: float) -> None:
    side = check.random_stack((16, 64), 4, 32, True, torch.Generator().manual_seed(0))
    x = torch.randn(3, 64)
    plain = ops.group_gemm(x, side.weight, side.scale, None, 4, 32, 64)
    found = ops.group_gemm(x * size, side.weight, side.scale, None, 4, 32, 64)
    assert float((found.double() / size - plain.double()).abs().max()) < 1e-4


@pytest.mark.parametrize("exponent", [-80, 123])
@pytest.mark.parametrize(
    ("bits", "tokens", "dtype"), [(4, 3, torch.float32), (8, 8, torch.bfloat16), (3, 40, torch.bfloat16)]
)
def test_a_power_of_two_changes_no_digit(isa: str, bits: int, tokens: int, dtype: torch.dtype, exponent: int) -> None:
    """Sums of codes times inputs may be larger than any float32, while what comes out is not."""
    side = check.random_stack((32, 64), bits, 32, True, torch.Generator().manual_seed(0))
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(1)).to(dtype)
    plain = ops.group_gemm(x, side.weight, side.scale / 64, None, bits, 32, 64)
    found = ops.group_gemm(x * 2.0**exponent, side.weight, side.scale / 64, None, bits, 32, 64)
    assert torch.equal(found, plain * 2.0**exponent)
    assert found.isfinite().all()


def test_what_the_kernels_decline_runs_by_the_definition() -> None:
    side = check.random_stack((16, 48), 3, 16, False, torch.Generator().manual_seed(0))  # groups inside a word
    x = torch.randn(3, 48)
    arguments = (side.weight, side.scale, side.zero, 3, 16, 48)
    expected = torch.ops.llmcompress.group_gemm_definition(x, *arguments)
    assert torch.equal(ops.group_gemm(x, *arguments), expected)
    assert ops.group_gemm(x.double(), *arguments).dtype == torch.float64
    # how torch sums the columns of a transposed matrix depends on the processor
    torch.testing.assert_close(ops.group_gemm(x.T.contiguous().T, *arguments), expected, rtol=1e-5, atol=1e-5)


def test_views_and_leading_dimensions() -> None:
    side = check.random_stack((32, 64), 4, 32, False, torch.Generator().manual_seed(0))
    arguments = (side.weight, side.scale, side.zero, 4, 32, 64)
    x = torch.randn(2, 3, 128)
    found = ops.group_gemm(x[..., ::2], *arguments)
    assert found.shape == (2, 3, 32)
    assert torch.equal(found, ops.group_gemm(x[..., ::2].contiguous(), *arguments))
    assert torch.equal(found[1, 2], ops.group_gemm(x[1, 2, ::2], *arguments))


def moe_arguments(dtype: torch.dtype = torch.float32) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(0)
    up = check.interleaved(check.random_stack((3, 32, 64), 3, 32, False, generator))
    down = check.interleaved(check.random_stack((3, 64, 16), 4, 16, True, generator))
    sides = [(s.weight, s.scale, s.zero, None, s.bits, s.group_size) for s in (up, down)]
    index = torch.tensor([[0, 3], [2, 1]])
    return (torch.randn(2, 64).to(dtype), index, torch.rand(2, 2), *sides[0], *sides[1], 16, "silu", 1.7, 7.0)


def test_opcheck() -> None:
    side = check.interleaved(check.random_stack((32, 64), 3, 32, False, torch.Generator().manual_seed(0)))
    linear = (torch.randn(2, 64), side.weight, side.scale, side.zero, 3, 32, 64)
    torch.library.opcheck(torch.ops.llmcompress.group_gemm.default, linear)
    torch.library.opcheck(torch.ops.llmcompress.moe_group_gemm.default, moe_arguments())


def test_compiles_without_a_break() -> None:
    arguments = moe_arguments()

    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.llmcompress.moe_group_gemm(x, *arguments[1:]) + 1

    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(arguments[0]), layer(arguments[0]))


@pytest.mark.parametrize("slots", [[0, 2], [1, 1], [3, 2], [3, 3]], ids=["two", "the same twice", "one", "none"])
def test_one_token_of_experts_gives_the_bits_of_many(isa: str, slots: list[int]) -> None:
    """Alone, a token is quantized once for all of its experts; among others, once per expert."""
    arguments = list(moe_arguments())
    arguments[1] = torch.tensor([[1, 0], slots])
    both = torch.ops.llmcompress.moe_group_gemm(*arguments)
    alone = [part[1:].contiguous() for part in arguments[:3]]
    assert torch.equal(torch.ops.llmcompress.moe_group_gemm(*alone, *arguments[3:]), both[1:])


def test_a_negative_expert_is_refused() -> None:
    arguments = list(moe_arguments())
    arguments[1] = torch.tensor([[0, -1], [2, 1]])
    with pytest.raises(ValueError, match="experts -1 to 2, expected 0 to"):
        torch.ops.llmcompress.moe_group_gemm(*arguments)


CHOICE = """
import torch
from llmcompress_kernels import check, cpu, ops, select
x = check.Gemm(3, 32, 64, 4, 32, True, torch.float32, True).run(torch.Generator().manual_seed(0))
side = check.interleaved(check.random_stack((32, 64), 4, 32, True, torch.Generator().manual_seed(0)))
y = ops.group_gemm(torch.ones(1, 64), side.weight, side.scale, None, 4, 32, 64)
row = next(row for row in select.explain() if row.op == "group_gemm" and row.implementation == "cpu")
print(cpu.ready(), row.used, row.reason, float(y.sum()))
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({select.VARIABLE: "reference"}, "False False LLMCOMPRESS_KERNELS=reference"),
        ({cpu.ISA_VARIABLE: "mmx"}, "False False LLMCOMPRESS_CPU_ISA=mmx is not one of"),
        ({"CXX": "/nowhere/g++", "LLMCOMPRESS_CACHE": "/nowhere"}, "False False CXX=/nowhere/g++ is not an executable"),
        ({cpu.ISA_VARIABLE: "portable"}, "True True "),
    ],
)
def test_everything_runs_without_native_kernels_and_says_why(environment: dict[str, str], expected: str) -> None:
    # a cold cache compiles kernels first: minutes on a machine that does other things
    done = subprocess.run(
        [sys.executable, "-c", CHOICE], capture_output=True, text=True, timeout=1800, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(expected), done.stdout + done.stderr
