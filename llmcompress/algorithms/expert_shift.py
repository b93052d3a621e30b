"""How far the experts chosen by a compressed model moved from those of the full-precision one.

EAC-MoE (arXiv 2508.01625) section 6.2 counts three change rates per layer; ``overlap``, the rank
and loss shares of its Figure 4 and the divergence of the routing weights complete them. Every
function takes one layer's tokens flattened to ``T``; :class:`ShiftTally` adds up over batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from llmcompress.algorithms.routing import RouterRule


def shifted(reference: Tensor, chosen: Tensor) -> Tensor:
    """Bool ``[T, k]``: which reference experts were not chosen again; both int64 ``[T, k]``, distinct in each row."""
    return ~(reference.unsqueeze(-1) == chosen.unsqueeze(-2)).any(-1)


def rank_counts(scores: Tensor, reference: Tensor, chosen: Tensor) -> Tensor:
    """Histogram of the ranks at which lost experts sit in the compressed model's scores.

    Args:
        scores: ``[T, N]`` scores by which the compressed model selects, higher is better.
        reference: int64 ``[T, k]`` experts of the full-precision model.
        chosen: int64 ``[T, k]`` experts of the compressed model.

    Returns:
        int64 ``[N]``; entry r counts lost experts with rank r (0 is best).
    """
    lost = shifted(reference, chosen)
    order = scores.argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))
    return torch.bincount(rank.gather(-1, reference)[lost], minlength=scores.shape[-1])


def kl_topk(logits: Tensor, logits_hat: Tensor, reference: Tensor) -> Tensor:
    """Divergence of the routing distributions restricted to the experts that the full-precision model chose.

    Both logits are gathered there and normalised, so that the figure compares the weights that matter.

    Args:
        logits: float ``[T, N]`` of the full-precision model.
        logits_hat: float ``[T, N]`` of the compressed model.
        reference: int64 ``[T, k]`` experts of the full-precision model.

    Returns:
        float32 ``[T]``, KL(full precision ‖ compressed) in nats.
    """
    p = logits.gather(-1, reference).float().log_softmax(-1)
    q = logits_hat.gather(-1, reference).float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def tokens_per_expert(chosen: Tensor, num_experts: int) -> Tensor:
    """How often each expert was selected; indices outside ``[0, N)`` mark skipped slots and are ignored.

    Args:
        chosen: int64 ``[T, k]``.
        num_experts: N.

    Returns:
        int64 ``[N]``.
    """
    flat = chosen.reshape(-1)
    return torch.bincount(flat[(flat >= 0) & (flat < num_experts)], minlength=num_experts)


@dataclass
class ShiftTally:
    """Streaming sums of one layer's shift metrics.

    With ``d`` changed experts of a token, ``cr_any`` is the share of tokens with d ≥ 1, ``cr_half`` with d ≥ k/2,
    ``cr_all`` with d = k; ``overlap`` is the mean of 1 − d/k. ``rank_cover_K`` is the share of lost experts that still
    rank among the compressed model's best K (Figure 4, blue), 1 where none was lost; ``loss_share_K`` the share of the
    squared error of all logits that falls on the full-precision top K (Figure 4, orange), 0 where there is no error.

    Attributes:
        rule: By what experts are ranked, and how many a token has.
        cover: The K for which ``rank_cover`` and ``loss_share`` are reported.
    """

    rule: RouterRule
    cover: Sequence[int] = ()
    tokens: int = 0
    changed: list[int] = field(default_factory=list)
    ranks: Tensor | None = None
    error: dict[int, float] = field(default_factory=dict)
    error_total: float = 0.0
    kl_sum: float = 0.0

    def add(self, reference: Tensor, chosen: Tensor, logits: Tensor, logits_hat: Tensor) -> None:
        """Count a batch of tokens.

        Args:
            reference: int64 ``[T, k]`` full-precision experts.
            chosen: int64 ``[T, k]`` compressed experts.
            logits: float ``[T, N]`` full-precision logits.
            logits_hat: float ``[T, N]`` compressed logits.
        """
        slots = self.rule.top_k + 1
        counts = torch.bincount(shifted(reference, chosen).sum(-1), minlength=slots).tolist()
        self.changed = [a + b for a, b in zip(self.changed or [0] * slots, counts)]
        self.tokens += reference.shape[0]
        counted = rank_counts(self.rule.scores(logits_hat), reference, chosen)
        self.ranks = counted if self.ranks is None else self.ranks + counted
        self.kl_sum += float(kl_topk(logits, logits_hat, reference).double().sum())
        squared = (logits.double() - logits_hat.double()).square()
        self.error_total += float(squared.sum())
        scores = self.rule.scores(logits)
        for k in self.cover:
            top = scores.topk(k, dim=-1).indices
            self.error[k] = self.error.get(k, 0.0) + float(squared.gather(-1, top).sum())

    def rates(self) -> dict[str, float]:
        """All figures so far; empty before the first token."""
        if self.ranks is None:
            return {}
        k, n, lost = self.rule.top_k, self.tokens, int(self.ranks.sum())
        values = {
            "cr_any": 1 - self.changed[0] / n,
            "cr_half": sum(c for d, c in enumerate(self.changed) if 2 * d >= k) / n,
            "cr_all": self.changed[k] / n,
            "overlap": sum(c * (1 - d / k) for d, c in enumerate(self.changed)) / n,
            "kl_topk": self.kl_sum / n,
        }
        for K in self.cover:
            values[f"rank_cover_{K}"] = float(self.ranks[:K].sum()) / lost if lost else 1.0
            values[f"loss_share_{K}"] = self.error.get(K, 0.0) / self.error_total if self.error_total else 0.0
        return values
