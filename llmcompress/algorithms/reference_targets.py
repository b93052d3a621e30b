"""Weights fitted to what the full-precision model computes, before they are quantized.

GPTQ keeps ``W x̂`` on the inputs x̂ that the quantized model sees, so the error that x̂ already carries is
passed on. With both streams at hand the least-squares weight that reproduces ``W x`` from x̂ can be
quantized instead. The same idea, for the router, is QESC's calibration; for weights it is published as
asymmetric calibration (GPTAQ, arXiv 2504.02692). EAC-MoE does not use it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fit_to_reference(weight: Tensor, hessian: Tensor, cross: Tensor, ridge: float) -> Tensor:
    """``W + W C (H + λ I)⁻¹``: the weight that turns x̂ into what ``W`` makes of x.

    Minimises ``Σ ‖V x̂ − W x‖² + λ ‖V − W‖²`` over V, with ``λ = ridge`` times the mean of H's diagonal.

    Args:
        weight: float32 ``[E, N, K]``.
        hessian: float32 ``[E, K, K]``, ``Σ x̂ x̂ᵀ`` up to a factor.
        cross: float32 ``[E, K, K]``, ``Σ (x − x̂) x̂ᵀ`` up to the same factor.
        ridge: Relative pull towards ``W``, positive.

    Returns:
        float32 ``[E, N, K]``; experts whose ``cross`` is zero keep their weight.
    """
    k = weight.shape[-1]
    mean = hessian.diagonal(dim1=-2, dim2=-1).mean(-1)
    # an expert without tokens has a zero matrix: any positive damping gives a zero correction
    damp = torch.where(mean > 0, ridge * mean, torch.ones_like(mean))
    system = hessian + damp[:, None, None] * torch.eye(k, device=hessian.device)
    right = torch.bmm(weight, cross)
    factor, info = torch.linalg.cholesky_ex(system)
    if bool((info == 0).all()):
        return weight + torch.cholesky_solve(right.mT, factor).mT
    exact = hessian.double() + damp.double()[:, None, None] * torch.eye(k, device=hessian.device, dtype=torch.float64)
    return weight + torch.linalg.solve(exact, right.double().mT).mT.float()
