"""Fidelity: how closely a compressed model follows its dense twin, token by token.

These figures move long before task accuracy does and need no labels: KL divergence of the next-token distributions,
agreement of the most likely token, and the relative error of the logits.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.evaluation.batching import COMPARED_ROWS, automatic_batch
from llmcompress.evaluation.scores import mean_stderr

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class FidelityResult:
    """What was measured over all positions of all windows.

    Attributes:
        kl: Mean of KL(dense ‖ compressed) in nats.
        kl_stderr: Standard error of ``kl`` with windows as independent units, None for one window.
        kl_p99: 99th percentile of the per-token KL.
        top1: Share of positions where both models put the same token first.
        top1_stderr: Standard error of ``top1`` with windows as units, None for one window.
        logit_error: ``‖z_c − z_d‖ / ‖z_d‖`` over all positions. Each row of logits is centred first, because a
            constant added to a row changes no probability.
        tokens: Positions compared.
        seconds_dense, seconds_compressed: Wall time of the forward passes.
    """

    kl: float
    kl_stderr: float | None
    kl_p99: float
    top1: float
    top1_stderr: float | None
    logit_error: float
    tokens: int
    seconds_dense: float
    seconds_compressed: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class RowComparison:
    """Comparison of ``[R, V]`` logits, row by row: KL ``[R]`` fp32, top-1 agreement ``[R]`` bool, two square sums."""

    kl: Tensor
    same_top1: Tensor
    error_squared: float
    dense_squared: float


def compare_logits(dense: Tensor, compressed: Tensor) -> RowComparison:
    """Compare two ``[R, V]`` logit matrices in fp32, a few rows at a time."""
    kl, same = [], []
    error = norm = 0.0
    for left, right in zip(dense.split(COMPARED_ROWS), compressed.split(COMPARED_ROWS)):
        p, q = left.float(), right.float()
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        # tiny negative values are rounding: KL is never below zero
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0.0))
        same.append(p.argmax(-1) == q.argmax(-1))
        del log_p, log_q
        p, q = p - p.mean(-1, keepdim=True), q - q.mean(-1, keepdim=True)
        # summed in fp32 along a row, in fp64 over rows: a copy of the logits in fp64 would double the memory
        error += float((q - p).square().sum(-1).double().sum())
        norm += float(p.square().sum(-1).double().sum())
    return RowComparison(torch.cat(kl), torch.cat(same), error, norm)


@torch.inference_mode()
def fidelity(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    tokens: Tensor,
    batch: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> FidelityResult:
    """Run both models over the same windows and compare every position.

    Args:
        dense: The reference model.
        compressed: The model to judge.
        tokens: ``[S, L]`` int64.
        batch: Windows per forward pass; automatic when None.
        progress: Hears after each pass how many windows of how many are finished.

    Raises:
        InputError: Either model's output is not finite.
    """
    size = batch or automatic_batch(2 * tokens.shape[1], int(dense.config.get_text_config().vocab_size))
    window_kl: list[float] = []
    window_top1: list[float] = []
    all_kl: list[Tensor] = []
    error = norm = seconds_dense = seconds_compressed = 0.0
    for ids in tokens.split(size):
        reference, seconds = _timed(dense, ids)
        seconds_dense += seconds
        judged, seconds = _timed(compressed, ids)
        seconds_compressed += seconds
        judged = judged.to(reference.device)
        for left, right in zip(reference, judged):
            row = compare_logits(left, right)
            window_kl.append(float(row.kl.double().mean()))
            window_top1.append(float(row.same_top1.double().mean()))
            all_kl.append(row.kl.cpu())
            error += row.error_squared
            norm += row.dense_squared
        # or the next batch's logits would be made while these are still held
        del reference, judged, left, right
        if progress is not None:
            progress(len(window_kl), len(tokens))
    if not (math.isfinite(error) and math.isfinite(norm)):
        raise InputError("a model's output is not finite (NaN or infinity)", "check its weights and dtype")
    every = torch.cat(all_kl)
    return FidelityResult(
        kl=math.fsum(window_kl) / len(window_kl),
        kl_stderr=mean_stderr(window_kl),
        kl_p99=_quantile(every, 0.99),
        top1=math.fsum(window_top1) / len(window_top1),
        top1_stderr=mean_stderr(window_top1),
        logit_error=math.sqrt(error / norm) if norm else 0.0,
        tokens=every.numel(),
        seconds_dense=seconds_dense,
        seconds_compressed=seconds_compressed,
    )


def _timed(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, float]:
    """Logits of windows ``[B, L]``, and the seconds they took."""
    started = time.perf_counter()
    logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits
    if logits.is_cuda:
        torch.cuda.synchronize(logits.device)  # or the pass after it would seem to take this one's time
    return logits, time.perf_counter() - started


def _quantile(values: Tensor, share: float) -> float:
    # torch.quantile refuses more than 2²⁴ values; kthvalue does not
    return float(values.kthvalue(max(1, math.ceil(share * values.numel()))).values)
