"""How many windows go through a model at once; without torch, because estimates need it too."""

from __future__ import annotations

LOGIT_BYTES = 1 << 28
"""Bytes of fp32 logits that an automatic batch may produce at once."""

SCORED_ROWS = 512
"""Rows of logits that are normalised together when perplexity is computed."""

COMPARED_ROWS = 256
"""Rows of two models' logits that are compared together."""

SHIFT_WINDOWS = 16
"""Windows of a text on which expert shift is measured, where no fidelity text is named."""


def automatic_batch(length: int, vocabulary: int) -> int:
    """Windows per forward pass such that fp32 logits stay near 256 MB, at most 32."""
    return max(1, min(32, LOGIT_BYTES // (length * vocabulary * 4)))


def task_batch(length: int, vocabulary: int) -> int:
    """Requests of about ``length`` tokens per forward pass in task evaluation, at most 8."""
    return min(8, automatic_batch(length, vocabulary))
