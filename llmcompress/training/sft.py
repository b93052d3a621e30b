"""Behaviour initialisation (S2R section 2.2): masked cross-entropy, KL to the model it started from, first-attempt
anchor.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llmcompress.algorithms.rl_objectives import full_kl, token_logp
from llmcompress.algorithms.self_verify import ActionKind, cut, sft_mask, verdict_tokens
from llmcompress.data.actions import RETRY
from llmcompress.data.trajectories import Trajectory, first_attempt
from llmcompress.evaluation.self_correction import Reader
from llmcompress.training.optimizer import Trainer, due
from llmcompress.training.parallel import deal
from llmcompress.training.policy import Policy
from llmcompress.training.rows import flags, pad_rows

# what a step is told of: cross-entropy of all targets and of verdicts, and the two divergences where they are asked for
_SUMS = ("cross_entropy", "verdict", "kl", "anchor")


@dataclass(frozen=True, slots=True)
class SftRow:
    """One training text as tokens.

    Attributes:
        prompt, response: Token ids; the response holds its end token.
        trained: For each response token, whether it is a target.
        first: For each response token, whether it belongs to the first attempt.
        verdict: For each response token, whether it is a target that gives a verdict.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    trained: tuple[bool, ...]
    first: tuple[bool, ...]
    verdict: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class SftSettings:
    """Settings of the loop; see the recipe section of ``s2r_init`` for what they mean."""

    epochs: int
    batch: int
    lr: float
    kl: float
    anchor: float
    warmup: int
    decay: str
    max_norm: float | None
    micro_batch: int
    micro_tokens: int | None
    save_every: int | None
    seed: int
    verdict_weight: float = 1.0


def to_row(trajectory: Trajectory, reader: Reader, max_length: int, train_markers: bool = True) -> SftRow | None:
    """Tokenize a training text and set its mask; None when it is longer than ``max_length`` tokens.

    The text is tokenized as a whole and then cut like a sampled response, so training sees the tokens that sampling
    produces.
    """
    prompt = reader.prompt(trajectory.question)
    text = trajectory.response
    # where a retry is to follow, the marker has the tokens that it has in front of an attempt
    ids = reader.tokens(text, first_attempt(text) if text.endswith(RETRY) and not trajectory.ends else "")
    pieces = reader.pieces(ids)
    response = cut(pieces, trajectory.ends)
    ids += [reader.end] * trajectory.ends
    if len(prompt) + len(ids) > max_length or not ids:
        return None
    first = [False] * len(ids)
    first[: response.actions[0].stop] = [True] * response.actions[0].stop
    if trajectory.kind == "pair":
        # the attempt is given; its verification and the marker behind it are learned
        mask = [False] * len(ids)
        for action in response.actions[1:]:
            end = action.stop if action.kind is ActionKind.VERIFY else action.start + action.marker
            mask[action.start : end] = [True] * (end - action.start)
    elif trajectory.kind == "verification":
        # when to verify is not for this row to teach, nor what follows
        mask = [False] * len(ids)
        for action in response.actions[1:]:
            mask[action.start + action.marker : action.stop] = [True] * (action.stop - action.start - action.marker)
    elif trajectory.kind == "solution":
        mask = [True] * len(ids)
    else:
        mask = sft_mask(response, train_markers, right=trajectory.kind != "given up")
    verdict = [target and says for target, says in zip(mask, verdict_tokens(pieces, response))]
    return SftRow(tuple(prompt), tuple(ids), tuple(mask), tuple(first), tuple(verdict))


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of a batch: targets, those of verdicts among them, those of first attempts."""

    trained: int
    verdict: int
    first: int

    @classmethod
    def of(cls, rows: Sequence[SftRow]) -> Counts:
        """Count the tokens of some rows."""
        return cls(*(sum(sum(getattr(row, kind)) for row in rows) for kind in ("trained", "verdict", "first")))


def order(count: int, epoch: int, seed: int) -> list[int]:
    """Order of the rows in an epoch; a function of seed and epoch alone."""
    rows = list(range(count))
    random.Random(f"{seed}:order:{epoch}").shuffle(rows)
    return rows


def sft_loss(
    policy: Policy, rows: Sequence[SftRow], pad: int, settings: SftSettings, counts: Counts
) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss of part of a batch, so that the parts of a batch add up to it.

    Args:
        policy: The model and its reference.
        rows: Part of the batch.
        pad: Id for padding.
        settings: ``kl`` is λ of ``KL(π ‖ π_base)`` on the trained tokens (appendix D.2). ``anchor`` is the weight of
            the same KL on the tokens of the first attempt: those are no targets where the attempt is wrong, so that
            nothing else holds the first attempt in place. ``verdict_weight`` is that of a verdict's word in the
            cross-entropy, where other targets have 1. The last two are ours, 0 and 1 in the paper.
        counts: Counts of the whole batch.

    Returns:
        The loss, and the sums behind it, on the device.
    """
    device = next(iter(policy.trainable.values())).device
    padded = pad_rows([row.prompt for row in rows], [row.response for row in rows], pad, device)
    width = padded.targets.shape[1]
    trained = flags([row.trained for row in rows], width, device).float()
    verdict = flags([row.verdict for row in rows], width, device).float()
    logits = padded.select(policy.logits(padded.ids, padded.mask))
    entropy = -(token_logp(logits, padded.targets) * trained)
    more = settings.verdict_weight - 1
    loss = (entropy + more * entropy * verdict).sum() / max(1.0, counts.trained + more * counts.verdict)
    figures = {"cross_entropy": entropy.detach().sum(), "verdict": (entropy.detach() * verdict).sum()}
    kl, anchor = settings.kl, settings.anchor
    if kl > 0 or anchor > 0:
        # the anchor alone needs the reference up to the longest first attempt, and nothing later changes that
        width = width if kl > 0 else max(1, *(sum(row.first) for row in rows))
        near = slice(0, max(len(row.prompt) - 1 + min(width, len(row.response)) for row in rows))
        reference = policy.reference_logits(padded.ids[:, near], padded.mask[:, near])
        reference = padded.select(reference, width)
        divergence = full_kl(logits[:, :width], reference)
        if kl > 0:
            loss = loss + kl * (divergence * trained).sum() / max(1, counts.trained)
            figures["kl"] = (divergence.detach() * trained).sum()
        if anchor > 0:
            first = flags([row.first[:width] for row in rows], width, device).float()
            loss = loss + anchor * (divergence * first).sum() / max(1, counts.first)
            figures["anchor"] = (divergence.detach() * first).sum()
    return loss, figures


def train_sft(
    policy: Policy, rows: Sequence[SftRow], pad: int, settings: SftSettings, checkpoint: Path,
    on_step: Callable[[int, int, dict[str, float]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Train for whole epochs, all processes of the policy together; continue from ``checkpoint`` if it exists.

    Args:
        policy: Trained in place.
        rows: The training set.
        pad: Id for padding.
        settings: How to train.
        checkpoint: File for progress.
        on_step: Called after each step with step, total and figures.

    Returns:
        One record a step: cross-entropy of all targets and of the verdicts, KL, anchor, gradient norm.
    """
    per_epoch = math.ceil(len(rows) / settings.batch)
    steps = per_epoch * settings.epochs
    trainer = Trainer(
        policy.trainable, settings.lr, settings.warmup, steps, settings.decay, settings.max_norm, world=policy.world
    )  # fmt: skip
    curve: list[dict[str, Any]] = (trainer.restore(checkpoint) or {}).get("curve", [])
    for step in range(trainer.step, steps):
        epoch, place = divmod(step, per_epoch)
        picked = order(len(rows), epoch, settings.seed)[place * settings.batch : (place + 1) * settings.batch]
        batch = [rows[index] for index in picked]
        counts = Counts.of(batch)

        def backward(places: list[int], batch: Sequence[SftRow] = batch, counts: Counts = counts) -> dict[str, Tensor]:
            loss, figures = sft_loss(policy, [batch[place] for place in places], pad, settings, counts)
            loss.backward()
            return figures

        lengths = [len(row.prompt) + len(row.response) for row in batch]
        dealt = deal(policy.world, lengths, settings.micro_batch, settings.micro_tokens)
        found = dealt.sum_gradients(policy.trainable, backward)
        norm = trainer.update()
        sums = {key: sum(figures[key] for figures in found if key in figures) for key in _SUMS}
        record = {
            "step": step + 1,
            "cross_entropy": sums["cross_entropy"] / max(1, counts.trained),
            "verdict": sums["verdict"] / max(1, counts.verdict),
            "kl": sums["kl"] / max(1, counts.trained),
            "anchor": sums["anchor"] / max(1, counts.first),
            "grad_norm": norm,
        }
        curve.append(record)
        on_step(step + 1, steps, {key: value for key, value in record.items() if key != "step"})
        if due(step + 1, settings.save_every, step + 1 == steps):
            trainer.save(checkpoint, {"curve": curve})
    return curve
