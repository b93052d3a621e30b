"""Perplexity of a text, with exact token accounting.

The default is the protocol of the GPTQ papers on WikiText-2: rows joined by two newlines, tokenized in one go with
whatever special tokens the tokenizer itself adds, cut into windows of L tokens that do not overlap; in each window
every token but the first is predicted; a shorter last window is dropped. With ``stride < length`` windows overlap and
only the tokens that are new in a window count, so every token but the very first is predicted exactly once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.evaluation.batching import SCORED_ROWS, automatic_batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


POSITION_BIN = 64
_NOT_FINITE = ("the model's output is not finite (NaN or infinity) on this text", "check its weights and dtype")


@dataclass(frozen=True, slots=True)
class Text:
    """A tokenized text.

    Attributes:
        tokens: ``[T]`` int64.
        bytes_until: ``[T]`` int64, UTF-8 bytes of the text up to the end of each token, or None when the tokenizer
            cannot say.
        total_bytes: UTF-8 bytes of the whole text.
    """

    tokens: Tensor
    bytes_until: Tensor | None
    total_bytes: int

    def first(self, count: int | None) -> Text:
        """The first ``count`` tokens of this text; the text itself when None."""
        if count is None or count >= len(self.tokens):
            return self
        if self.bytes_until is None:
            return Text(self.tokens[:count], None, round(self.total_bytes * count / len(self.tokens)))
        return Text(self.tokens[:count], self.bytes_until[:count], int(self.bytes_until[count - 1]))


@dataclass(frozen=True, slots=True)
class Window:
    """One forward pass: tokens ``[begin, end)``, of which those from ``scored`` on are predicted and counted."""

    begin: int
    end: int
    scored: int


@dataclass(frozen=True, slots=True)
class PerplexityResult:
    """What was measured.

    Attributes:
        perplexity: ``exp(nll / tokens)``.
        stderr: Standard error of the perplexity from the spread between windows, None for one window.
        bits_per_byte: ``nll / ln 2 / bytes``.
        nll: Sum of negative log-likelihoods in nats.
        tokens: Tokens predicted and counted.
        text_bytes: UTF-8 bytes that those tokens stand for.
        bytes_exact: Whether ``text_bytes`` was counted rather than estimated from the whole text.
        windows: Forward rows.
        dropped: Tokens of the text that were not used because they did not fill a window.
        seconds: Wall time of the forward passes.
        window_nll: Each window's share of the mean: its sum of negative log-likelihoods over the average count of
            tokens in a window. Their mean is ``nll / tokens``; two models can be compared window by window.
        position_nll: Mean negative log-likelihood by position in the window, in bins of ``POSITION_BIN`` tokens: an
            error that builds up over a sequence rises here.
    """

    perplexity: float
    stderr: float | None
    bits_per_byte: float
    nll: float
    tokens: int
    text_bytes: int
    bytes_exact: bool
    windows: int
    dropped: int
    seconds: float
    window_nll: tuple[float, ...] = ()
    position_nll: tuple[float, ...] = ()


def tokenize(text: str, tokenizer: PreTrainedTokenizerBase) -> Text:
    """Tokenize a whole text with the tokenizer's own special tokens.

    Raises:
        InputError: Fewer than two tokens come out.
    """
    fast = bool(getattr(tokenizer, "is_fast", False))
    encoded = tokenizer(text, return_offsets_mapping=fast, verbose=False)
    tokens = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    if len(tokens) < 2:
        raise InputError(f"the text has {len(tokens)} tokens; perplexity needs two", "give a longer text")
    sizes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    widths = 1 + (sizes >= 0x80).astype(np.int64) + (sizes >= 0x800) + (sizes >= 0x10000)
    until = np.concatenate([[0], np.cumsum(widths)])
    if not fast:
        return Text(tokens, None, int(until[-1]))
    ends = np.asarray([end for _, end in encoded["offset_mapping"]], dtype=np.int64)
    # special tokens have the offset (0, 0); the running maximum gives them no bytes of their own
    return Text(tokens, torch.from_numpy(until[np.maximum.accumulate(ends)]), int(until[-1]))


def windows(total: int, length: int, stride: int | None = None, keep_tail: bool = False) -> list[Window]:
    """Plan the forward passes over ``total`` tokens.

    Args:
        total: Tokens in the text, at least 2.
        length: Tokens per window.
        stride: Tokens between window starts; ``length`` when None.
        keep_tail: Whether a shorter last window counts. Overlapping windows always keep it, and a text shorter than
            a window is one short window.
    """
    stride = length if stride is None else stride
    if not 1 <= stride <= length:
        raise ValueError(f"stride {stride} must lie between 1 and length {length}")
    if total <= length:
        return [Window(0, total, 1)]
    planned: list[Window] = []
    covered = 0
    for begin in range(0, total, stride):
        end = min(begin + length, total)
        if end - begin < length and stride == length and not keep_tail:
            break
        # the first token of a window has nothing before it that could predict it
        scored = max(covered, begin + 1)
        if scored < end:
            planned.append(Window(begin, end, scored))
        covered = end
        if end == total:
            break
    return planned


def refuse_nan(logits: Tensor) -> None:
    """Refuse logits with a NaN: comparisons with it are false, so that answers chosen by them would look like errors.

    Raises:
        InputError: There is one.
    """
    if bool(logits.isnan().any()):
        raise InputError(*_NOT_FINITE)


def token_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in fp32.

    Args:
        logits: ``[R, V]`` in any float type; row r predicts ``targets[r]``.
        targets: ``[R]`` int64.

    Returns:
        ``[R]`` float32.
    """
    parts = []
    for rows, wanted in zip(logits.split(SCORED_ROWS), targets.split(SCORED_ROWS)):
        full = rows.float()
        parts.append(full.logsumexp(-1) - full.gather(-1, wanted[:, None]).squeeze(-1))
    return torch.cat(parts)


@torch.inference_mode()
def perplexity(
    model: PreTrainedModel,
    text: Text,
    length: int,
    stride: int | None = None,
    *,
    keep_tail: bool = False,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Measure the perplexity of ``text`` under ``model``.

    Args:
        model: A causal language model in evaluation mode.
        text: What :func:`tokenize` gave.
        length: Tokens per window; must not exceed what the model supports.
        stride: Tokens between window starts; ``length`` when None.
        keep_tail: Whether a shorter last window counts.
        batch: Windows per forward pass; automatic when None.
        progress: Hears after each pass how many windows of how many are finished.

    Raises:
        InputError: The model's output is not finite.
    """
    size = batch or automatic_batch(length, int(model.config.get_text_config().vocab_size))

    def logits(_rows: slice, ids: Tensor) -> Tensor:
        found: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
        return found

    return scored(text, windows(len(text.tokens), length, stride, keep_tail), size, length, logits, progress)


def window_parts(text: Text, length: int, stride: int | None = None, keep_tail: bool = False) -> list[Tensor]:
    """The windows' tokens, ``[S, L]`` int64, a tensor for each run of consecutive windows of equal length."""
    planned = windows(len(text.tokens), length, stride, keep_tail)
    groups = _batches(planned, len(planned))
    return [torch.stack([text.tokens[window.begin : window.end] for window in group]) for group in groups]


@torch.inference_mode()
def scored(
    text: Text,
    planned: list[Window],
    size: int,
    length: int,
    logits_of: Callable[[slice, Tensor], Tensor],
    progress: Callable[[int, int], None] | None = None,
) -> PerplexityResult:
    """Perplexity from logits, however they are made.

    Args:
        text: What :func:`tokenize` gave.
        planned: The windows.
        size: Windows at once.
        length: Tokens in a full window.
        logits_of: Maps positions in ``planned`` and the windows' tokens ``[B, L]`` to logits ``[B, L, V]``.
        progress: Hears after each batch how many windows of how many are finished.

    Raises:
        InputError: The logits are not finite.
    """
    started = time.perf_counter()
    done = 0
    sums: list[float] = []
    counts: list[int] = []
    bins = torch.zeros(2, -(-length // POSITION_BIN), dtype=torch.float64)
    for group in _batches(planned, size):
        ids = torch.stack([text.tokens[window.begin : window.end] for window in group])
        logits = logits_of(slice(done, done + len(group)), ids)
        done += len(group)
        ids = ids.to(logits.device)
        firsts = [window.scored - window.begin for window in group]
        scores = [token_nll(logits[row, first - 1 : -1], ids[row, first:]) for row, first in enumerate(firsts)]
        # one transfer a batch: a GPU that others use too answers each only at its next turn
        for first, nll in zip(firsts, torch.cat(scores).double().cpu().split([len(nll) for nll in scores])):
            sums.append(float(nll.sum()))
            place = torch.arange(first, ids.shape[1]) // POSITION_BIN
            bins[0].index_add_(0, place, nll)
            bins[1].index_add_(0, place, torch.ones(len(place), dtype=torch.float64))
            counts.append(len(nll))
        # or the next batch's logits would be made while these are still held
        del logits
        if progress is not None:
            progress(done, len(planned))
    seconds = time.perf_counter() - started
    total, tokens = math.fsum(sums), sum(counts)
    if not math.isfinite(total):
        raise InputError(*_NOT_FINITE)
    text_bytes, exact = _scored_bytes(text, planned)
    value = math.exp(min(total / tokens, 700.0))
    return PerplexityResult(
        perplexity=value,
        stderr=_stderr(value, total / tokens, sums, counts),
        bits_per_byte=total / math.log(2) / max(text_bytes, 1),
        nll=total,
        tokens=tokens,
        text_bytes=text_bytes,
        bytes_exact=exact,
        windows=len(planned),
        dropped=len(text.tokens) - planned[-1].end,
        seconds=seconds,
        window_nll=tuple(part * len(sums) / tokens for part in sums),
        position_nll=tuple((bins[0] / bins[1])[bins[1] > 0].tolist()),
    )


def _batches(planned: list[Window], size: int) -> Iterator[list[Window]]:
    """Group consecutive windows of equal length, at most ``size`` together."""
    group: list[Window] = []
    for window in planned:
        if group and (len(group) == size or window.end - window.begin != group[0].end - group[0].begin):
            yield group
            group = []
        group.append(window)
    if group:
        yield group


def _stderr(value: float, mean: float, sums: list[float], counts: list[int]) -> float | None:
    """Delta-method standard error of ``exp(mean)`` with windows as independent units."""
    count = len(sums)
    if count < 2:
        return None
    average = sum(counts) / count
    spread = sum(((s - mean * c) / average) ** 2 for s, c in zip(sums, counts)) / (count - 1)
    return value * math.sqrt(spread / count)


def _scored_bytes(text: Text, planned: list[Window]) -> tuple[int, bool]:
    """UTF-8 bytes behind the counted tokens, and whether that is exact."""
    if text.bytes_until is None:
        share = sum(window.end - window.scored for window in planned) / len(text.tokens)
        return round(text.total_bytes * share), False
    until = text.bytes_until
    return sum(int(until[window.end - 1] - until[window.scored - 1]) for window in planned), True
