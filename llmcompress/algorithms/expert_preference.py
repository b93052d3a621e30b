"""How alike two texts use the experts of a model.

EAC-MoE (arXiv 2508.01625, Eq. 3 and 4): the preference of a model for experts on a text is the share of a layer's
choices that each expert gets, layer after layer, and the similarity of two texts is the cosine of their preferences.
Texts of one kind came out above 0.8 in the paper. What calibration text does not route to an expert, that expert is
quantized without, so the similarity says whether a calibration text stands for the text that a model will be used on.

Legend: L layers, N experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def preference(counts: Sequence[Tensor]) -> Tensor:
    """Eq. 3: ``P(e) = C(e) / Σ C`` in each layer, layers one after the other.

    Args:
        counts: One tensor ``[N]`` per layer, how often each expert was chosen; layers may differ in N.

    Returns:
        float64 ``[ΣN]``; zeros for a layer without a choice.
    """
    return torch.cat([layer.double() / max(1.0, float(layer.sum())) for layer in counts])


def similarity(first: Tensor, second: Tensor) -> float:
    """Eq. 4: cosine of two preferences ``[ΣN]``; 0 where one of them is empty."""
    size = float(first.norm() * second.norm())
    return float(first @ second) / size if size > 0 else 0.0


def similarities(texts: Sequence[Sequence[Tensor]]) -> list[list[float]]:
    """:func:`similarity` of every pair of texts, M × M.

    Args:
        texts: The counts of each text, as :func:`preference` takes them.
    """
    found = [preference(counts) for counts in texts]
    return [[similarity(a, b) for b in found] for a in found]


def by_layer(first: Sequence[Tensor], second: Sequence[Tensor]) -> list[float]:
    """:func:`similarity` of two texts in each layer alone."""
    return [similarity(preference([a]), preference([b])) for a, b in zip(first, second, strict=True)]
