from __future__ import annotations

from typing import Literal

import pytest
import torch

from llmcompress.algorithms import gptq as module
from llmcompress.algorithms.gptq import GptqOptions, block_bounds, column_order, ratio, solve
from llmcompress.algorithms.grids import find_grid, round_codes, round_to_nearest
from llmcompress.algorithms.hessian import output_energy
from llmcompress.algorithms.scale_refit import refit_scales
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec


@pytest.fixture(autouse=True, params=["definition", "native"])
def column_loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs with the plain column loop and, where there is a compiler, with that in C++."""
    loop: str = request.param
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "reference" if loop == "definition" else "auto")
    if loop == "native" and not module.native.ready():
        pytest.skip("no C++ compiler")
    return loop


def problem(experts: int, rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(experts, rows, columns, generator=generator)
    mixing = torch.randn(experts, columns, columns, generator=generator)
    x = torch.randn(experts, 4 * columns, columns, generator=generator) @ mixing
    return w, 2 * x.transpose(1, 2) @ x / x.shape[1]


def textbook(
    w: torch.Tensor, hessian: torch.Tensor, spec: QuantSpec, options: GptqOptions
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """One matrix, one column at a time, no blocks: algorithm 1 of the paper with groups. In fp32 like the solver."""
    columns = w.shape[1]
    size, groups = spec.group(columns), spec.groups(columns)
    energy = hessian.diagonal()
    order = list(range(columns))
    if options.act_order is True:
        order.sort(key=lambda c: -float(energy[c]))
    elif options.act_order == "groups":
        members = [order[start : start + size] for start in range(0, columns, size)]
        tail = members.pop() if columns % size else []
        members.sort(key=lambda group: -float(energy[group].mean()))
        order = [c for group in [*members, tail] for c in sorted(group, key=lambda c: -float(energy[c]))]
    curvature = hessian[order][:, order].double()
    damped = curvature + options.damp * curvature.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    upper = torch.linalg.cholesky(torch.linalg.inv(damped), upper=True).float()
    cost = torch.empty(columns)
    cost[order] = upper.diagonal() ** -2
    work = w.clone()
    scale = torch.zeros(w.shape[0], groups)
    zero = torch.full((w.shape[0], groups), float(spec.midpoint))
    if options.static_groups:
        fixed_scale, fixed_zero = find_grid(w, spec, options.grid, cost)
        scale = fixed_scale.float()
        zero = zero if fixed_zero is None else fixed_zero.float()
    codes = torch.zeros(w.shape, dtype=torch.uint8)
    seen: set[int] = set()
    for position, column in enumerate(order):
        group = column // size
        if not options.static_groups and group not in seen:
            seen.add(group)
            mine = slice(group * size, min((group + 1) * size, columns))
            found_scale, found_zero = find_grid(work[:, mine], spec, options.grid, cost[mine])
            scale[:, group] = found_scale[:, 0].float()
            if found_zero is not None:
                zero[:, group] = found_zero[:, 0].float()
        code = (torch.round(work[:, column] / scale[:, group]) + zero[:, group]).clamp(0, spec.levels - 1)
        codes[:, column] = code.to(torch.uint8)
        error = (work[:, column] - (code - zero[:, group]) * scale[:, group]) / upper[position, position]
        later = order[position + 1 :]
        work[:, later] -= error[:, None] * upper[position, position + 1 :]
    return codes, scale, None if spec.symmetric else zero


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("columns", "group", "block"), [(64, 16, 32), (64, 32, 128), (80, 32, 16), (70, -1, 16), (48, 24, 16)]
)
def test_batched_equals_textbook(bits: int, symmetric: bool, columns: int, group: int, block: int) -> None:
    spec = QuantSpec(bits, group, symmetric)
    options = GptqOptions(block=block, grid="minmax")
    w, hessian = problem(3, 10, columns, seed=bits)
    solution = solve(w, hessian, spec, options)
    for e in range(3):
        codes, scale, zero = textbook(w[e], hessian[e], spec, options)
        same = (solution.codes[e] == codes).float().mean()
        # a value that falls on a rounding border may go either way and pull its row along
        assert same > (0.995 if bits < 8 else 0.9)
        torch.testing.assert_close(solution.scale[e].float(), scale, rtol=2e-2, atol=1e-3)
        assert (zero is None) == (solution.zero is None)
        if zero is not None and solution.zero is not None:
            assert (solution.zero[e].float() == zero).float().mean() > (0.95 if bits < 8 else 0.8)


@pytest.mark.parametrize("grid", ["minmax", "mse"])
@pytest.mark.parametrize(("static", "act_order"), [(True, False), (True, True), (False, "groups"), (True, "groups")])
@pytest.mark.parametrize("columns", [32, 40])
def test_orders_and_static_groups_equal_textbook(
    static: bool, act_order: bool | Literal["groups"], grid: Literal["minmax", "mse"], columns: int
) -> None:
    spec = QuantSpec(4, 16)
    options = GptqOptions(block=16, static_groups=static, act_order=act_order, grid=grid)
    w, hessian = problem(2, 12, columns)
    solution = solve(w, hessian, spec, options)
    for e in range(2):
        codes, scale, _ = textbook(w[e], hessian[e], spec, options)
        torch.testing.assert_close(solution.scale[e].float(), scale, rtol=2e-2, atol=1e-3)
        assert (solution.codes[e] == codes).float().mean() > 0.98
    assert torch.equal(solution.quantized, dequantize(solution.codes, solution.scale, solution.zero, spec))


def test_group_order_keeps_groups_together() -> None:
    hessian = torch.diag(torch.tensor([1.0, 2.0, 9.0, 3.0, 4.0, 6.0, 100.0]))[None]
    options = GptqOptions(act_order="groups")
    order = column_order(hessian, 3, options)
    assert order is not None
    assert order.tolist() == [[5, 4, 3, 2, 1, 0, 6]]
    assert column_order(hessian, 3, GptqOptions()) is None


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("columns", [64, 50])
@pytest.mark.parametrize("damp", [0.0, 0.5])
def test_refit_solves_the_least_squares_problem(symmetric: bool, columns: int, damp: float) -> None:
    spec = QuantSpec(3, 16, symmetric)
    w, hessian = problem(2, 6, columns)
    codes, scale, zero = round_to_nearest(w, spec, "minmax")
    better = refit_scales(w, codes, scale, zero, hessian, spec, damp)
    assert better.dtype == torch.float16
    # damped, errors of weights cost something by themselves
    hessian = hessian + damp * hessian.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None] * torch.eye(columns)
    before = output_energy(w - dequantize(codes, scale, zero, spec), hessian)
    after = output_energy(w - dequantize(codes, better, zero, spec), hessian)
    assert bool((after <= before * 1.0001).all())
    assert float(after.sum()) < 0.98 * float(before.sum())
    # against a dense least-squares solution of one row
    centred = dequantize(codes, torch.ones_like(scale), zero, spec)[0, 0].double()
    design = torch.zeros(columns, spec.groups(columns), dtype=torch.float64)
    for column in range(columns):
        design[column, column // 16] = centred[column]
    root = torch.linalg.cholesky(hessian[0].double()).T
    exact = torch.linalg.lstsq(root @ design, root @ w[0, 0].double()).solution
    loss = lambda s: float((root @ (w[0, 0].double() - design @ s)).square().sum())  # noqa: E731
    assert loss(better[0, 0].double()) <= loss(exact) * 1.01
    plain = solve(w, hessian, spec, GptqOptions())
    refitted = solve(w, hessian, spec, GptqOptions(refit=True))
    assert torch.equal(refitted.codes, plain.codes)
    assert float(refitted.error.sum()) < float(plain.error.sum())


def test_beats_rounding_and_reports_its_error() -> None:
    spec = QuantSpec(3, 32)
    w, hessian = problem(2, 16, 64)
    kept = w.clone(), hessian.clone()
    solution = solve(w, hessian, spec, GptqOptions())
    values = dequantize(solution.codes, solution.scale, solution.zero, spec)
    scale, zero = find_grid(w, spec, "mse")
    rounded = dequantize(round_codes(w, scale, zero, spec), scale, zero, spec)
    for e in range(2):
        difference = w[e] - values[e]
        expected = torch.trace(difference @ hessian[e] @ difference.T) / torch.trace(w[e] @ hessian[e] @ w[e].T)
        torch.testing.assert_close(solution.relative_error[e], expected, rtol=1e-3, atol=1e-6)
    above, below = output_energy(w - rounded, hessian), output_energy(w, hessian)
    assert bool((solution.relative_error < 0.6 * ratio(above.sum(-1), below.sum(-1))).all())
    torch.testing.assert_close(solution.quantized, values)
    assert torch.equal(w, kept[0])
    assert torch.equal(hessian, kept[1])


def test_identity_hessian_and_unusable_experts_are_rounding() -> None:
    spec = QuantSpec(4, 16)
    w, hessian = problem(3, 8, 32)
    hessian[0] = torch.eye(32)
    hessian[2] = 0
    solution = solve(w, hessian, spec, GptqOptions(), usable=[True, False, True])
    codes, scale, _ = round_to_nearest(w, spec, "mse")
    assert torch.equal(solution.codes, codes)
    assert torch.equal(solution.scale, scale)
    assert solution.damp == [0.01, 0.0, 0.0]
    assert float(solution.relative_error[2]) == 0.0


@pytest.mark.parametrize("sweeps", [0, 2])
def test_weights_without_a_usable_hessian_keep_the_scales_of_rounding(sweeps: int) -> None:
    """Fitted to a handful of tokens, scales would be worse for all others than those of rounding."""
    spec, options = QuantSpec(3, 16), GptqOptions(refit=True, sweeps=sweeps)
    w, hessian = problem(3, 8, 32)
    few = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    hessian[1] = 2 * few.T @ few / 3
    solution = solve(w, hessian, spec, options, usable=[True, False, True])
    codes, scale, zero = round_to_nearest(w, spec, "mse")
    assert zero is not None
    assert solution.zero is not None
    for found, rounded in ((solution.codes, codes), (solution.scale, scale), (solution.zero, zero)):
        assert torch.equal(found[1], rounded[1])
    assert not torch.equal(solution.scale[0], scale[0])
    values = dequantize(codes, scale, zero, spec)
    assert torch.equal(solution.quantized[1], values[1])
    # the error is still that of the outputs on what was seen
    torch.testing.assert_close(solution.error[1], output_energy(w - values, hessian)[1], rtol=1e-4, atol=1e-6)


def test_dead_columns_are_rounded_not_zeroed() -> None:
    spec = QuantSpec(4, 16)
    w, hessian = problem(1, 8, 32)
    hessian[0, 5], hessian[0, :, 5] = 0, 0
    solution = solve(w, hessian, spec, GptqOptions())
    values = dequantize(solution.codes, solution.scale, solution.zero, spec)
    step = solution.scale[0, :, 0].float()
    assert bool(((values[0, :, 5] - w[0, :, 5]).abs() <= 3 * step).all())
    assert bool((values[0, :, 5] != 0).any())


def test_batch_result_does_not_depend_on_the_batch() -> None:
    spec = QuantSpec(4, 16)
    w, hessian = problem(3, 8, 32)
    together = solve(w, hessian, spec, GptqOptions())
    alone = solve(w[1:2], hessian[1:2], spec, GptqOptions())
    assert (together.codes[1:2] == alone.codes).float().mean() > 0.99


def test_experts_solved_in_turns_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    w, hessian = problem(5, 6, 64)
    spec, options = QuantSpec(bits=3, group_size=32, symmetric=False), GptqOptions(act_order="groups", refit=True)
    usable = [True, True, False, True, True]
    whole = solve(w, hessian, spec, options, usable)
    monkeypatch.setattr(module, "SOLVE_BYTES", 2 * 4 * 6 * 64)
    turns = solve(w, hessian, spec, options, usable)
    assert torch.equal(turns.codes, whole.codes)
    assert torch.equal(turns.scale, whole.scale)
    assert turns.zero is not None
    assert whole.zero is not None
    assert torch.equal(turns.zero, whole.zero)
    assert turns.damp == whole.damp
    torch.testing.assert_close(turns.error, whole.error, rtol=1e-4, atol=1e-6)


def test_block_bounds_keep_groups_up_to_date() -> None:
    assert block_bounds(100, 32, 128) == [(0, 100)]
    assert block_bounds(100, 32, 70) == [(0, 64), (64, 100)]
    assert block_bounds(100, 48, 32) == [(0, 32), (32, 48), (48, 80), (80, 96), (96, 100)]
    with pytest.raises(ValueError, match="static_groups"):
        GptqOptions(act_order=True)
