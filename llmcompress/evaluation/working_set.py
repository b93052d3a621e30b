"""Memory that evaluation needs beside the models, from the recipe and the layout; torch-free, for estimates.

Legend: R rows of logits in a batch, V vocabulary, I intermediate, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from llmcompress.evaluation.batching import COMPARED_ROWS, SCORED_ROWS, SHIFT_WINDOWS, automatic_batch, task_batch

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.evaluate import EvaluateConfig

# fp32 matrices [rows, V] alive at once while rows are scored, and while two models' rows are compared
SCORING_COPIES = 2
COMPARING_COPIES = 5
# activations of a sublayer in units of its widest projection
WIDTHS = 4


def peak_bytes(config: EvaluateConfig, layout: ModelLayout, item: int) -> int:
    """Largest working set of any part of an evaluate stage.

    Args:
        config: The stage's config.
        layout: The model's layout.
        item: Bytes of a value in compute dtype.
    """
    return max(_parts(config, layout, item), default=0)


def _parts(config: EvaluateConfig, layout: ModelLayout, item: int) -> Iterator[int]:
    vocabulary = layout.vocab
    for text in config.perplexity.values():
        windows = None if text.max_tokens is None else -(-text.max_tokens // (text.stride or text.length))
        rows = _batch(config, text.length, vocabulary, windows) * text.length
        yield _logits(rows, vocabulary, item) + _scoring(text.length, vocabulary) + _activations(layout, rows, item)
    if config.fidelity is not None:
        length = config.fidelity.length
        # both models' logits are held, so half as many windows go together
        batch = config.batch if isinstance(config.batch, int) else automatic_batch(2 * length, vocabulary)
        rows = min(batch, config.fidelity.samples) * length
        compared = COMPARING_COPIES * min(COMPARED_ROWS, length) * vocabulary * 4
        yield 2 * _logits(rows, vocabulary, item) + compared + _activations(layout, rows, item)
    if config.expert_shift and (config.fidelity is not None or config.perplexity):
        part = config.fidelity if config.fidelity is not None else next(iter(config.perplexity.values()))
        windows = config.fidelity.samples if config.fidelity is not None else SHIFT_WINDOWS
        rows = _batch(config, part.length, vocabulary, windows) * part.length
        routing = 2 * rows * 4 * sum(b.bank.num_experts + 3 * b.bank.top_k for b in layout.blocks if b.bank is not None)
        scored = _logits(rows, vocabulary, item) + _scoring(part.length, vocabulary)
        yield scored + _activations(layout, rows, item) + routing
    if config.recall is not None:
        rows = 8 * (max(config.recall.distances) + 16)
        yield _logits(rows, vocabulary, item) + _activations(layout, rows, item)
    if config.tasks:
        # lm-eval normalises all logits of a batch at once
        yield 2 * _logits(256 * task_batch(256, vocabulary), vocabulary, item)


def _batch(config: EvaluateConfig, length: int, vocabulary: int, windows: int | None) -> int:
    batch = config.batch if isinstance(config.batch, int) else automatic_batch(length, vocabulary)
    return batch if windows is None else max(1, min(batch, windows))


def _logits(rows: int, vocabulary: int, item: int) -> int:
    return rows * vocabulary * item


def _scoring(length: int, vocabulary: int) -> int:
    return SCORING_COPIES * min(SCORED_ROWS, length) * vocabulary * 4


def _activations(layout: ModelLayout, rows: int, item: int) -> int:
    """Widest activations of one sublayer; routed rows are gathered, expanded and brought back."""
    widest = 0
    for block in layout.blocks:
        widest = max(widest, *(WIDTHS * max(view.out_features, view.in_features) for view in block.linears()))
        bank = block.bank
        if bank is not None:
            widest = max(widest, bank.top_k * (2 * bank.hidden + 3 * bank.intermediate))
    return rows * widest * item
