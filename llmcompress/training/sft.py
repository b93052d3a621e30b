"""Behaviour initialisation (S2R section 2.2): masked cross-entropy, KL to the model it started from, first-attempt
anchor.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmcompress.algorithms.rl_objectives import full_kl, token_logp
from llmcompress.algorithms.self_verify import ActionKind, cut, sft_mask, verdict_tokens
from llmcompress.data.actions import RETRY
from llmcompress.data.trajectories import Trajectory, first_attempt
from llmcompress.errors import InputError
from llmcompress.evaluation.self_correction import Reader
from llmcompress.training.optimizer import Schedule, Trainer, due
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
    weight_decay: float = 0.0
    validate_every: int | None = None
    patience: int | None = None

    def schedule(self, steps: int) -> Schedule:
        """Learning rate over this many optimizer steps."""
        return Schedule(self.lr, self.warmup, steps, self.decay)


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


@torch.no_grad()
def held_out_loss(policy: Policy, rows: Sequence[SftRow], pad: int, settings: SftSettings) -> dict[str, float]:
    """Cross-entropy in nats a token of rows that are not trained, all processes together: ``validation`` of all
    targets, each with weight 1, and ``validation_verdict`` of the verdicts among them.

    Args:
        policy: As it is now.
        rows: Not among the training set's.
        pad: Id for padding.
        settings: How many rows and tokens at once.

    Raises:
        InputError: It is not finite: none is smaller than such a one, nor larger.
    """
    counts = Counts.of(rows)
    # twice as many tokens fit where no activations are kept for a backward pass
    limit = None if settings.micro_tokens is None else 2 * settings.micro_tokens
    dealt = deal(policy.world, [len(row.prompt) + len(row.response) for row in rows], settings.micro_batch, limit)
    plain = replace(settings, kl=0.0, anchor=0.0)
    found = dealt.figures(lambda places: sft_loss(policy, [rows[i] for i in places], pad, plain, counts)[1])
    loss = sum(part["cross_entropy"] for part in found) / max(1, counts.trained)
    if not math.isfinite(loss):
        raise InputError(
            "the held-out loss of the training is not finite (NaN or infinity)",
            "set a lower lr, or run.compute_dtype=float32",
        )
    return {
        "validation": loss,
        "validation_verdict": sum(part["verdict"] for part in found) / max(1, counts.verdict),
    }


def is_best(losses: Sequence[float]) -> bool:
    """Whether the last of the held-out losses is below all before it."""
    return min(losses[:-1], default=math.inf) > losses[-1]


def worn_out(losses: Sequence[float], patience: int | None) -> bool:
    """Whether the last ``patience`` held-out losses are no better than the best before them; None is never."""
    return patience is not None and len(losses) > patience and min(losses[:-patience]) <= min(losses[-patience:])


def train_sft(
    policy: Policy, rows: Sequence[SftRow], pad: int, settings: SftSettings, checkpoint: Path,
    on_step: Callable[[int, int, dict[str, float]], None], held_out: Sequence[SftRow] = (),
) -> list[dict[str, Any]]:  # fmt: skip
    """Train for whole epochs, all processes of the policy together; continue from ``checkpoint`` if it exists.

    With ``patience`` training ends where the held-out loss has stopped to fall, and the weights are those of the best
    one.

    Args:
        policy: Trained in place.
        rows: The training set.
        pad: Id for padding.
        settings: How to train.
        checkpoint: File for progress.
        on_step: Called after each step with step, total and figures: those of the record, and tokens a second.
        held_out: Rows for :func:`held_out_loss`, every ``validate_every`` steps (None: after each epoch) and at the
            end.

    Returns:
        One record a step: cross-entropy of all targets and of the verdicts, KL, anchor, gradient norm; held-out losses
        where they were measured. With ``patience``, ``kept`` is set in the record of the weights that were kept.
    """
    per_epoch = math.ceil(len(rows) / settings.batch)
    steps = per_epoch * settings.epochs
    trainer = Trainer(
        policy.trainable, settings.schedule(steps), settings.max_norm, policy.world,
        weight_decay=settings.weight_decay,
    )  # fmt: skip
    curve: list[dict[str, Any]] = (trainer.restore(checkpoint) or {}).get("curve", [])
    losses = [record["validation"] for record in curve if "validation" in record]
    for step in range(trainer.step, steps):
        if worn_out(losses, settings.patience):
            break
        begun = time.monotonic()
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
        speed = sum(lengths) / max(time.monotonic() - begun, 1e-9)
        if held_out and due(step + 1, settings.validate_every or per_epoch, step + 1 == steps):
            record |= held_out_loss(policy, held_out, pad, settings)
            losses.append(record["validation"])
            if settings.patience is not None and is_best(losses):
                trainer.remember()
        curve.append(record)
        # the speed is not in the record: a resumed run ends with the same curve
        told = {key: value for key, value in record.items() if key != "step"}
        on_step(step + 1, steps, {**told, "tokens_per_second": speed})
        if due(step + 1, settings.save_every, step + 1 == steps or worn_out(losses, settings.patience)):
            trainer.save(checkpoint, {"curve": curve})
    if settings.patience is not None and losses:
        trainer.recall()
        best = next(record for record in curve if record.get("validation") == min(losses))
        best["kept"] = True
    return curve
