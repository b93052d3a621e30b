"""Second moments of layer inputs, and the factor of their inverse that GPTQ works with.

GPTQ (arXiv 2210.17323, section 3): the Hessian of the layer's squared output error is ``H = 2 X Xᵀ``; here it
is averaged over tokens, ``H = 2/n Σ x xᵀ``, which changes nothing for the solver and keeps fp32 in range.

Legend: E experts (1 for an ordinary linear), K inputs, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from llmcompress_kernels import columns
from torch import Tensor

# tiles of the upper triangle: enough to save near half the work, each wide enough for full GEMM speed
# (of 64 to 384 columns, 96 were fastest at width 576, where 192 took 27 % longer, and 128 at width 1536)
TILES = 12
NARROWEST = 96
DAMP_STEPS = (1.0, 10.0, 100.0)
# order up to which a matrix is factorized, and a triangular one inverted, by the library
SOLVED_AT_ONCE = 128
# columns of a Cholesky factor that the library finds at once; the rest is products (64 were fastest at widths 512 to
# 2048, 256 took 10 to 60 % longer)
CHOLESKY_BLOCK = 64
# tiles of the triangle in W H Wᵀ, and how narrow they may be without losing the speed of the products
ENERGY_TILES, ENERGY_COLUMNS = 8, 128


class Gram:
    """Running sum of ``x xᵀ`` in fp32, one matrix per expert, upper triangle only until read.

    Tokens may have weights w. A mean is then one of weights too, ``2/Σw Σ w x xᵀ``, so that matrices of weighted and of
    plain tokens are of one size and can be blended.

    Args:
        experts: Number of matrices E.
        width: K.
        device: Where to accumulate.
        fast: Multiply bf16 inputs in bf16 on the CPU, about twice as fast; accurate enough when many batches of
            similar tokens are added (see ``_add_tile``), not for a few.

    Attributes:
        total: ``[E, K, K]`` fp32 sums.
        tokens: int64 ``[E]``, how many were added.
        mass: fp64 ``[E]``, the sum of their weights.
    """

    def __init__(self, experts: int, width: int, device: torch.device | str = "cpu", fast: bool = False) -> None:
        self.fast = fast
        self.total = torch.zeros((experts, width, width), dtype=torch.float32, device=device)
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self.mass = torch.zeros(experts, dtype=torch.float64)

    @classmethod
    def of(cls, total: Tensor, tokens: Tensor, mass: Tensor | None = None) -> Gram:
        """Sums made elsewhere: ``[E, K, K]``, ``[E]`` and ``[E]``, where tokens have weights."""
        found = cls(0, 0, total.device)
        found.total, found.tokens = total, tokens
        found.mass = (tokens if mass is None else mass).to("cpu", torch.float64)
        return found

    def add(self, x: Tensor, expert: int = 0, weight: Tensor | None = None) -> None:
        """Add tokens of one expert.

        Sums are fp32.

        Args:
            x: ``[T, K]`` inputs.
            expert: Row of the stack.
            weight: ``[T]`` non-negative weights of the tokens (affinity weighting), or None for 1.
        """
        if x.shape[0] == 0:
            return
        before = int(self.tokens[expert])
        self.tokens[expert] += x.shape[0]
        if weight is None:
            self.mass[expert] += x.shape[0]
        else:
            self.mass[expert] += float(weight.double().sum())
            x = x.to(torch.float32) * weight.to(torch.float32).sqrt().unsqueeze(-1)
        if not (x.dtype == torch.bfloat16 and (x.is_cuda or (self.fast and before >= x.shape[0]))):
            x = x.to(torch.float32)
        total = self.total[expert]
        width = x.shape[1]
        step = _tile(width)
        for start in range(0, width, step):
            self._add_tile(total[start : start + step, start:], x[:, start : start + step].T, x[:, start:], before)

    def release(self) -> None:
        """Give the memory of the sums back; token counts stay."""
        self.total = self.total.new_empty(0)

    @staticmethod
    def _add_tile(total: Tensor, left: Tensor, right: Tensor, before: int) -> None:
        """``total += left @ right`` with errors far below those of a bf16 result."""
        if right.dtype == torch.float32:
            total.addmm_(left, right)
        elif right.is_cuda:
            total += torch.mm(left, right, out_dtype=torch.float32)
        else:
            # CPU products of bf16 come back in bf16. Subtracting what the earlier tokens predict, inside the
            # product, leaves a small difference to round; otherwise inputs with a large mean lose their
            # small eigenvalues and Cholesky fails
            predicted = (total * (right.shape[0] / before)).to(torch.bfloat16)
            total += torch.addmm(predicted, left, right, beta=-1)
            total += predicted

    def hessian(self, experts: slice = slice(None)) -> Tensor:
        """``2/Σw Σ w x xᵀ`` of the chosen experts, ``[e, K, K]`` fp32, symmetric; zeros where no token was seen."""
        return self._mirrored(self.total[experts].clone(), experts)

    def take_hessian(self) -> Tensor:
        """:meth:`hessian` of all experts in the memory of the sums, which are gone then."""
        full = self.total
        self.release()
        return self._mirrored(full, slice(None))

    def _mirrored(self, full: Tensor, experts: slice) -> Tensor:
        """The upper triangle made symmetric, and scaled, in place."""
        width = full.shape[-1]
        step = _tile(width)
        # tile by tile, because a second large matrix would raise the peak
        for start in range(0, width, step):
            stop = min(start + step, width)
            corner = full[:, start:stop, start:stop]
            corner.triu_()
            corner += corner.triu(1).transpose(-1, -2)
            full[:, stop:, start:stop] = full[:, start:stop, stop:].transpose(-1, -2)
        return full.mul_(self.share(experts).to(full.device)[:, None, None])

    def share(self, experts: slice = slice(None)) -> Tensor:
        """What sums over the tokens of the chosen experts are multiplied by, ``2/Σw``; fp32 ``[e]``, 2 for no token."""
        mass = self.mass[experts].to(torch.float32)
        return 2.0 / torch.where(mass > 0, mass, 1.0)


def _tile(width: int) -> int:
    return max(NARROWEST, -(-width // TILES))


def blend_rare(hessian: Tensor, tokens: Tensor, shared: Tensor, min_tokens: int) -> Tensor:
    """Mix the layer's Hessian into those of experts with few tokens, in place: ``H_e + (1 - n_e/min) H_layer``.

    Args:
        hessian: ``[E, K, K]`` per-expert Hessians, changed.
        tokens: ``[E]`` tokens seen by each.
        shared: ``[K, K]`` Hessian of all tokens of the layer.
        min_tokens: Number of tokens from which an expert stands on its own.

    Returns:
        ``hessian``; matrices with enough tokens, and those without any, are unchanged.
    """
    shared = shared.to(hessian)
    for matrix, seen in zip(hessian, tokens.tolist()):
        if 0 < seen < min_tokens:
            matrix.add_(shared, alpha=1.0 - seen / min_tokens)
    return hessian


def inverse_factor(
    hessian: Tensor, damp: float, usable: Sequence[bool] | None = None, order: Tensor | None = None
) -> tuple[Tensor, list[float]]:
    """Upper triangular ``U`` with ``(H + damp·mean(diag)·I)⁻¹ = Uᵀ U``, batched.

    Uses one Cholesky of the flipped matrix and one triangular inverse, instead of Cholesky, inverse and
    Cholesky again: with ``H = R Rᵀ``, R upper, ``U = R⁻¹``.

    Args:
        hessian: ``[E, K, K]`` fp32, symmetric.
        damp: Relative damping; raised tenfold up to twice where the factorization fails.
        usable: Which matrices carry information; the others get ``U = I`` (plain rounding).
        order: int64 ``[E, K]``, rows and columns that are meant by the first, the second, …; None for as they come.

    Returns:
        ``U [E, K, K]`` and per matrix the damping that worked, 0 where ``U = I``.
    """
    lower, used = reversed_root(hessian, damp, usable, order)
    upper = lower.flip(-1, -2)
    del lower  # these matrices are large
    return upper_inverse(upper), used


def reversed_root(
    hessian: Tensor,
    damp: float,
    usable: Sequence[bool] | None = None,
    order: Tensor | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, list[float]]:
    """Lower Cholesky factor of the damped matrix, rows and columns in reverse order: R of :func:`inverse_factor`,
    turned round. Damping as there.

    Args:
        hessian: ``[E, K, K]`` fp32, symmetric.
        damp: Relative damping.
        usable: Which matrices carry information; the others become ``I``.
        order: int64 ``[E, K]``, rows and columns in the order that is reversed; None for as they come.
        out: Memory for the result, ``[E, K, K]``; used where that is possible.

    Returns:
        ``[E, K, K]``, of which only the lower triangle counts, and per matrix the damping that worked, 0 for those that
        became ``I``.
    """
    experts = hessian.shape[0]
    factor: Tensor | None = None
    used = [0.0] * experts
    sums = hessian.diagonal(dim1=-2, dim2=-1).sum(-1).tolist()
    pending = [e for e in range(experts) if (usable is None or usable[e]) and sums[e] > 0]
    for raise_by in DAMP_STEPS:
        if not pending:
            break
        lower, info = cholesky(_damped_reversed(hessian, pending, damp * raise_by, order, out))
        out = None  # taken
        good = (info == 0) & torch.isfinite(lower.diagonal(dim1=-2, dim2=-1)).all(-1)
        solved = [e for e, ok in zip(pending, good.tolist()) if ok]
        if solved:
            found = lower if len(solved) == len(pending) else lower[good]
            if len(solved) == experts:
                factor = found
            else:
                factor = _identities(hessian) if factor is None else factor
                factor[torch.tensor(solved, device=hessian.device)] = found
        for e in solved:
            used[e] = damp * raise_by
        pending = [e for e in pending if e not in set(solved)]
    return _identities(hessian) if factor is None else factor, used


def _identities(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device).repeat(like.shape[0], 1, 1)


def cholesky(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Lower Cholesky factors of ``[E, K, K]``, and a number per matrix that is 0 where there is one.

    Wide ones on a CPU go by block columns, and nearly all their work is products: the library takes twice as long.
    Their upper triangle is left as it was.

    Args:
        matrix: Symmetric; wide ones are overwritten.
    """
    if matrix.device.type != "cpu" or matrix.shape[-1] <= SOLVED_AT_ONCE:
        factor, info = torch.linalg.cholesky_ex(matrix)
        return factor, info
    return matrix, torch.tensor([_factorize(one) for one in matrix], dtype=torch.int32)


def _factorize(matrix: Tensor) -> int:
    """Cholesky of one matrix, in place, left-looking."""
    width, failed = matrix.shape[0], 0
    for start in range(0, width, CHOLESKY_BLOCK):
        stop = min(start + CHOLESKY_BLOCK, width)
        column = matrix[start:, start:stop]
        if start:
            column.addmm_(matrix[start:, :start], matrix[start:stop, :start].T, alpha=-1)
        corner, info = torch.linalg.cholesky_ex(column[: stop - start])
        failed = failed or int(info)
        matrix[start:stop, start:stop] = corner
        if stop < width:
            # the inverse of a block is cheap, and a product with it several times faster than solving with it
            eye = torch.eye(stop - start, dtype=matrix.dtype)
            inverse = torch.linalg.solve_triangular(corner, eye, upper=False)
            matrix[stop:, start:stop] = matrix[stop:, start:stop] @ inverse.T
    return failed


def upper_inverse(matrix: Tensor) -> Tensor:
    """Inverse of upper triangular matrices ``[E, K, K]``, by halves: a third less work than solving for all columns."""
    width = matrix.shape[-1]
    if width <= SOLVED_AT_ONCE:
        eye = torch.eye(width, dtype=matrix.dtype, device=matrix.device).expand_as(matrix)
        return torch.linalg.solve_triangular(matrix, eye, upper=True)
    half = width // 2
    top, bottom = upper_inverse(matrix[:, :half, :half]), upper_inverse(matrix[:, half:, half:])
    result = torch.zeros_like(matrix)
    result[:, :half, :half], result[:, half:, half:] = top, bottom
    result[:, :half, half:] = torch.bmm(top, torch.bmm(matrix[:, :half, half:], bottom)).neg_()
    return result


def damped_diagonal(diagonal: Tensor, damp: Tensor | float) -> Tensor:
    """Diagonals ``[E, K]`` after damping.

    A dead input would make its column of the inverse arbitrary: it gets the mean energy, which leaves the column to
    plain rounding because nothing correlates with it.

    Args:
        diagonal: ``[E, K]``.
        damp: Relative to the mean; one number, or ``[E, 1]``.
    """
    mean = diagonal.mean(-1, keepdim=True)
    return torch.where(diagonal <= 0, mean, diagonal) + damp * mean


def _damped_reversed(
    hessian: Tensor, chosen: list[int], damp: float, order: Tensor | None, out: Tensor | None
) -> Tensor:
    """A damped copy of the chosen matrices, rows and columns in reverse order; only the lower triangle counts."""
    if len(chosen) < hessian.shape[0]:
        some = torch.tensor(chosen, device=hessian.device)
        hessian, order, out = hessian[some], None if order is None else order[some], None
    diagonal = damped_diagonal(hessian.diagonal(dim1=-2, dim2=-1), damp)
    if order is not None:
        diagonal = diagonal.gather(-1, order)
    if hessian.device.type == "cpu" and hessian.dtype == torch.float32 and columns.ready():
        result = columns.reversed_lower(hessian, order, out)
    else:
        result = reversed_matrix(hessian, order)
    result.diagonal(dim1=-2, dim2=-1).copy_(diagonal.flip(-1))
    return result


def reversed_matrix(hessian: Tensor, order: Tensor | None) -> Tensor:
    """Matrices with rows and columns in the reverse of an order of visit; ``columns.reversed_lower`` is the fast one.

    Args:
        hessian: ``[E, K, K]``.
        order: int64 ``[E, K]``; None for as they come.
    """
    if order is None:
        return hessian.flip(-1, -2)
    places = order.flip(-1)
    # two plain copies are several times faster than one gather over both dimensions
    return torch.stack([one.index_select(0, at).index_select(1, at) for one, at in zip(hessian, places)])


def output_energy(w: Tensor, hessian: Tensor) -> Tensor:
    """Diagonal of ``W H Wᵀ``, ``[E, N]``, for ``w [E, N, K]`` and a symmetric ``hessian [E, K, K]``.

    By tiles of the upper triangle, those beside the diagonal counted twice: near half the products.
    """
    columns = w.shape[-1]
    step = max(ENERGY_COLUMNS, -(-columns // ENERGY_TILES))
    total = w.new_zeros(w.shape[:2])
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        part = torch.bmm(w[:, :, start:stop], hessian[:, start:stop, start:]).mul_(w[:, :, start:])
        total += part.sum(-1).mul_(2).sub_(part[:, :, : stop - start].sum(-1))
    return total
