"""Which models belong together: greedy aggregation of similar models into a binary tree.

Phase 1 of our variant of RQT (Findings of ACL 2025, paper 554, of which we know the abstract only: "bottom-up
aggregation by weight-matrix similarity"). The similarity is ours: the increase of the best common weight's output
error, which for one shared second moment ``H = L Lᵀ`` is Ward's criterion on ``W L`` and needs nothing but inner
products between models.

Legend: M models, N rows, K columns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor

from llmcompress.quant.tree import Members, Tree

Linkage = Literal["ward", "average", "cosine"]


def centred_gram(weights: Tensor, hessian: Tensor | None) -> tuple[Tensor, float]:
    """Inner products ``G_ij = ⟨(W_i - W̄)L, (W_j - W̄)L⟩`` and the mean energy ``mean_m tr(W_m H W_mᵀ)``.

    The mean is taken off first: differences between fine-tunes can be a thousandth of the weights, and inner
    products of the weights themselves would drown them.

    Args:
        weights: ``[M, N, K]`` fp32.
        hessian: ``[K, K]``, or None for the identity.

    Returns:
        ``[M, M]`` fp64 and a float.
    """
    mean = weights.mean(0)
    apart = weights - mean
    through = apart if hessian is None else apart @ hessian
    gram = inner_products(apart, through)
    shared = mean if hessian is None else mean @ hessian
    energy = float((mean.double() * shared.double()).sum() + gram.diagonal().mean())
    return (gram + gram.T) / 2, energy


def inner_products(first: Tensor, second: Tensor) -> Tensor:
    """``Σ_nk A_ink B_jnk`` of two stacks of matrices ``[M, N, K]`` in fp64, ``[M, M]``."""
    first, second = first.double(), second.double()
    if first.is_cuda:
        # one product of M x M with a sum over N K terms would leave a GPU idle: row by row instead
        return torch.bmm(first.transpose(0, 1), second.permute(1, 2, 0)).sum(0)
    return torch.einsum("ink,jnk->ij", first, second)


def merge_cost(gram: Tensor, first: Sequence[int], second: Sequence[int], importance: Tensor | None = None) -> float:
    """``J(A ∪ B) - J(A) - J(B)``, Ward's ``|A||B|/(|A|+|B|) · ‖μ_A - μ_B‖²``; members weigh as ``importance`` says.

    Args:
        gram: ``[M, M]`` from :func:`centred_gram`.
        first: Members of one cluster.
        second: Those of the other.
        importance: fp64 ``[M]`` weights ω, 1 each when None; ``Σ ω`` stands for ``|A|``, and μ is the weighted mean.
    """
    omega = _ones(gram) if importance is None else importance
    a, b = float(omega[list(first)].sum()), float(omega[list(second)].sum())
    return a * b / (a + b) * max(_distance(gram, _share(omega, first), _share(omega, second)), 0.0)


def _ones(gram: Tensor) -> Tensor:
    return torch.ones(len(gram), dtype=gram.dtype)


def _share(omega: Tensor, members: Sequence[int]) -> Tensor:
    """Coefficients ``[M]`` of the members' weighted mean."""
    share = torch.zeros_like(omega)
    share[list(members)] = omega[list(members)] / omega[list(members)].sum()
    return share


def _distance(gram: Tensor, first: Tensor, second: Tensor) -> float:
    """``‖μ_A - μ_B‖²`` of two means, given by their coefficients ``[M]``."""
    apart = first - second
    return float(apart @ gram @ apart)


def hessian_mean(weights: Tensor, hessians: Tensor, importance: Tensor, damp: float = 0.0) -> tuple[Tensor, Tensor]:
    """Best common weight ``A = (Σ ω W H)(Σ ω H)⁻¹`` of several models, and ``P = Σ ω H``.

    Quantizing a node for all of its models is one weighted problem: ``Σ ω tr((W - Q) H (W - Q)ᵀ)`` equals a constant
    plus ``tr((A - Q) P (A - Q)ᵀ)``.

    Args:
        weights: ``[M, N, K]``.
        hessians: ``[M, K, K]``.
        importance: ``[M]`` weights ω.
        damp: Relative ridge that pulls towards the plain mean where the data say nothing.

    Returns:
        ``A [N, K]`` and ``P [K, K]``, without the ridge.
    """
    total = torch.einsum("m,mkl->kl", importance, hessians)
    mean = torch.einsum("m,mnk->nk", importance / importance.sum(), weights)
    apart = torch.einsum("m,mnk,mkl->nl", importance, weights - mean, hessians)
    ridge = total.diagonal().mean() * damp
    regular = total + ridge * torch.eye(total.shape[0], dtype=total.dtype, device=total.device)
    return mean + torch.linalg.solve(regular, apart.T).T, total


def aggregate(
    names: Sequence[str],
    gram: Tensor,
    linkage: Linkage = "ward",
    deltas: Tensor | None = None,
    importance: Tensor | None = None,
) -> Tree:
    """Merge the closest two clusters until one is left.

    Args:
        names: The models, in the order of ``gram``.
        gram: ``[M, M]`` from :func:`centred_gram`, summed over the matrices that share the tree.
        linkage: ``ward``; ``average``: mean distance between models; ``cosine``: mean cosine distance of ``deltas``.
        deltas: ``[M, M]`` inner products of the models' differences to their base, for ``cosine``.
        importance: fp64 ``[M]`` weights of the models for ``ward``, 1 each when None.

    Raises:
        ValueError: ``cosine`` without ``deltas``.
    """
    order = sorted(range(len(names)), key=lambda i: names[i])
    cost = _cost_function(gram, linkage, deltas, importance)
    clusters: list[tuple[int, ...]] = [(i,) for i in order]
    merges: list[tuple[Members, Members]] = []
    while len(clusters) > 1:
        # clusters are kept in canonical order, so that ties do not depend on the order of the models
        _, _, (a, b) = min(
            (cost(a, b), (i, j), (a, b)) for (i, a), (j, b) in combinations(enumerate(clusters), 2)
        )  # fmt: skip
        merges.append((frozenset(names[i] for i in a), frozenset(names[i] for i in b)))
        clusters = [c for c in clusters if c not in (a, b)] + [tuple(sorted(a + b, key=lambda i: names[i]))]
        clusters.sort(key=lambda c: names[c[0]])
    return Tree.of(list(names), merges)


def _cost_function(
    gram: Tensor, linkage: Linkage, deltas: Tensor | None, importance: Tensor | None
) -> Callable[[Sequence[int], Sequence[int]], float]:
    if linkage == "ward":
        return lambda a, b: merge_cost(gram, a, b, importance)
    if linkage == "average":
        diagonal = gram.diagonal()
        distance = diagonal[:, None] + diagonal[None, :] - 2 * gram
    else:
        if deltas is None:
            raise ValueError("cosine linkage needs the differences to a base")
        size = deltas.diagonal().clamp(min=torch.finfo(deltas.dtype).tiny).sqrt()
        distance = 1 - deltas / (size[:, None] * size[None, :])
    return lambda a, b: float(distance[list(a)][:, list(b)].mean())


def increments(
    tree: Tree, names: Sequence[str], gram: Tensor, energy: float, importance: Tensor | None = None
) -> dict[str, float]:
    """Energy that appears at each node: ``‖μ_v - μ_parent‖²``, at the root ``‖μ‖²``; node id → value.

    Args:
        tree: Over the models.
        names: Order of ``gram``.
        gram: ``[M, M]`` of one matrix.
        energy: Its mean energy, as from :func:`centred_gram`.
        importance: fp64 ``[M]`` weights ω of the models' means, as nodes are built with; 1 each when None. The root's
            is that of the plain mean, from which a weighted one hardly differs beside its size.
    """
    place = {name: i for i, name in enumerate(names)}
    omega = _ones(gram) if importance is None else importance
    shares = [_share(omega, [place[name] for name in node]) for node in tree.nodes]
    found = {}
    for position, parent in enumerate(tree.parents):
        if parent is None:
            value = energy - float(gram.diagonal().mean())
        else:
            value = _distance(gram, shares[position], shares[parent])
        found[tree.ids[position]] = max(0.0, value)
    return found
