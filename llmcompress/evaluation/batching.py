"""How many windows go through a model at once; without torch, because estimates need it too."""

from __future__ import annotations

LOGIT_BYTES = 1 << 28
"""Bytes of fp32 logits that an automatic batch may produce at once."""

FAMILY_CUDA_BYTES = 1 << 31
"""The same for the members of a family on a GPU."""

SCORED_ROWS = 512
"""Rows of logits that are normalised together when perplexity is computed."""

COMPARED_ROWS = 256
"""Rows of two models' logits that are compared together."""

SHIFT_WINDOWS = 16
"""Windows of a text on which expert shift is measured, where no fidelity text is named."""


def automatic_batch(length: int, vocabulary: int) -> int:
    """Windows per forward pass such that fp32 logits stay near 256 MB, at most 32."""
    return max(1, min(32, LOGIT_BYTES // (length * vocabulary * 4)))


def family_batch(length: int, vocabulary: int, device: str) -> int | None:
    """Windows at once where many small models are measured; None for what is automatic.

    A pass of a small model over few tokens is over before a GPU has been told of it, so logits may take 2 GB there.
    """
    return max(1, min(64, FAMILY_CUDA_BYTES // (length * vocabulary * 4))) if device == "cuda" else None


def task_batch(length: int, vocabulary: int) -> int:
    """Requests of about ``length`` tokens per forward pass in task evaluation, at most 8."""
    return min(8, automatic_batch(length, vocabulary))
