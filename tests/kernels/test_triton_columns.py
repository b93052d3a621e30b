"""The steps of GPTQ's column loop in Triton against their definition: under the interpreter, and on a GPU."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from llmcompress_kernels import columns as native

from llmcompress.algorithms.gptq import GptqOptions, Solution, solve
from llmcompress.quant.codecs.delta_tree import node_spec
from llmcompress.quant.spec import QuantSpec

triton = pytest.importorskip("triton", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")

CASES = [
    (QuantSpec(4, 16), "mse", False),
    (QuantSpec(3, 72), "mse", "groups"),
    (QuantSpec(2, 32, True), "minmax", False),
    (QuantSpec(8, 24), "mse", "groups"),
    (QuantSpec(4, -1), "mse", False),
    (node_spec(1, 72), "mse", "groups"),
    (node_spec(3, 16), "mse", False),
]
SWEEPS = (0, 2)  # fmt: skip


def problem(experts: int, rows: int, columns: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows + columns)
    w = torch.randn(experts, rows, columns, generator=generator) / 20
    x = torch.randn(experts, 3 * columns, columns, generator=generator)
    x = x @ torch.randn(experts, columns, columns, generator=generator)
    return w.to(device), (2 * x.transpose(1, 2) @ x / x.shape[1]).to(device)


def both(
    monkeypatch: pytest.MonkeyPatch, w: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, options: GptqOptions
) -> tuple[Solution, Solution]:
    """The kernel's solution and the definition's."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "ready", lambda: False)
        patch.setattr(native, "fuses", lambda device: False)
        plain = solve(w, hessian, spec, options)
        patch.setattr(native, "fuses", lambda device: True)
        return solve(w, hessian, spec, options), plain


def agree(found: Solution, plain: Solution, bits: int) -> None:
    # a weight on a rounding boundary may go either way and pull the rest of its row along
    assert (found.codes == plain.codes).float().mean() > (0.97 if bits < 8 else 0.9)
    assert (found.scale == plain.scale).float().mean() > 0.95
    torch.testing.assert_close(found.error.sum(), plain.error.sum(), rtol=0.02, atol=0)


@pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET is not set")
@pytest.mark.skipif(triton.__version__ < "3.9" and np.__version__ >= "2.4", reason="this triton needs numpy < 2.4")
@pytest.mark.parametrize(("spec", "grid", "order"), CASES)
@pytest.mark.parametrize("sweeps", SWEEPS)
def test_interpreted(
    spec: QuantSpec, grid: str, order: bool | str, sweeps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # rows that do not fill a tile, a last group that ends early, two experts
    w, hessian = problem(2, 21, 88, "cpu")
    found, plain = both(
        monkeypatch, w, hessian, spec, GptqOptions(grid=grid, act_order=order, refit=spec.half, sweeps=sweeps)
    )  # type: ignore[arg-type]
    agree(found, plain, spec.bits)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or not torch.cuda.is_available(), reason="no CUDA device, or TRITON_INTERPRET is set")
@pytest.mark.parametrize(("spec", "grid", "order"), CASES)
@pytest.mark.parametrize("sweeps", SWEEPS)
def test_on_a_gpu(spec: QuantSpec, grid: str, order: bool | str, sweeps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(2, 333, 600, "cuda")
    found, plain = both(
        monkeypatch, w, hessian, spec, GptqOptions(grid=grid, act_order=order, refit=spec.half, sweeps=sweeps)
    )  # type: ignore[arg-type]
    agree(found, plain, spec.bits)
    assert native.fuses("cuda")


def test_a_range_lies_in_one_group_and_every_column_in_one_range() -> None:
    for columns, group, most in ((120, 96, 64), (100, 16, 64), (64, 64, 64), (130, 130, 64)):
        bounds = native.spans(columns, group, most)
        assert [c for start, stop in bounds for c in range(start, stop)] == list(range(columns))
        assert all(start // group == (stop - 1) // group and stop - start <= most for start, stop in bounds)


def test_fixed_grids_run_by_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    def unexpected(*_arguments: object) -> None:
        raise AssertionError("called")

    monkeypatch.setattr(native, "ready", lambda: False)
    monkeypatch.setattr(native, "fuses", lambda device: True)
    monkeypatch.setattr(native, "quantize_span", unexpected)
    w, hessian = problem(1, 8, 32, "cpu")
    solve(w, hessian, QuantSpec(4, 16), GptqOptions(static_groups=True, act_order=True))
    with pytest.raises(AssertionError, match="called"):
        solve(w, hessian, QuantSpec(4, 16), GptqOptions())
