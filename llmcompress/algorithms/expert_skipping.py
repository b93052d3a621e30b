"""PESF: skip the experts a prompt hardly uses (EAC-MoE, arXiv 2508.01625, section 5).

For one layer and one sequence of ``l`` tokens, expert ``e`` of ``N`` is skipped when it was
selected ``c_e < alpha · l·k/N`` times, that is less than ``alpha`` times its fair share (Eq. 6). The
paper leaves open what happens to the weights of the other experts, to tokens that lose all of
theirs, to padding and to batches; the choices made here are arguments. Everything works on one
layer's routing, flattened to ``T = B·L`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from llmcompress.algorithms.routing import RouterRule


@dataclass(frozen=True)
class SkipOptions:
    """What to do with the slots of skipped experts.

    Attributes:
        alpha: Share of the fair share below which an expert is skipped.
        fallback: ``none`` leaves a dropped slot empty, ``reroute`` chooses again without the skipped experts.
        keep_top1: A token that would lose all its experts keeps its strongest.
        renormalize: Whether the remaining weights take over the dropped ones in proportion.
    """

    alpha: float
    fallback: Literal["none", "reroute"] = "none"
    keep_top1: bool = False
    renormalize: bool = False


def expert_counts(index: Tensor, valid: Tensor, group: Tensor, groups: int, num_experts: int) -> Tensor:
    """How often each expert was selected in each group of tokens.

    Args:
        index: int64 ``[T, k]`` selected experts; values outside ``[0, N)`` are ignored.
        valid: bool ``[T]``, false for padding.
        group: int64 ``[T]``, the sequence a token belongs to (all zero for a whole batch).
        groups: Number of groups G.
        num_experts: N.

    Returns:
        int64 ``[G, N]``.
    """
    counted = valid.unsqueeze(-1) & (index >= 0) & (index < num_experts)
    # what does not count goes into a place of its own: picking out the rest would make a GPU wait
    size = groups * num_experts
    flat = torch.where(counted, group.unsqueeze(-1) * num_experts + index, size).view(-1)
    counts = torch.zeros(size + 1, dtype=torch.int64, device=index.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat))[:size].view(groups, num_experts)


def rarely_used(counts: Tensor, lengths: Tensor, top_k: int, alpha: float) -> Tensor:
    """Eq. 6: bool ``[G, N]``, which experts to skip in which group.

    Args:
        counts: int64 ``[G, N]`` from :func:`expert_counts`.
        lengths: int64 ``[G]``, tokens of each group without padding.
        top_k: Experts per token.
        alpha: Threshold in ``(0, 1]``.
    """
    fair = lengths.double() * top_k / counts.shape[-1]
    return counts.double() < alpha * fair.unsqueeze(-1)


def shortest_useful(alpha: float, top_k: int, num_experts: int) -> int:
    """Length up to which Eq. 6 cannot skip an expert that was used at all.

    A selected expert has a count of at least 1, so nothing changes while ``alpha·l·k/N ≤ 1``.
    """
    return int(num_experts / (alpha * top_k) + 1e-9)


def drop_slots(
    weights: Tensor,
    index: Tensor,
    drop: Tensor,
    num_experts: int,
    options: SkipOptions,
    factors: Tensor | None = None,
) -> Drop:
    """Empty slots of a routing decision.

    Args:
        weights: ``[T, k]`` routing weights, normalised or not.
        index: int64 ``[T, k]``.
        drop: bool ``[T, k]``, slots to empty.
        num_experts: N, which is also the index that marks an empty slot.
        options: ``keep_top1`` and ``renormalize`` are used.
        factors: ``[T, k]`` that multiplied the weights once they summed to one, None without.

    Returns:
        New weights (0 in empty slots) and indices (N in empty slots).
    """
    if options.keep_top1:
        strongest = torch.zeros_like(drop).scatter_(-1, weights.argmax(-1, keepdim=True), True)
        drop = drop & ~(drop.all(-1, keepdim=True) & strongest)
    kept = weights.masked_fill(drop, 0)
    if options.renormalize:
        # the survivors of a token take over in proportion, so that its weights sum to what they
        # summed to; for models that normalise their top k this is their own normalisation
        shares = [part.float() if factors is None else part.float() / factors.float() for part in (weights, kept)]
        before, after = (part.sum(-1, keepdim=True) for part in shares)
        kept = (kept * (before / after.clamp_min(1e-20))).to(weights.dtype)
    return Drop(kept, index.masked_fill(drop, num_experts), drop)


@dataclass(frozen=True)
class Drop:
    """A routing decision with empty slots.

    Attributes:
        weights: ``[T, k]``, 0 in empty slots.
        index: int64 ``[T, k]``, N in empty slots.
        dropped: bool ``[T, k]``, which slots were emptied or re-routed.
    """

    weights: Tensor
    index: Tensor
    dropped: Tensor


def skip_experts(
    logits: Tensor, weights: Tensor, index: Tensor, banned: Tensor, rule: RouterRule, options: SkipOptions
) -> Drop:
    """Take skipped experts out of a routing decision.

    Args:
        logits: ``[T, N]`` router logits; used when re-routing.
        weights: ``[T, k]`` the model's own routing weights.
        index: int64 ``[T, k]`` the model's own choice.
        banned: bool ``[T, N]``, experts skipped for each token.
        rule: The router family.
        options: What to do with the slots.

    Returns:
        The new decision. Tokens that used no skipped expert keep their weights bit for bit.
    """
    hit = banned.gather(-1, index)
    if options.fallback == "none":
        return drop_slots(weights, index, hit, banned.shape[-1], options, rule.factors_of(index))
    touched = hit.any(-1, keepdim=True)
    chosen = rule.select(logits, banned)
    # where fewer than k experts are left, the choice contains banned ones: those slots are empty
    empty = banned.gather(-1, chosen)
    fresh = rule.weigh(logits, chosen, banned).nan_to_num(0.0).masked_fill(empty, 0).to(weights.dtype)
    return Drop(
        torch.where(touched, fresh, weights),
        torch.where(touched, chosen.masked_fill(empty, banned.shape[-1]), index),
        hit,
    )


def drop_weakest(
    weights: Tensor, index: Tensor, num_experts: int, options: SkipOptions, factors: Tensor | None = None
) -> Drop:
    """The fixed baseline: every token loses its weakest expert, whatever the prompt.

    Args:
        weights: ``[T, k]`` with k ≥ 2.
        index: int64 ``[T, k]``.
        num_experts: N.
        options: ``renormalize`` is used.
        factors: As in :func:`drop_slots`.

    Raises:
        ValueError: k is 1.
    """
    if weights.shape[-1] < 2:
        raise ValueError("a token with one expert has none to spare")
    # the last minimum, so that the choice among equals does not depend on how top-k sorted them
    last = weights.shape[-1] - 1 - weights.flip(-1).argmin(-1, keepdim=True)
    drop = torch.zeros_like(index, dtype=torch.bool).scatter_(-1, last, True)
    return drop_slots(weights, index, drop, num_experts, options, factors)
