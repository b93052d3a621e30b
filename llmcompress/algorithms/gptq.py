"""GPTQ column solver, batched over experts (Frantar et al., arXiv 2210.17323, algorithm 1).

With the Hessian ``H = 2 X Xᵀ`` of a layer's squared output error, damped, and ``H⁻¹ = Uᵀ U``, U upper triangular
(:func:`~llmcompress.algorithms.hessian.inverse_factor`), columns c of the weight W are quantized one after the other,
and those that are not yet make up for each error (section 4, step 3)::

    q_c = nearest point of the grid to w_c
    e_c = (w_c − q_c) / U_cc
    w_j ← w_j − e_c U_cj            for every column j > c

:meth:`_Columns._block` is that loop; a block's errors reach the columns behind it in one product (step 2), as
``W[:, j] −= Σ_c e_c U_cj``.

Exact: the update rule with the Cholesky factor of the inverse Hessian, lazy block updates, group
grids. Different from the authors' code: many matrices of one shape are solved at once (an ordinary
linear is a stack of one), a group's grid is taken from up-to-date weights also inside a block, and
weights on dead inputs are rounded, never zeroed. Additions: grid search weighted by the cost of a column's error,
columns ordered by energy group by group, scales fitted again at the end (``scale_refit.py``), sweeps of coordinate
descent.

The column loop has three forms: plain PyTorch (:class:`_Columns`), which defines it and runs everywhere, the C++ of
``llmcompress_kernels.columns``, which runs on CPUs where it can, and the definition with the steps inside a group done
by one Triton kernel, on GPUs.

Legend: E experts, N rows (outputs), K columns (inputs), G groups per row, g columns per group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from llmcompress_kernels import columns as native
from torch import Tensor

from llmcompress.algorithms.coordinate_descent import sweep
from llmcompress.algorithms.grids import (
    Search,
    find_grid,
    grid_of_groups,
    nearest,
    tried_fractions,
)
from llmcompress.algorithms.hessian import damped_diagonal, inverse_factor, output_energy, reversed_root
from llmcompress.algorithms.rounding import Rounded
from llmcompress.algorithms.scale_refit import refit, refit_scales
from llmcompress.quant.codecs.int_group import dequantize
from llmcompress.quant.spec import QuantSpec

# raised where the same weights and Hessians come to give other codes: a run that is resumed knows by it that its blocks
# do not all come from one solver. 2: the C++ loop works with the Hessian's root and fits the scales. 3: weights whose
# Hessian cannot be used keep what rounding gave them
REVISION = 3
# fp32 weights that are solved at once on a CPU: enough experts to make the steps of the column loop worth their
# call, few enough to stay in the caches and in memory that the allocator keeps
SOLVE_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class GptqOptions:
    """Solver settings, named as in the recipe.

    Attributes:
        damp: Relative damping of the Hessian.
        act_order: Go through the columns in order of falling ``diag(H)``: ``True`` over all columns (needs
            ``static_groups``), ``groups`` group by group.
        static_groups: Fix all grids before the first column.
        block: Columns between two updates of the trailing weights; no effect on the result beyond rounding.
        grid: How grids are chosen; the search weighs a column's error by what it costs after compensation.
        refit: Improve the scales by least squares once all codes are chosen.
        sweeps: Rounds of coordinate descent over the codes after that, scales fitted again after each where ``refit``.
    """

    damp: float = 0.01
    act_order: bool | Literal["groups"] = False
    static_groups: bool = False
    block: int = 128
    grid: Search = "mse"
    refit: bool = False
    sweeps: int = 0

    def __post_init__(self) -> None:
        if self.act_order is True and not self.static_groups:
            raise ValueError("act_order needs static_groups, or the value groups")


@dataclass(frozen=True, slots=True)
class Solution(Rounded):
    """What the solver found for a stack of weights ``[E, N, K]``.

    Attributes:
        quantized: ``[E, N, K]`` fp32, the values the codes stand for.
        error: ``[E, N]`` fp32, diagonal of ``(W-Q) H (W-Q)ᵀ``: each output's mean squared error (times 2).
        energy: ``[E, N]`` fp32, diagonal of ``W H Wᵀ``.
        damp: Damping that worked per expert, 0 where the weights were simply rounded.
    """

    quantized: Tensor
    damp: list[float]

    @property
    def relative_error(self) -> Tensor:
        """``[E]``: ``tr((W-Q) H (W-Q)ᵀ) / tr(W H Wᵀ)``, 0 where the denominator is 0."""
        return ratio(self.error.sum(-1), self.energy.sum(-1))

    @classmethod
    def joined(cls, parts: Sequence[Solution]) -> Solution:
        """The solutions of consecutive experts as one."""
        zeros = [part.zero for part in parts if part.zero is not None]
        return cls(
            torch.cat([part.codes for part in parts]),
            torch.cat([part.scale for part in parts]),
            torch.cat(zeros) if zeros else None,
            torch.cat([part.quantized for part in parts]),
            torch.cat([part.error for part in parts]),
            torch.cat([part.energy for part in parts]),
            [damp for part in parts for damp in part.damp],
        )


def solve(
    w: Tensor, hessian: Tensor, spec: QuantSpec, options: GptqOptions, usable: Sequence[bool] | None = None
) -> Solution:
    """Quantize a stack of weights so that the layer outputs change least.

    Args:
        w: ``[E, N, K]`` fp32 weights, unchanged.
        hessian: ``[E, K, K]`` fp32.
        spec: Bits, group size, symmetry.
        options: Solver settings.
        usable: Experts whose Hessian carries information; the others are rounded to nearest.

    Returns:
        Codes and grids with the error they make.
    """
    turns = solved_together(w.shape, w.is_cuda)
    if _runs_natively(w, spec, options):
        return _solve_natively(w, hessian, spec, options, usable, turns)
    parts = [_solve_plainly(w[t], hessian[t], spec, options, None if usable is None else usable[t]) for t in turns]
    return parts[0] if len(parts) == 1 else Solution.joined(parts)


def solved_together(shape: Sequence[int], on_gpu: bool) -> list[slice]:
    """Which experts of weights ``[E, N, K]`` are worked on at once: on a CPU as many as :data:`SOLVE_BYTES` hold."""
    experts, rows, columns = shape
    step = experts if on_gpu else max(1, SOLVE_BYTES // (4 * rows * columns))
    return [slice(start, min(start + step, experts)) for start in range(0, experts, step)]


def _solve_plainly(
    w: Tensor, hessian: Tensor, spec: QuantSpec, options: GptqOptions, usable: Sequence[bool] | None
) -> Solution:
    """:func:`solve` of some experts at once, in PyTorch: the definition of what the C++ does."""
    order = column_order(hessian, spec.group(w.shape[-1]), options)
    factor, damp = inverse_factor(hessian, options.damp, usable, order)
    found = _plain_loop(w, order, factor, spec, options)
    del factor
    return _measured(w, hessian, found, spec, options, damp)


_Found = tuple[Tensor, Tensor, Tensor | None, Tensor]


def _measured(
    w: Tensor, hessian: Tensor, found: _Found, spec: QuantSpec, options: GptqOptions, damp: list[float]
) -> Solution:
    """The solution that codes, scale, zero and values stand for, scales fitted where asked; values are overwritten."""
    codes, scale, zero, quantized = found
    # what was rounded for want of a Hessian stays so: fitted to the few tokens there are, it would forget all others
    solved = torch.tensor([used > 0 for used in damp], device=hessian.device)[:, None, None]
    trusted = hessian if all(damp) else torch.where(solved, hessian, 0.0)
    for _ in range(options.sweeps):
        if options.refit:
            scale = refit_scales(w, codes, scale, zero, trusted, spec, options.damp)
        codes = sweep(w, trusted, codes, scale, zero, spec, options.damp)
    if options.sweeps:
        quantized = dequantize(codes, scale, zero, spec)
    energy = output_energy(w, hessian)
    delta = torch.sub(w, quantized, out=quantized)
    if options.refit and any(damp):
        rounded = None if all(damp) else output_energy(delta, hessian)
        scale, error = refit(delta, codes, scale, zero, trusted, spec, options.damp)
        error = error if rounded is None else torch.where(solved[:, 0], error, rounded)
    else:
        error = output_energy(delta, hessian)
    del delta, quantized
    return Solution(codes, scale, zero, dequantize(codes, scale, zero, spec), error, energy, damp)


def _solve_natively(
    w: Tensor, hessian: Tensor, spec: QuantSpec, options: GptqOptions, usable: Sequence[bool] | None,
    turns: Sequence[slice],
) -> Solution:  # fmt: skip
    """:func:`solve` in C++, some experts at a turn."""
    experts, rows, columns = w.shape
    whole = native.Found.empty(experts, rows, columns, spec.groups(columns))
    # one memory for all turns: new memory costs a page fault per 4 KiB
    memory = torch.empty(max(turn.stop - turn.start for turn in turns), columns, columns)
    damp: list[float] = []
    for turn in turns:
        size = turn.stop - turn.start
        curvature = hessian[turn]
        order = column_order(curvature, spec.group(columns), options)
        some = None if usable is None else usable[turn]
        root, used = reversed_root(curvature, options.damp, some, order, memory[:size])
        damp += used
        diagonal = curvature.diagonal(dim1=-2, dim2=-1)
        added = damped_diagonal(diagonal, torch.tensor(used, dtype=diagonal.dtype)[:, None]) - diagonal
        added = added if order is None else added.gather(-1, order)
        # those that have a root and those that have none apart, so that nobody's result depends on its company
        alike = all(used) or not any(used)
        for part in [slice(0, size)] if alike else [slice(i, i + 1) for i in range(size)]:
            visits, place = (
                None if order is None else order[part],
                slice(turn.start + part.start, turn.start + part.stop),
            )
            problem = (w[place], curvature[part], visits, root[part], added[part])
            _native_loop(problem, whole.part(place), used[part], spec, options)
    zero = None if spec.symmetric else whole.zero
    return Solution(whole.codes, whole.scale, zero, whole.values, whole.error, whole.energy, damp)


_Problem = tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]


def _native_loop(
    problem: _Problem, found: native.Found, damp: list[float], spec: QuantSpec, options: GptqOptions
) -> None:
    """The C++, and what it leaves to PyTorch: weights without a root of their own, and very many groups."""
    w, hessian, order, root, added = problem
    size, groups = spec.group(w.shape[-1]), spec.groups(w.shape[-1])
    tried = tried_fractions(spec.bits, options.grid)
    grid = native.Grid(size, spec.levels, int(spec.midpoint), spec.symmetric, *tried)
    known = damp[0] > 0 and (groups <= native.FITTED_GROUPS or not options.refit)
    ridge = options.damp * hessian.diagonal(dim1=-2, dim2=-1).mean(-1) if known and options.refit else None
    native.quantize(w, order, root, added, grid, ridge, found)
    if not known:
        zero = None if spec.symmetric else found.zero
        exact = _measured(w, hessian, (found.codes, found.scale, zero, found.values), spec, options, damp)
        found.scale.copy_(exact.scale)
        found.values.copy_(exact.quantized)
        found.error.copy_(exact.error)
        found.energy.copy_(exact.energy)
    elif ridge is None:
        found.energy.copy_(output_energy(w, hessian))


def _plain_loop(w: Tensor, order: Tensor | None, factor: Tensor, spec: QuantSpec, options: GptqOptions) -> _Found:
    """The column loop in PyTorch: codes, scale, zero, values, in the stored order."""
    work = w.transpose(1, 2).clone(memory_format=torch.contiguous_format)
    columns = _Columns(work if order is None else _picked(work, order), factor, spec, options, order, w)
    del work
    codes, quantized = columns.run()
    scale, zero = columns.grids()
    if order is not None:
        back = order.argsort(dim=-1)
        codes, quantized = _picked(codes, back), _picked(quantized, back)
        if not options.static_groups:
            # grids were found in the order of visit; put each where its group is stored
            size, groups = spec.group(w.shape[-1]), spec.groups(w.shape[-1])
            place = (order[:, ::size] // size).argsort(dim=-1)[:, None, :].expand(-1, w.shape[1], groups)
            scale, zero = scale.gather(2, place), None if zero is None else zero.gather(2, place)
    return codes.transpose(1, 2).contiguous(), scale, zero, quantized.transpose(1, 2).contiguous()


def column_loop(device: str) -> str:
    """Which form of the column loop runs on a device where it knows the case: ``native``, ``fused`` or ``plain``."""
    if native.fuses(device):
        return "fused"
    return "native" if device == "cpu" and native.ready() else "plain"


def _runs_natively(w: Tensor, spec: QuantSpec, options: GptqOptions) -> bool:
    """Whether the column loop in C++ knows this case and can run."""
    return not options.static_groups and not options.sweeps and not spec.half and column_loop(w.device.type) == "native"


def _picked(stack: Tensor, index: Tensor) -> Tensor:
    """Rows of each matrix of ``stack [E, K, .]`` in the order of ``index [E, K]``."""
    return torch.stack([matrix.index_select(0, chosen) for matrix, chosen in zip(stack, index)])


def column_order(hessian: Tensor, group: int, options: GptqOptions) -> Tensor | None:
    """In which order columns are quantized, or None for as they come.

    Args:
        hessian: ``[E, K, K]``.
        group: Columns per group.
        options: ``act_order`` ``True`` sorts all columns by falling energy; ``groups`` sorts groups by their
            mean energy and columns inside each, so that a group's columns still follow each other and its
            grid can wait for up-to-date weights. A short last group stays last.

    Returns:
        int64 ``[E, K]``.
    """
    if not options.act_order:
        return None
    energy = hessian.diagonal(dim1=-2, dim2=-1)
    if options.act_order is True:
        return energy.argsort(dim=-1, descending=True, stable=True)
    columns = energy.shape[-1]
    whole = columns // group * group
    grouped = energy[:, :whole].unflatten(-1, (-1, group))
    outer = grouped.mean(-1).argsort(dim=-1, descending=True, stable=True)
    inner = grouped.argsort(dim=-1, descending=True, stable=True)
    chosen = inner.gather(1, outer[:, :, None].expand_as(inner)) + outer[:, :, None] * group
    tail = energy[:, whole:].argsort(dim=-1, descending=True, stable=True) + whole
    return torch.cat([chosen.flatten(1), tail], dim=1)


def ratio(above: Tensor, below: Tensor) -> Tensor:
    """``above / below``, 0 where ``below`` is not positive."""
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(torch.float32).tiny), torch.zeros_like(above))


def block_bounds(columns: int, group: int, block: int) -> list[tuple[int, int]]:
    """Column ranges between lazy updates; a group larger than a block starts at a range's start.

    Grids are taken when a group is reached, so everything inside the group must be up to date then:
    a range either holds whole groups or lies within one.
    """
    if group <= block:
        step = block // group * group
        return [(start, min(start + step, columns)) for start in range(0, columns, step)]
    found = []
    for begin in range(0, columns, group):
        end = min(begin + group, columns)
        found += [(start, min(start + block, end)) for start in range(begin, end, block)]
    return found


class _Columns:
    """The column loop. Weights are held as ``[E, K, N]`` so that a column is contiguous; ``work`` is overwritten."""

    def __init__(
        self,
        work: Tensor,
        factor: Tensor,
        spec: QuantSpec,
        options: GptqOptions,
        order: Tensor | None,
        original: Tensor,
    ) -> None:
        experts, columns, rows = work.shape
        self.fused = not options.static_groups and native.fuses(work.device.type)
        # libraries return triangular factors by columns
        self.spec, self.options, self.factor = spec, options, factor.contiguous() if self.fused else factor
        self.group = spec.group(columns)
        self.weights = work
        self.codes = torch.empty((experts, columns, rows), dtype=torch.uint8, device=work.device)
        self.quantized = torch.empty_like(self.weights)
        groups = spec.groups(columns)
        self.scale = torch.empty((groups, experts, rows), dtype=torch.float32, device=work.device)
        self.zero = torch.full_like(self.scale, float(spec.midpoint))
        self.inverse_diagonal = factor.diagonal(dim1=-2, dim2=-1).reciprocal()
        self.group_of = (order // self.group).T.contiguous() if order is not None and options.static_groups else None
        # what a rounding error of a column costs once later columns have made up for it as well as they can
        self.importance = self.inverse_diagonal.square()
        if options.static_groups:
            importance = self.importance
            if order is not None:
                importance = torch.empty_like(importance).scatter_(1, order, importance)
            scale, zero = find_grid(original, spec, options.grid, importance)
            self.scale.copy_(scale.permute(2, 0, 1))
            if zero is not None:
                self.zero.copy_(zero.permute(2, 0, 1))

    def run(self) -> tuple[Tensor, Tensor]:
        """Quantize all columns; return codes and values ``[E, K, N]``."""
        columns = self.weights.shape[1]
        if self.fused:
            step, bounds = self._span, native.spans(columns, self.group)
        else:
            step, bounds = self._block, block_bounds(columns, self.group, self.options.block)
        for start, stop in bounds:
            errors = step(start, stop)
            if stop < columns:
                # W[:, stop:] -= err · U[block, stop:], on transposed weights
                self.weights[:, stop:].baddbmm_(
                    self.factor[:, start:stop, stop:].transpose(1, 2), errors, alpha=-1
                )  # fmt: skip
        return self.codes, self.quantized

    def grids(self) -> tuple[Tensor, Tensor | None]:
        """Scale fp16 and zero uint8 (None when symmetric), ``[E, N, G]``."""
        scale = self.scale.permute(1, 2, 0).to(torch.float16).contiguous()
        return scale, None if self.spec.symmetric else self.zero.permute(1, 2, 0).to(torch.uint8).contiguous()

    def _block(self, start: int, stop: int) -> Tensor:
        errors = torch.empty_like(self.weights[:, start:stop])
        top = float(self.spec.levels - 1)
        for column in range(start, stop):
            if column % self.group == 0 and not self.options.static_groups:
                self._find_group(column)
            scale, zero = self._column_grid(column)
            values = self.weights[:, column]
            codes = nearest(torch.div(values, scale), zero, self.spec.half).clamp_(0.0, top)
            self.codes[:, column] = codes
            quantized = torch.mul(codes.sub_(zero), scale, out=self.quantized[:, column])
            error = torch.sub(values, quantized, out=errors[:, column - start])
            error *= self.inverse_diagonal[:, column, None]
            if column + 1 < stop:
                row = self.factor[:, column, column + 1 : stop, None]
                self.weights[:, column + 1 : stop].baddbmm_(row, error.unsqueeze(1), alpha=-1)
        return errors

    def _span(self, start: int, stop: int) -> Tensor:
        """:meth:`_block` for columns of one group, in one launch."""
        if start % self.group == 0:
            self._find_group(start)
        index = start // self.group
        return native.quantize_span(
            self.weights, self.factor, self.scale[index], self.zero[index], self.codes, self.quantized, (start, stop),
            self.spec.levels, self.spec.half,
        )  # fmt: skip

    def _find_group(self, column: int) -> None:
        index = column // self.group
        values = self.weights[:, column : column + self.group].transpose(1, 2).contiguous()
        importance = self.importance[:, None, column : column + self.group]
        scale, zero = grid_of_groups(values, self.spec, self.options.grid, importance)
        self.scale[index] = scale
        if zero is not None:
            self.zero[index] = zero

    def _column_grid(self, column: int) -> tuple[Tensor, Tensor]:
        if self.group_of is None:
            index = column // self.group
            return self.scale[index], self.zero[index]
        experts = torch.arange(self.weights.shape[0], device=self.weights.device)
        chosen = self.group_of[column]
        return self.scale[chosen, experts], self.zero[chosen, experts]
