"""Offline reinforcement (S2R section 2.4, appendix F): a pool sampled once, filtered, with accuracy-binned
baselines.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from llmcompress.algorithms import rl_objectives as rl
from llmcompress.data.problems.base import Problem
from llmcompress.distributed.world import ALONE, World
from llmcompress.evaluation.self_correction import Reader, verdicts
from llmcompress.training.optimizer import Trainer, due
from llmcompress.training.policy import Policy
from llmcompress.training.rl import (
    RlSettings,
    Rollout,
    curve_record,
    judged,
    penalised,
    process_advantages,
    score,
    update,
    weigh_by_length,
)

AfterConfirmed = Literal["truncate", "drop", "keep"]
Grouping = Literal["position", "context"]


@dataclass(frozen=True, slots=True)
class OfflineSettings:
    """Filters and baseline of the pool; see the recipe section ``offline`` for what they mean."""

    low: float
    high: float
    max_actions: int
    after_confirmed: AfterConfirmed
    balance: bool
    bins: int
    grouping: Grouping
    epochs: int


@dataclass(frozen=True, slots=True)
class Pool:
    """What is left of the sampled responses.

    Attributes:
        rollouts: Kept, with advantages still empty.
        bins: Accuracy bin of each rollout's problem.
        counts: What was dropped and why.
    """

    rollouts: list[Rollout]
    bins: list[int]
    counts: dict[str, int]


def filter_pool(
    reader: Reader, problems: Sequence[Problem], prompts: Sequence[list[int]], responses: Sequence[Sequence[list[int]]],
    settings: OfflineSettings, truncation_reward: int | None, world: World = ALONE,
) -> Pool:  # fmt: skip
    """Prompt filter and rejection sampling.

    In order: problems outside the accuracy range; responses that are not ``s v s v …`` with an end; what goes on after
    a right attempt was accepted is cut or dropped; more than ``max_actions`` actions; per problem no more never-right
    than right ones.

    Args:
        reader: Cuts and judges.
        problems: All of the pool.
        prompts: Token ids of each problem's prompt.
        responses: For each problem its sampled responses.
        settings: Filters.
        truncation_reward: See :func:`~llmcompress.algorithms.self_verify.action_rewards`.
        world: The processes that share the judging.
    """
    flat = [(problem, ids) for problem, own in zip(problems, responses) for ids in own]
    known = iter(verdicts(world, reader, [problem for problem, _ in flat], [ids for _, ids in flat]))
    counts: Counter[str] = Counter()
    rollouts: list[Rollout] = []
    bins: list[int] = []
    for index, (problem, prompt, own) in enumerate(zip(problems, prompts, responses)):
        found = [judged(reader, problem, index, prompt, ids, truncation_reward, next(known)) for ids in own]
        right = sum(r.episode.final for r in found)
        if not rl.keep_problem(right, len(found), settings.low, settings.high):
            counts["problems outside the accuracy range"] += 1
            continue
        kept = [r for r in (_accept(reader, problem, r, settings, truncation_reward, counts) for r in found) if r]
        if settings.balance:
            chosen = rl.balanced([r.episode.final for r in kept])
            counts["responses dropped for balance"] += len(kept) - len(chosen)
            kept = [kept[i] for i in chosen]
        rollouts += kept
        bins += [rl.accuracy_bin(right, len(found), settings.bins)] * len(kept)
    return Pool(rollouts, bins, dict(counts))


def _accept(
    reader: Reader, problem: Problem, rollout: Rollout, settings: OfflineSettings, truncation_reward: int | None,
    counts: Counter[str],
) -> Rollout | None:  # fmt: skip
    if not rollout.episode.well_formed:
        counts["malformed responses"] += 1
        return None
    end = rl.confirmed_end(rollout.rewards)
    if end is None or settings.after_confirmed == "keep":
        end = len(rollout.rewards)
    if end < len(rollout.rewards):
        counts["responses that went on after a right, accepted attempt"] += 1
        if settings.after_confirmed == "drop":
            return None
    if end > settings.max_actions:
        counts["responses with too many actions"] += 1
        return None
    if end == len(rollout.rewards):
        return rollout
    right = list(rollout.episode.right[: end // 2])
    return judged(
        reader, problem, rollout.problem, rollout.prompt, _until(reader, rollout, end), truncation_reward, right
    )


def _until(reader: Reader, rollout: Rollout, count: int) -> list[int]:
    r"""Ids of the first ``count`` actions and the end. A token that holds the point of the last sentence and the line
    feeds of the marker behind it (``.\n\n``) is left out with the marker, and the point put back.
    """
    last = rollout.response.actions[count - 1]
    ids = rollout.ids[: last.stop]
    written = reader.read(ids).actions[-1].text
    lost = last.text[len(written) :] if last.text.startswith(written) else ""
    return [*ids, *reader.tokenizer(lost, add_special_tokens=False)["input_ids"], reader.end]


def pool_advantages(pool: Pool, settings: RlSettings, offline: OfflineSettings, baseline: rl.GroupBaseline) -> None:
    """Baselines within bins of problem accuracy, by position or by reward context.

    At outcome level the group is the bin alone: the paper's text applies the accuracy baseline there too, the authors'
    code does not.
    """
    place = {id(rollout): bin_ for rollout, bin_ in zip(pool.rollouts, pool.bins)}

    def keys_of(rollout: Rollout) -> list[Hashable]:
        own = place[id(rollout)]
        if offline.grouping == "position":
            return [("position", own, index) for index in range(len(rollout.rewards))]
        return [("context", own, *context) for context in rl.contexts(rollout.rewards)]

    if settings.level == "outcome":
        keys: list[Hashable] = [("outcome", bin_) for bin_ in pool.bins]
        rewards = [penalised(rollout, settings.repeat_penalty) for rollout in pool.rollouts]
        for rollout, reward, mean in zip(pool.rollouts, rewards, baseline.values(keys, rewards)):
            rollout.advantages = [reward - mean]
    else:
        process_advantages(pool.rollouts, baseline, keys_of, settings)
    if settings.weigh_by_length:
        weigh_by_length(pool.rollouts, settings.level)


def train_offline(
    policy: Policy, reader: Reader, pool: Pool, settings: RlSettings, epochs: int, checkpoint: Path,
    on_step: Callable[[dict[str, Any]], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """Passes over the pool with ``π_old = π_ref``; continue from ``checkpoint`` if it exists.

    Args:
        policy: Trained in place; its reference sampled the pool.
        reader: For the padding id.
        pool: With advantages.
        settings: ``prompts`` × ``samples`` / ``updates`` responses are one optimiser step.
        epochs: Passes.
        checkpoint: File for progress.
        on_step: Receives each record.
    """
    size = max(1, settings.prompts * settings.samples // settings.updates)
    per_epoch = math.ceil(len(pool.rollouts) / size)
    trainer = Trainer(
        policy.trainable, settings.schedule(per_epoch * epochs), settings.max_norm, policy.world,
        tail=settings.average, weight_decay=settings.weight_decay,
    )  # fmt: skip
    # the reference scores the pool, before any step and after every resume
    with policy.reference():
        scored = score(policy, reader, pool.rollouts, settings, same=True)
    curve: list[dict[str, Any]] = (trainer.restore(checkpoint) or {}).get("curve", [])
    for step in range(len(curve), per_epoch * epochs):
        epoch, place = divmod(step, per_epoch)
        rows = list(range(len(pool.rollouts)))
        random.Random(f"{settings.seed}:offline:{epoch}").shuffle(rows)
        picked = rows[place * size : (place + 1) * size]
        figures = update(policy, reader, scored, picked, settings, trainer)
        part = replace(
            scored, rollouts=[scored.rollouts[i] for i in picked], old=[scored.old[i] for i in picked],
            reference=[scored.reference[i] for i in picked],
        )  # fmt: skip
        record = curve_record(step + 1, part, [figures], settings)
        curve.append(record)
        on_step(record)
        if due(step + 1, settings.save_every, step + 1 == per_epoch * epochs):
            trainer.save(checkpoint, {"curve": curve})
    trainer.finish()
    return curve
