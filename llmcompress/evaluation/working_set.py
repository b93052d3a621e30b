"""Memory that evaluation needs beside the models, from the recipe and the layout; torch-free, for estimates.

Legend: R rows of logits in a batch, V vocabulary, I intermediate, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Literal

from llmcompress.evaluation.batching import COMPARED_ROWS, SCORED_ROWS, SHIFT_WINDOWS, automatic_batch, task_batch
from llmcompress.models import sizes
from llmcompress.models.memory_limits import SHARE

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.evaluate import EvaluateConfig

Side = Literal["dense", "compressed"]

# fp32 matrices [rows, V] alive at once while rows are scored, and while two models' rows are compared
SCORING_COPIES = 2
COMPARING_COPIES = 5
# part of a budget that activations may take while a model goes block by block, the rest lies in files
ACTIVATION_SHARE = 8
# a text whose length no one has limited
UNKNOWN_TOKENS = 1 << 20
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


def streamed_sides(
    config: EvaluateConfig, layout: ModelLayout, sizes_of: Mapping[str, int], work: int, ram: int
) -> list[Side]:
    """Models that are to be run block by block because they exceed a budget in memory; perplexity alone allows it.

    Args:
        config: The stage's config.
        layout: The model's layout.
        sizes_of: ``dense`` and ``compressed`` → bytes in memory.
        work: Working set beside a model.
        ram: Budget above the empty interpreter.
    """
    together = config.fidelity is not None or config.expert_shift
    if together or config.tasks or config.recall is not None or config.generation is not None or not config.perplexity:
        return []
    if layout.longest is not None and max(text.length for text in config.perplexity.values()) > layout.longest:
        return []
    sides: tuple[Side, ...] = ("dense", "compressed") if config.dense else ("compressed",)
    return [side for side in sides if sizes_of[side] + work > SHARE * ram]


def streamed_tokens(config: EvaluateConfig) -> int:
    """Tokens of the longest text that goes through a model block by block; a text without a limit counts as large."""
    return max((text.max_tokens or UNKNOWN_TOKENS for text in config.perplexity.values()), default=0)


def streamed_bytes(layout: ModelLayout, weight_bytes: int, item: int) -> int:
    """Weights in memory while a model goes block by block: one block, its largest weight as read, embedding, head."""
    return (sizes.largest_block(layout) + sizes.outside_parameters(layout)) * item + as_read(layout, weight_bytes)


def as_read(layout: ModelLayout, weight_bytes: int) -> int:
    """A block's largest weight as it is in the file, or decoded."""
    return max((prod(shape) for _, _, shape, _ in layout.quantizable()), default=0) * max(weight_bytes, 4)


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
    if config.generation is not None and config.generation.temperature == 0 and item == 4:
        # the native engine has a copy in bfloat16 of float32 weights that it can hold, as most checkpoints' can
        yield sum(prod(view.shape) for view in layout.tensors()) * 2
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
