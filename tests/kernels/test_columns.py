"""The column loop in C++ against its definition in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llmcompress_kernels import columns as native

from llmcompress.algorithms.gptq import GptqOptions, Solution, solve
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec

ISAS = ("avx512", "avx2", "portable")

if not native.ready():
    pytest.skip("no C++ compiler", allow_module_level=True)


@pytest.fixture(autouse=True)
def fresh_choice(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("LLMCOMPRESS_KERNELS", "LLMCOMPRESS_CPU_ISA"):
        monkeypatch.delenv(name, raising=False)
    yield


def problem(experts: int, rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    w = torch.randn(experts, rows, columns, generator=generator) / 20
    x = torch.randn(experts, 3 * columns, columns, generator=generator)
    x = x @ torch.randn(experts, columns, columns, generator=generator)
    return w, 2 * x.transpose(1, 2) @ x / x.shape[1]


def by_definition(
    w: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, options: GptqOptions, monkeypatch: pytest.MonkeyPatch
) -> Solution:
    with monkeypatch.context() as patch:
        patch.setenv("LLMCOMPRESS_KERNELS", "reference")
        assert not native.ready()
        return solve(w, hessian, spec, options)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("bits", "symmetric", "group", "block", "grid"),
    [
        (4, False, 16, 32, "mse"), (2, False, 16, 32, "mse"), (3, True, 32, 16, "mse"), (2, True, 16, 64, "minmax"),
        (8, False, 24, 32, "mse"), (4, True, -1, 16, "mse"), (3, False, 16, 128, "minmax"),
    ],
)  # fmt: skip
def test_equals_the_definition(
    bits: int, symmetric: bool, group: int, block: int, grid: str, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMCOMPRESS_CPU_ISA", isa)
    spec = QuantSpec(bits, group, symmetric)
    # rows that do not fill a tile, a last group that ends early
    for rows, columns in ((33, 72), (7, 70), (64, 48)):
        for act_order in (False, "groups"):
            options = GptqOptions(block=block, grid=grid, act_order=act_order)  # type: ignore[arg-type]
            w, hessian = problem(2, rows, columns)
            plain = by_definition(w, hessian, spec, options, monkeypatch)
            found = solve(w, hessian, spec, options)
            # a weight on a rounding boundary may go either way and pull the rest of its row along
            assert (found.codes == plain.codes).float().mean() > (0.97 if bits < 8 else 0.9)
            assert (found.scale == plain.scale).float().mean() > 0.95
            torch.testing.assert_close(found.error.sum(), plain.error.sum(), rtol=0.02, atol=0)
            assert (found.zero is None) == symmetric
            values = dequantize(found.codes, found.scale, found.zero, spec)
            assert torch.equal(found.quantized, values)


def test_scales_in_and_below_the_normal_range_of_fp16_and_rows_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(1, 32, 32)
    w *= torch.logspace(-9, 6, 32)[None, :, None]
    w[0, 5] = 0
    spec = QuantSpec(4, 16)
    plain = by_definition(w, hessian, spec, GptqOptions(), monkeypatch)
    found = solve(w, hessian, spec, GptqOptions())
    assert (found.scale == plain.scale).float().mean() > 0.95
    assert float(found.quantized[0, 5].abs().max()) == 0
    assert bool((found.scale[0, 5] == 1).all())
    assert bool(torch.isfinite(found.scale).all())


def test_threads_and_company_do_not_change_a_bit() -> None:
    w, hessian = problem(3, 100, 64)
    spec, options = QuantSpec(3, 16, symmetric=False), GptqOptions(act_order="groups")
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(solve(w, hessian, spec, options))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0].codes, found[1].codes)
    alone = solve(w[1:2], hessian[1:2], spec, options)
    assert torch.equal(alone.codes[0], found[0].codes[1])


def test_cases_it_does_not_know_run_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_arguments: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(native, "quantize", unexpected)
    w, hessian = problem(1, 8, 32)
    solve(w, hessian, QuantSpec(4, 16), GptqOptions(static_groups=True, act_order=True))
    with pytest.raises(AssertionError, match="called"):
        solve(w, hessian, QuantSpec(4, 16), GptqOptions())
