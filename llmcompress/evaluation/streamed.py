"""Perplexity of a model that is never in memory whole."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from llmcompress.evaluation.batching import automatic_batch
from llmcompress.evaluation.perplexity import PerplexityResult, Text, scored, window_parts, windows

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.streamed import StreamedModel


def streamed_perplexity(
    stream: Callable[[Sequence[Tensor]], StreamedModel],
    text: Text,
    length: int,
    stride: int | None = None,
    *,
    keep_tail: bool = False,
) -> PerplexityResult:
    """The figure of :func:`~llmcompress.evaluation.perplexity.perplexity`, up to the rounding of matrix products.

    Args:
        stream: Runs the model on windows, ``[S, L]`` int64 each, block by block.
        text: A tokenized text.
        length: Tokens per window.
        stride: Tokens between window starts; ``length`` when None.
        keep_tail: Whether a shorter last window counts.

    Raises:
        InputError: The model's output is not finite.
    """
    started = time.perf_counter()
    parts = window_parts(text, length, stride, keep_tail)
    model = stream(parts)
    bounds = [0]
    for part in parts:
        bounds.append(bounds[-1] + len(part))

    def logits(rows: slice, _ids: Tensor) -> Tensor:
        # a batch holds windows of one length, so it never spans two parts
        part = next(number for number, end in enumerate(bounds[1:]) if rows.start < end)
        return model.logits(part, slice(rows.start - bounds[part], rows.stop - bounds[part]))

    size = automatic_batch(length, int(model.model.config.get_text_config().vocab_size))
    found = scored(text, windows(len(text.tokens), length, stride, keep_tail), size, length, logits)
    return replace(found, seconds=time.perf_counter() - started)
