"""Policy objectives of S2R: advantages, baselines, the clipped surrogate, KL, and the offline filters.

Ma, Wang et al., ACL 2025 long 1104, arXiv 2502.12853: outcome level (section 2.3.1, RLOO after arXiv 2402.14740),
process level with reward contexts (section 2.3.2), offline (section 2.4, appendix F). One loss serves all of them: a
response is a list of *units* (the whole response at outcome level, its actions at process level), each with one
advantage.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

RatioMode = Literal["mean", "sum", "token"]
Scope = Literal["batch", "running", "ema"]
Context = tuple[int, ...]

# log-ratios beyond this carry no information and overflow in exp; the authors clamp there too
MAX_LOG_RATIO = 10.0
# responses that the context before counts for, where few came through a context
LEAN = 4
# rows of logits in float32 at once
PIECE = 2048


def leave_one_out(rewards: Tensor) -> Tensor:
    """RLOO advantage ``R_m − (1/(M−1)) Σ_{j≠m} R_j`` (section 2.3.1).

    Args:
        rewards: ``[P, M]``, M ≥ 2 samples of each of P prompts.

    Returns:
        ``[P, M]``; a row whose rewards agree is 0.

    Raises:
        ValueError: One sample has nothing to be left out of.
    """
    count = rewards.shape[-1]
    if count < 2:
        raise ValueError("leave-one-out needs at least two samples of each prompt")
    # exactly 0 where samples agree, as their distance from a mean need not be
    apart = rewards - rewards[:, :1]
    return (apart - apart.mean(-1, keepdim=True)) * (count / (count - 1))


def contexts(rewards: Sequence[int]) -> list[Context]:
    """Reward context of each action: the rewards of those before it (section 2.3.2)."""
    return [tuple(rewards[:index]) for index in range(len(rewards))]


def context_values(prefixes: Sequence[Sequence[Context]], outcomes: Sequence[float]) -> dict[Context, float]:
    """Mean outcome of the responses that came through each reward context: what is to be expected there.

    A context that few came through leans on the one before it: ``V(c) = (Σ R + 4 V(c′)) / (n + 4)`` with its ``n``
    responses and the context ``c′`` without the last reward; the empty one leans on 0. Ours.

    Args:
        prefixes: Prefixes of each response, the contexts of its actions (:func:`contexts`).
        outcomes: Outcomes of each response.
    """
    found: dict[Context, tuple[float, int]] = {}
    for passed, outcome in zip(prefixes, outcomes, strict=True):
        for context in passed:
            total, count = found.get(context, (0.0, 0))
            found[context] = (total + outcome, count + 1)
    values: dict[Context, float] = {}
    for context in sorted(found, key=len):
        total, count = found[context]
        before = values[context[:-1]] if context else 0.0
        values[context] = (total + LEAN * before) / (count + LEAN)
    return values


def accuracy_bin(right: int, samples: int, bins: int) -> int:
    """Bin of a problem's accuracy, 0 … bins − 1 (section 2.4); with ``bins`` = samples + 1 every count has its own."""
    # in whole numbers: 29 of 100 times 100 is 28.99… in floats
    return min(right * bins // samples, bins - 1)


@dataclass
class GroupBaseline:
    """Mean reward of a group, from this batch or from all batches before it.

    Attributes:
        scope: ``batch`` is the paper's: the group is the pool at hand, the action itself included. ``running`` is the
            authors' code: the mean over the run so far, read before the batch is added. ``ema`` forgets with ``decay``.
        min_group: Below this size the baseline is 0 (10 in the authors' code).
        softmax: None for the mean; τ for ``τ log mean exp(r/τ)``, an option of the authors' offline code.
        table: Group → (sum, weight); kept for ``running`` and ``ema``.
    """

    scope: Scope = "batch"
    min_group: int = 10
    decay: float = 0.95
    softmax: float | None = None
    table: dict[Hashable, tuple[float, float]] = field(default_factory=dict)

    def values(self, keys: Sequence[Hashable], rewards: Sequence[float]) -> list[float]:
        """Baseline of each action, and add the batch to the table.

        Args:
            keys: Group of each action.
            rewards: Its reward (or return).
        """
        batch: dict[Hashable, tuple[float, float]] = {}
        for key, reward in zip(keys, rewards, strict=True):
            total, weight = batch.get(key, (0.0, 0.0))
            batch[key] = (total + self._lift(reward), weight + 1)
        known = batch if self.scope == "batch" else self.table
        found = {key: self._value(known.get(key, (0.0, 0.0))) for key in batch}
        if self.scope != "batch":
            self._add(batch)
        return [found[key] for key in keys]

    def _add(self, batch: Mapping[Hashable, tuple[float, float]]) -> None:
        keep = self.decay if self.scope == "ema" else 1.0
        for key, (total, weight) in batch.items():
            old_total, old_weight = self.table.get(key, (0.0, 0.0))
            self.table[key] = (keep * old_total + total, keep * old_weight + weight)

    def _lift(self, reward: float) -> float:
        return reward if self.softmax is None else math.exp(reward / self.softmax)

    def _value(self, entry: tuple[float, float]) -> float:
        total, weight = entry
        if weight < self.min_group:
            return 0.0
        mean = total / weight
        return mean if self.softmax is None else self.softmax * math.log(mean)

    def state(self) -> list[list[object]]:
        """The table as JSON data."""
        return [[list(key) if isinstance(key, tuple) else key, *entry] for key, entry in self.table.items()]

    def restore(self, state: Iterable[Sequence[object]]) -> None:
        """Take a table back from :meth:`state`."""
        self.table = {_key(key): (float(total), float(weight)) for key, total, weight in state}  # type: ignore[arg-type]


def _key(value: object) -> Hashable:
    return tuple(_key(item) for item in value) if isinstance(value, list) else value  # type: ignore[return-value]


def returns(rewards: Sequence[float], discount: float) -> list[float]:
    """Discounted reward-to-go of each action; ``discount`` 0 is the paper's myopic credit: the action's own reward.

    With a discount the baseline has to be that of the return: single rewards that are each normalised and then summed
    give a biased gradient when the policy decides when to stop.
    """
    found, following = [], 0.0
    for reward in reversed(rewards):
        following = reward + discount * following
        found.append(following)
    return found[::-1]


def bonus_factors(rewards: Sequence[int], flip: float = 1.0, verify_correct: float = 1.0) -> list[float]:
    """Factors on the advantages of ``s v s v …``. Both are 1 in the paper and 2 in the authors' code.

    Args:
        rewards: Rewards of each action, attempts at even places.
        flip: For a retry whose correctness differs from that of the attempt before.
        verify_correct: For the verification of a right attempt. Without it, always saying "incorrect" is a good
            policy as long as most attempts are wrong.
    """
    factors = [1.0] * len(rewards)
    for place in range(2, len(rewards), 2):
        if rewards[place] != rewards[place - 2]:
            factors[place] = flip
    for place in range(1, len(rewards), 2):
        if rewards[place - 1] > 0:
            factors[place] = verify_correct
    return factors


def unit_sums(values: Tensor, units: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Sum per-token values over units.

    Args:
        values: ``[B, T]``.
        units: ``[B, T]`` int64, the unit of each token, −1 for tokens of none.
        count: Units per response, at most.

    Returns:
        Sums ``[B, count]`` and token counts ``[B, count]``.
    """
    place = units.clamp_min(0)
    inside = (units >= 0).to(values.dtype)
    zeros = values.new_zeros(values.shape[0], count)
    return zeros.scatter_add(1, place, values * inside), zeros.scatter_add(1, place, inside)


def clipped_loss(
    logp: Tensor, old_logp: Tensor, units: Tensor, advantages: Tensor, clip: float, ratio: RatioMode = "mean"
) -> tuple[Tensor, Tensor]:
    """``−mean over units of min(ρ A, clip(ρ, 1−ε, 1+ε) A)`` for each response (Eq. 3 and 6).

    Args:
        logp: ``[B, T]`` log-probabilities of the response tokens under the policy, with gradient.
        old_logp: ``[B, T]`` under the policy that sampled.
        units: ``[B, T]`` int64, unit of each token, −1 outside.
        advantages: ``[B, U]``; units without tokens count for nothing.
        clip: ε.
        ratio: ``mean``: ``exp`` of the mean log-ratio of the unit's tokens (the authors' code); ``sum``: the plain
            product of the paper's formula; ``token``: a ratio for each token, averaged over the unit.

    Returns:
        Losses ``[B]``, and the share of units (tokens for ``token``) whose ratio is outside the clip range.
    """
    count = advantages.shape[1]
    difference = logp - old_logp
    sums, sizes = unit_sums(difference, units, count)
    present = sizes > 0
    if ratio == "token":
        per_token = advantages.gather(1, units.clamp_min(0))
        rho = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        gains, _ = unit_sums(_surrogate(rho, per_token, clip), units, count)
        gains = gains / sizes.clamp_min(1)
        counted = units >= 0
    else:
        logs = sums / sizes.clamp_min(1) if ratio == "mean" else sums
        rho = logs.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
        gains = _surrogate(rho, advantages, clip)
        counted = present
    mean = (gains * present).sum(1) / present.sum(1).clamp_min(1)
    # no boolean index: how many it finds is a question that waits for the device
    outside = (((rho - 1).abs() > clip) & counted).sum() / counted.sum().clamp_min(1)
    return -mean, outside


def _surrogate(rho: Tensor, advantages: Tensor, clip: float) -> Tensor:
    return torch.minimum(rho * advantages, rho.clamp(1 - clip, 1 + clip) * advantages)


def token_logp(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each id ``[B, T]`` under logits ``[B, T, V]``, those that predict it; in float32."""
    if logits.is_cuda:
        return piecewise_logp(logits.flatten(0, 1), ids.flatten(), temperature).view_as(ids)
    scaled = logits.float() / temperature
    return scaled.gather(-1, ids[..., None])[..., 0] - scaled.logsumexp(-1)


class _PiecewiseLogp(torch.autograd.Function):
    """See :func:`piecewise_logp`."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
        found = torch.empty(len(ids), dtype=torch.float32, device=logits.device)
        norm = torch.empty_like(found)
        for begin in range(0, len(ids), PIECE):
            part = slice(begin, begin + PIECE)
            scaled = logits[part].float() / temperature
            norm[part] = scaled.logsumexp(-1)
            found[part] = scaled.gather(-1, ids[part, None])[:, 0] - norm[part]
        ctx.save_for_backward(logits, ids, norm)
        ctx.temperature = temperature
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        logits, ids, norm = ctx.saved_tensors
        found = torch.empty_like(logits)
        for begin in range(0, len(ids), PIECE):
            part = slice(begin, begin + PIECE)
            outer = (gradients[0][part] / ctx.temperature)[:, None]
            share = (logits[part].float() / ctx.temperature - norm[part, None]).exp_().mul_(-outer)
            found[part] = share.scatter_add_(1, ids[part, None], outer)
        return found, None, None


def piecewise_logp(logits: Tensor, ids: Tensor, temperature: float) -> Tensor:
    """:func:`token_logp` of rows, ``[N, V]`` and ``[N]`` → ``[N]``, a few rows at a time.

    The plain form and its gradient hold four copies of the logits in float32; of a vocabulary of 49,152 that is 10 GB
    for 12,000 tokens. This one holds the logits, their gradient, both in their own type, and a piece.
    """
    found: Tensor = _PiecewiseLogp.apply(logits, ids, temperature)
    return found


def full_kl(logits: Tensor, reference: Tensor) -> Tensor:
    """``KL(π ‖ π_ref)`` over the whole vocabulary for each position, ``[..., V]`` → ``[...]``, in nats and float32."""
    p, q = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def keep_problem(right: int, samples: int, low: float, high: float) -> bool:
    """Prompt filter: accuracy within ``[low, high]``, both included (section 2.4)."""
    # an accuracy of 1 in 10 must equal 0.1 whatever the last bit says
    return low - 1e-9 <= right / samples <= high + 1e-9


def confirmed_end(rewards: Sequence[int]) -> int | None:
    """Actions up to and with the first right attempt that its verification accepts, None if there is none."""
    for place in range(0, len(rewards) - 1, 2):
        if rewards[place] > 0 and rewards[place + 1] > 0:
            return place + 2
    return None


def balanced(right: Sequence[bool]) -> list[int]:
    """Of one problem's responses keep at most as many never-right ones as right ones, the first of each; indices."""
    limit, kept, wrong = sum(right), [], 0
    for index, good in enumerate(right):
        if good or wrong < limit:
            kept.append(index)
            wrong += not good
    return kept
