"""The column loop in C++ against its definition in plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from llmcompress_kernels import columns as native

from llmcompress.algorithms.gptq import GptqOptions, Solution, solve
from llmcompress.algorithms.hessian import output_energy, reversed_matrix
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
    w: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, options: GptqOptions, monkeypatch: pytest.MonkeyPatch,
    usable: list[bool] | None = None,
) -> Solution:  # fmt: skip
    with monkeypatch.context() as patch:
        patch.setenv("LLMCOMPRESS_KERNELS", "reference")
        assert not native.ready()
        return solve(w, hessian, spec, options, usable)


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


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "columns", "group", "bits", "symmetric"),
    [(33, 72, 16, 4, False), (7, 300, -1, 3, True), (40, 330, 150, 4, False), (33, 260, 24, 2, False)],
)  # fmt: skip
def test_fitted_scales_errors_and_energies_equal_the_definition(
    rows: int, columns: int, group: int, bits: int, symmetric: bool, isa: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In several chunks and blocks, with a dead input, and an expert that has to be rounded."""
    monkeypatch.setenv("LLMCOMPRESS_CPU_ISA", isa)
    spec, options = QuantSpec(bits, group, symmetric), GptqOptions(act_order="groups", refit=True, damp=0.02)
    w, hessian = problem(3, rows, columns)
    hessian[0, 5], hessian[0, :, 5] = 0, 0
    usable = [True, True, False]
    plain = by_definition(w, hessian, spec, options, monkeypatch, usable)
    found = solve(w, hessian, spec, options, usable)
    assert found.damp == plain.damp == [0.02, 0.02, 0.0]
    same = (found.codes == plain.codes).all(-1)
    assert same.float().mean() > 0.9
    torch.testing.assert_close(found.energy, plain.energy, rtol=1e-4, atol=0)
    torch.testing.assert_close(found.error[same], plain.error[same], rtol=2e-3, atol=0)
    # a scale half-way between two values of fp16 may go either way
    torch.testing.assert_close(found.scale[same].float(), plain.scale[same].float(), rtol=2e-3, atol=0)
    assert (found.scale[same] == plain.scale[same]).float().mean() > 0.9
    values = dequantize(found.codes, found.scale, found.zero, spec)
    assert torch.equal(found.quantized, values)
    exact = output_energy(w.double() - values.double(), hessian.double())
    torch.testing.assert_close(found.error.double(), exact, rtol=1e-3, atol=0)


def test_very_many_groups_are_fitted_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, options = QuantSpec(4, 8), GptqOptions(refit=True)
    w, hessian = problem(1, 9, 64)
    whole = solve(w, hessian, spec, options)
    monkeypatch.setattr(native, "FITTED_GROUPS", 7)
    found = solve(w, hessian, spec, options)
    assert torch.equal(found.codes, whole.codes)
    torch.testing.assert_close(found.scale.float(), whole.scale.float(), rtol=2e-3, atol=0)
    torch.testing.assert_close(found.error, whole.error, rtol=2e-3, atol=0)


@pytest.mark.parametrize("ordered", [True, False])
def test_reversed_triangles_equal_their_definition(ordered: bool) -> None:
    _, hessian = problem(2, 1, 300)
    order = torch.stack([torch.randperm(300), torch.randperm(300)]) if ordered else None
    out = torch.full_like(hessian, 7.0)
    found = native.reversed_lower(hessian, order, out)
    assert found is out
    assert torch.equal(found.tril(), reversed_matrix(hessian, order).tril())


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
