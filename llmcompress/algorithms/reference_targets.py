"""Weights fitted to what the full-precision model computes, before they are quantized.

GPTQ keeps ``W x̂`` on the inputs x̂ that the quantized model sees, so the error that x̂ already carries is
passed on. With both streams at hand the least-squares weight that reproduces ``W x`` from x̂ can be
quantized instead. The same idea, for the router, is QESC's calibration; for weights it is published as
asymmetric calibration (GPTAQ, arXiv 2504.02692). EAC-MoE does not use it.

A projection that adds to the residual stream can do more: there the streams differ already, by ``d = h − ĥ``, and a
target of ``W x + d`` lets it take back what x̂ tells of that difference. This step is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fit_to_reference(
    weight: Tensor, hessian: Tensor, cross: Tensor, ridge: float, drift: Tensor | None = None
) -> Tensor:
    """``W + (W C + D)(H + λ I)⁻¹``: the weight that turns x̂ into what ``W`` makes of x, plus d.

    Minimises ``Σ ‖V x̂ − W x − d‖² + λ ‖V − W‖²`` over V, with ``λ = ridge`` times the mean of H's diagonal.

    Args:
        weight: float32 ``[E, N, K]``.
        hessian: float32 ``[E, K, K]``, ``Σ x̂ x̂ᵀ`` up to a factor.
        cross: float32 ``[E, K, K]``, ``Σ (x − x̂) x̂ᵀ`` up to the same factor.
        ridge: Relative pull towards ``W``, positive.
        drift: float32 ``[E, N, K]``, ``D = Σ d x̂ᵀ`` up to the same factor, d being what the outputs are to gain on top;
            None for nothing.

    Returns:
        float32 ``[E, N, K]``; experts whose sums are zero keep their weight.
    """
    k = weight.shape[-1]
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    # an expert without tokens has a zero matrix: any positive damping gives a zero correction
    damp = torch.where(mean > 0, ridge * mean, torch.ones_like(mean))
    system = hessian + damp[:, None, None] * torch.eye(k, device=hessian.device)
    right = torch.bmm(weight, cross)
    if drift is not None:
        right += drift
    factor, info = torch.linalg.cholesky_ex(system)
    if bool((info == 0).all()):
        return weight + torch.cholesky_solve(right.mT, factor).mT
    exact = hessian.double() + damp.double()[:, None, None] * torch.eye(k, device=hessian.device, dtype=torch.float64)
    return weight + torch.linalg.solve(exact, right.double().mT).mT.float()
