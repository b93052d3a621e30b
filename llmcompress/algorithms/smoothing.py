"""SmoothQuant (Xiao et al., arXiv 2211.10438): move outliers of a linear's inputs into its weights.

Columns of the weights are multiplied by factors, and what makes the inputs is divided by them. The product stays what
it is, while the inputs' channels come closer to each other and a scale per token wastes less on the largest.

Factors are rounded to powers of two (ours). Then dividing and multiplying are exact in every float type and in every
order of sums: the smoothed model computes the very same outputs, bit by bit, until something is quantized.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# furthest power of two, so that float16 weights neither overflow nor vanish
LIMIT = 8


def smoothing_factors(inputs: Tensor, weights: Sequence[Tensor], alpha: float) -> Tensor:
    """Factor of each input channel: ``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (Eq. 4).

    Args:
        inputs: ``[K]`` largest magnitude of each channel over the calibration tokens.
        weights: Linears ``[N, K]`` that read these inputs.
        alpha: How much of the difficulty goes to the weights: 0 nothing of the inputs' spread, 1 all of it.

    Returns:
        ``[K]`` fp32 powers of two with geometric mean about 1, between 2^-8 and 2^8; 1 for channels that are zero in
        all inputs or all weights.
    """
    columns = torch.stack([weight.abs().amax(0).to(torch.float32) for weight in weights]).amax(0)
    largest = inputs.to(torch.float32)
    used = (largest > 0) & (columns > 0)
    exponents = alpha * largest.log2() - (1 - alpha) * columns.log2()
    exponents = torch.where(used, exponents, 0.0)
    if bool(used.any()):
        # a common factor changes nothing but the range of the numbers
        exponents = torch.where(used, exponents - exponents[used].mean(), 0.0)
    return torch.exp2(exponents.round().clamp(-LIMIT, LIMIT))


def spread(largest: Tensor) -> float:
    """How far the largest channel ``[K]`` stands above the middle one; 1 where nothing is above zero."""
    present = largest[largest > 0].to(torch.float32)
    return float(present.max() / present.median()) if present.numel() else 1.0
