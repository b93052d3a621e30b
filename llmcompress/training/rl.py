"""The reinforcement loop of S2R: one code path for outcome and process level, online and offline.

A step is: responses → actions and rewards → advantages (baseline and KL) → clipped updates. Online samples the
responses from the policy at that step; offline draws them from a pool sampled once from the reference, which is then
also ``π_old``.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from llmcompress.algorithms import rl_objectives as rl
from llmcompress.algorithms.self_verify import (
    Episode,
    Response,
    action_rewards,
    behaviour,
    judge,
    outcome_reward,
    repeats,
)
from llmcompress.data.problems.base import Problem
from llmcompress.errors import EnvironmentProblem
from llmcompress.evaluation.sampling import Sampling
from llmcompress.evaluation.self_correction import Reader, verdicts
from llmcompress.training.optimizer import Schedule, Trainer, due
from llmcompress.training.parallel import deal
from llmcompress.training.policy import Policy
from llmcompress.training.rows import flags, pad_rows

Level = Literal["outcome", "process"]
Credit = Literal["response", "action"]


@dataclass(frozen=True, slots=True)
class RlSettings:
    """Settings of the loop; see the recipe section of ``s2r_rl`` for what they mean."""

    level: Level
    steps: int
    prompts: int
    samples: int
    updates: int
    lr: float
    warmup: int
    max_norm: float | None
    kl: float
    kl_mean: bool
    clip: float
    ratio: rl.RatioMode
    sampling: Sampling
    truncation_reward: int | None
    flip_bonus: float
    verify_correct_bonus: float
    discount: float
    train_end: bool
    skip_agreeing: bool
    micro_batch: int
    micro_tokens: int | None
    save_every: int | None
    seed: int
    anchor: float = 0.0
    repeat_penalty: float = 0.0
    weigh_by_length: bool = False
    decay: str = "constant"
    credit: Credit = "response"
    average: float = 0.0
    weight_decay: float = 0.0

    def schedule(self, steps: int) -> Schedule:
        """Learning rate over this many optimizer steps."""
        return Schedule(self.lr, self.warmup, steps, self.decay)

    @property
    def units(self) -> Level:
        """What has an advantage of its own: the response, or each of its actions."""
        return "process" if self.credit == "action" else self.level


@dataclass(slots=True)
class Rollout:
    """One sampled response and what it is worth.

    Attributes:
        problem: Index of its problem.
        prompt, ids: Tokens.
        response: Its actions.
        episode: Judged.
        rewards: Rewards of each action.
        outcome: Outcome of the whole.
        advantages: Advantages of each unit, before KL.
        repeated: Whether each action is a retry with an answer that was given before.
        weight: 0 takes it out of the loss.
        told: Log-probability of each token as another engine that wrote it says, for comparison alone.
    """

    problem: int
    prompt: list[int]
    ids: list[int]
    response: Response
    episode: Episode
    rewards: list[int]
    outcome: int
    advantages: list[float]
    repeated: list[bool]
    weight: float = 1.0
    told: Tensor | None = None


Keys = Callable[[Rollout], list[Hashable]]


def collect(
    policy: Policy, reader: Reader, problems: Sequence[Problem], indices: Sequence[int], settings: RlSettings, seed: int
) -> list[Rollout]:
    """Sample and judge responses, ``samples`` for each problem, in the problems' order."""
    once = [reader.prompt(problems[i].question) for i in indices]
    prompts = [prompt for prompt in once for _ in range(settings.samples)]
    with policy.responding() as write:
        ids = write(prompts, settings.sampling, reader.end, reader.pad, seed, policy.world)
    places = [index for index in indices for _ in range(settings.samples)]
    known = verdicts(policy.world, reader, [problems[index] for index in places], ids)
    found = [
        judged(reader, problems[index], index, prompt, new, settings.truncation_reward, right)
        for index, prompt, new, right in zip(places, prompts, ids, known)
    ]
    if policy.sampler is not None:
        for rollout, told in zip(found, policy.sampler.told, strict=True):
            rollout.told = told
    return found


def judged(
    reader: Reader, problem: Problem, index: int, prompt: list[int], ids: list[int], truncation_reward: int | None,
    right: list[bool] | None = None,
) -> Rollout:  # fmt: skip
    """Cut a response and compute its rewards; ``right`` tells of each attempt where that is known already."""
    response = reader.read(ids)
    if right is None:
        right = reader.right(problem, response)
    rewards = action_rewards(response, right, truncation_reward)
    outcome = outcome_reward(response, right, truncation_reward)
    answers = reader.answers(response)
    episode = judge(response, right, len(ids), answers)
    return Rollout(index, prompt, ids, response, episode, rewards, outcome, [], repeats(response, answers))


def penalised(rollout: Rollout, repeat_penalty: float) -> float:
    """Outcome less ``repeat_penalty`` times the share of the retries that repeat an answer."""
    retries = len(rollout.episode.right) - 1
    return rollout.outcome - (repeat_penalty * sum(rollout.repeated) / retries if retries else 0.0)


def outcome_advantages(
    rollouts: Sequence[Rollout], samples: int, skip_agreeing: bool, repeat_penalty: float = 0.0
) -> None:
    """RLOO over the samples of each problem; groups that agree get weight 0.

    Args:
        rollouts: In the order of the problems.
        samples: Samples of each problem.
        skip_agreeing: Give no weight where the advantage is 0.
        repeat_penalty: See :func:`penalised`.
    """
    rewards = torch.tensor([penalised(rollout, repeat_penalty) for rollout in rollouts]).view(-1, samples)
    values = rl.leave_one_out(rewards).flatten().tolist()
    for rollout, value in zip(rollouts, values):
        rollout.advantages = [value]
        rollout.weight = 0.0 if skip_agreeing and value == 0 else 1.0


def action_advantages(
    rollouts: Sequence[Rollout], samples: int, skip_agreeing: bool, repeat_penalty: float = 0.0
) -> None:
    """The outcome as the reward of every action, less what was to be expected before that action. Ours.

    Before the first attempt that is the mean outcome of the problem's other samples, as in RLOO; before a later action
    the mean outcome of all responses with its reward context, as at process level
    (:func:`~llmcompress.algorithms.rl_objectives.context_values`). RLOO credits the attempt that was known to be wrong
    with the success of the one after it. What is expected hardly depends on the action itself (a response is one of all
    that came through its contexts), so that the expected gradient is nearly that of the outcome.

    Args:
        rollouts: In the order of the problems.
        samples: Samples of each problem.
        skip_agreeing: Give no weight to problems whose samples all agree.
        repeat_penalty: Taken off the advantage of a retry with an answer that was given before.
    """
    outcomes = [float(rollout.outcome) for rollout in rollouts]
    prefixes = [rl.contexts(rollout.rewards) for rollout in rollouts]
    expected = rl.context_values(prefixes, outcomes)
    of_others = rl.leave_one_out(torch.tensor(outcomes).view(-1, samples)).flatten().tolist()
    for rollout, outcome, passed, first in zip(rollouts, outcomes, prefixes, of_others):
        gained = [first, *(outcome - expected[context] for context in passed[1:])]
        rollout.advantages = [value - repeat_penalty * again for value, again in zip(gained, rollout.repeated)]
        rollout.weight = 0.0 if skip_agreeing and first == 0 else 1.0


def process_advantages(
    rollouts: Sequence[Rollout], baseline: rl.GroupBaseline, keys: Keys, settings: RlSettings
) -> None:
    """Group baselines over the pool of all problems, then the optional bonuses.

    A last action that was cut off gets no baseline (the authors' code): its reward is a penalty, not a member of the
    group.
    """
    pool: list[tuple[Rollout, int, Hashable, float]] = []
    for rollout in rollouts:
        values = rl.returns(rollout.rewards, settings.discount)
        rollout.advantages = list(values)
        cut_off = not rollout.response.ended and settings.truncation_reward is not None
        for place, (key, value) in enumerate(zip(keys(rollout), values)):
            if not (cut_off and place == len(values) - 1):
                pool.append((rollout, place, key, value))
    means = baseline.values([key for _, _, key, _ in pool], [value for _, _, _, value in pool])
    for (rollout, place, _, value), mean in zip(pool, means):
        rollout.advantages[place] = value - mean
    for rollout in rollouts:
        factors = rl.bonus_factors(rollout.rewards, settings.flip_bonus, settings.verify_correct_bonus)
        rollout.advantages = [a * f for a, f in zip(rollout.advantages, factors)]
        if settings.repeat_penalty:
            lost = [settings.repeat_penalty * again for again in rollout.repeated]
            rollout.advantages = [a - less for a, less in zip(rollout.advantages, lost)]


def weigh_by_length(rollouts: Sequence[Rollout], level: Level) -> None:
    """Weigh responses by their actions (outcome level: tokens), 1 on average, so that each counts the same everywhere.

    The losses of Eq. 3 and 6 are means over a response: an action of a response of seven attempts has a seventh of the
    weight of one in a response of a single attempt. Ours.
    """
    sizes = [len(r.ids) if level == "outcome" else len(r.rewards) for r in rollouts]
    mean = sum(sizes) / len(sizes)
    for rollout, size in zip(rollouts, sizes):
        rollout.weight *= size / mean


def context_keys(rollout: Rollout) -> list[Hashable]:
    """Group by reward context (online)."""
    return [("context", *context) for context in rl.contexts(rollout.rewards)]


def token_units(rollout: Rollout, level: Level, train_end: bool) -> list[int]:
    """Unit of each token: its action at process level, 0 at outcome level; −1 for an end token that is not trained."""
    units = [0] * len(rollout.ids)
    if level == "process":
        for index, action in enumerate(rollout.response.actions):
            units[action.start : action.stop] = [index] * (action.stop - action.start)
    if rollout.response.ended and not train_end:
        units[-1] = -1
    return units


@dataclass(frozen=True, slots=True)
class Scored:
    """Rollouts as tensors on the CPU: what the updates need.

    Attributes:
        rollouts: Responses.
        old: Log-probabilities of their tokens under the policy that is trained, as it sampled.
        reference: The same under the reference.
        gap: Mean distance of ``old`` from what another engine that wrote the responses says, in nats a token; None
            where there is none.
    """

    rollouts: Sequence[Rollout]
    old: list[Tensor]
    reference: list[Tensor]
    gap: float | None = None


def taught(rollouts: Sequence[Rollout], settings: RlSettings) -> list[int]:
    """Places of the rollouts that a gradient comes from: those of weight 0 would cost a forward and backward pass and
    add nothing, unless an anchor holds their first attempts. One at least, so that every update has a gradient.
    """
    found = [place for place, rollout in enumerate(rollouts) if rollout.weight != 0 or settings.anchor > 0]
    return found or [0]


@torch.no_grad()
def score(policy: Policy, reader: Reader, rollouts: Sequence[Rollout], settings: RlSettings, same: bool) -> Scored:
    """Log-probabilities of every response token under the sampling policy and the reference; zeros for responses that
    teach nothing (:func:`taught`).

    At the sampling temperature, because that is the distribution the tokens came from.

    Args:
        policy: As it sampled.
        reader: For the padding id.
        rollouts: Responses.
        settings: Temperature, batch.
        same: The policy still is the reference (offline): one pass is enough.

    Raises:
        EnvironmentProblem: Another engine wrote the responses, and not with this policy's weights.
    """
    old: list[Tensor] = []
    reference: list[Tensor] = []
    temperature = settings.sampling.temperature or 1.0
    device = next(iter(policy.trainable.values())).device
    wanted = taught(rollouts, settings)
    lengths = [len(rollouts[place].prompt) + len(rollouts[place].ids) for place in wanted]
    # twice as many tokens fit where no activations are kept for a backward pass
    limit = None if settings.micro_tokens is None else 2 * settings.micro_tokens
    dealt = deal(policy.world, lengths, settings.micro_batch, limit)
    for number in dealt.of_rank(policy.world.rank):
        part = [rollouts[wanted[place]] for place in dealt.parts[number]]
        padded = pad_rows([r.prompt for r in part], [r.ids for r in part], reader.pad, device)
        own = rl.token_logp(padded.select(policy.logits(padded.ids, padded.mask)), padded.targets, temperature)
        base = own
        if not same:
            logits = policy.reference_logits(padded.ids, padded.mask)
            base = rl.token_logp(padded.select(logits), padded.targets, temperature)
        # one transfer for the part
        own, base = own.cpu(), base.cpu()
        old += [row[: len(rollout.ids)] for row, rollout in zip(own, part)]
        reference += [row[: len(rollout.ids)] for row, rollout in zip(base, part)]
    sizes = [len(rollouts[place].ids) for place in wanted]
    found = [[torch.zeros(len(rollout.ids)) for rollout in rollouts] for _ in range(2)]
    for values, computed in zip(found, (old, reference)):
        for place, row in zip(wanted, dealt.exchange(computed, sizes)):
            values[place] = row
    old, reference = found
    return Scored(rollouts, old, reference, sampler_gap(rollouts, old, wanted, settings.clip))


def sampler_gap(
    rollouts: Sequence[Rollout], own: Sequence[Tensor], places: Sequence[int], limit: float
) -> float | None:
    """How far the log-probabilities that another engine tells are from our own, in nats a token.

    Kernels and 16-bit types make hundredths of a nat. More than ε, the distance at which the surrogate takes a policy
    for another one, is no rounding: other weights, another temperature, or weights that were lost on the way.

    Args:
        rollouts: Responses.
        own: Our log-probabilities of their tokens.
        places: Which were computed.
        limit: ε.

    Raises:
        EnvironmentProblem: The mean is above ``limit``.
    """
    apart = [(told - own[place]).abs() for place in places if (told := rollouts[place].told) is not None]
    if not apart:
        return None
    gap = float(torch.cat(apart).mean())
    # written so that NaN is refused too
    if not gap <= limit:
        raise EnvironmentProblem(
            f"the sampler does not write with the policy's weights: it is off by {gap:.3g} nats a token",
            "sampler.engine: own",
        )
    return gap


def unit_advantages(scored: Scored, index: int, settings: RlSettings) -> list[float]:
    """Advantages of a rollout's units with ``β log(π_old / π_ref)`` taken off, without gradient (Eq. 2 and 5)."""
    rollout = scored.rollouts[index]
    units = torch.tensor(token_units(rollout, settings.units, settings.train_end))[None]
    difference = (scored.old[index] - scored.reference[index])[None]
    sums, sizes = rl.unit_sums(difference, units, len(rollout.advantages))
    kl = sums / sizes.clamp_min(1) if settings.kl_mean else sums
    return (torch.tensor(rollout.advantages) - settings.kl * kl[0]).tolist()


def update(
    policy: Policy, reader: Reader, scored: Scored, picked: Sequence[int], settings: RlSettings, trainer: Trainer
) -> dict[str, float]:
    """One optimiser step on the picked rollouts; returns loss, clip share and gradient norm.

    Those of weight 0 are left out of the arithmetic and count in the mean.
    """
    count_all = len(picked)
    picked = [picked[place] for place in taught([scored.rollouts[i] for i in picked], settings)]
    temperature = settings.sampling.temperature or 1.0
    device = next(iter(policy.trainable.values())).device
    lengths = [len(scored.rollouts[i].prompt) + len(scored.rollouts[i].ids) for i in picked]

    def backward(places: list[int]) -> dict[str, Tensor]:
        part = [picked[place] for place in places]
        rows = [scored.rollouts[i] for i in part]
        padded = pad_rows([r.prompt for r in rows], [r.ids for r in rows], reader.pad, device)
        width = padded.targets.shape[1]
        units = flags([token_units(r, settings.units, settings.train_end) for r in rows], width, device, -1)
        count = max(len(r.advantages) for r in rows)
        advantages = torch.zeros(len(rows), count)
        old = torch.zeros(len(rows), width)
        for row, i in enumerate(part):
            values = unit_advantages(scored, i, settings)
            advantages[row, : len(values)] = torch.tensor(values)
            old[row, : len(scored.old[i])] = scored.old[i]
        logits = padded.select(policy.logits(padded.ids, padded.mask))
        logp = rl.token_logp(logits, padded.targets, temperature)
        each, share = rl.clipped_loss(
            logp, old.to(device), units, advantages.to(device), settings.clip, settings.ratio
        )  # fmt: skip
        weights = torch.tensor([r.weight for r in rows], device=device)
        loss = (each * weights).sum() / count_all
        if settings.anchor > 0:
            loss = loss + settings.anchor * _anchor(policy, padded, logits, rows) / count_all
        loss.backward()
        return {"loss": loss.detach(), "clipped": share.detach()}

    dealt = deal(policy.world, lengths, settings.micro_batch, settings.micro_tokens)
    found = dealt.sum_gradients(policy.trainable, backward)
    norm = trainer.update()
    clipped = sum(part["clipped"] for part in found) / max(1, len(found))
    return {"loss": sum(part["loss"] for part in found), "clipped": clipped, "grad_norm": norm}


def _anchor(policy: Policy, padded: Any, logits: Tensor, rows: Sequence[Rollout]) -> Tensor:
    """Mean over the first attempt's tokens of ``KL(π ‖ π_ref)``, summed over rows. Ours; holds the first attempt in
    place.
    """
    reference = padded.select(policy.reference_logits(padded.ids, padded.mask))
    width = padded.targets.shape[1]
    first = flags([[1] * r.response.actions[0].stop for r in rows], width, logits.device).float()
    return ((rl.full_kl(logits, reference) * first).sum(1) / first.sum(1).clamp_min(1)).sum()


def curve_record(
    step: int, scored: Scored, figures: Sequence[dict[str, float]], settings: RlSettings
) -> dict[str, Any]:
    """What the learning curve holds of a step: behaviour of the sampled responses, KL, loss."""
    rollouts = scored.rollouts
    seen = behaviour([r.episode for r in rollouts])
    kls = [float((scored.old[place] - scored.reference[place]).sum()) for place in taught(rollouts, settings)]
    shown = (
        "accuracy", "first_accuracy", "verification_accuracy", "error_recall", "correct_recall", "trials", "tokens",
        "ended", "well_formed", "repeated_retries",
    )  # fmt: skip
    return {
        "step": step,
        **{name: seen[name] for name in shown},
        "reward": sum(r.outcome for r in rollouts) / len(rollouts),
        "kl": sum(kls) / len(kls),
        "agreeing": sum(r.weight == 0 for r in rollouts) / len(rollouts),
        **{key: sum(f[key] for f in figures) / len(figures) for key in figures[0]},
        **({} if scored.gap is None else {"sampler_gap": scored.gap}),
    }


@dataclass(frozen=True, slots=True)
class Guard:
    """When to stop early: process-level training can drift into retrying for ever. None for no limit."""

    ended_below: float | None = None
    trials_above: float | None = None
    seconds: float | None = None

    def reason(self, record: dict[str, Any], following: float = 0.0) -> str | None:
        """Why to stop after this step, None to go on; the following one would end ``following`` seconds after the
        beginning.
        """
        if self.seconds is not None and following > self.seconds:
            return f"another step would end after {following:.0f} s (guard.seconds {self.seconds:g})"
        if self.ended_below is not None and record["ended"] < self.ended_below:
            return f"only {record['ended']:.0%} of the responses ended (guard.ended_below {self.ended_below:.0%})"
        if self.trials_above is not None and record["trials"] > self.trials_above:
            return f"{record['trials']:.2f} trials a response (guard.trials_above {self.trials_above})"
        return None


def prompts_of_step(count: int, wanted: int, step: int, seed: int) -> list[int]:
    """Problems of a step: epochs in an order that depends on seed and epoch alone; an epoch's last problems may begin
    the next.
    """
    found: list[int] = []
    begin = step * wanted
    while len(found) < min(wanted, count):
        epoch, place = divmod(begin + len(found), count)
        rows = list(range(count))
        random.Random(f"{seed}:prompts:{epoch}").shuffle(rows)
        found += rows[place : place + min(wanted, count) - len(found)]
    return found


def train_online(
    policy: Policy, reader: Reader, problems: Sequence[Problem], settings: RlSettings, baseline: rl.GroupBaseline,
    guard: Guard, checkpoint: Path, on_step: Callable[[dict[str, Any]], None],
) -> tuple[list[dict[str, Any]], str | None]:  # fmt: skip
    """Sample, score, update, all processes of the policy together; continue from ``checkpoint`` if it exists.

    Returns:
        The curve, and why training stopped early if it did.
    """
    trainer = Trainer(
        policy.trainable, settings.schedule(settings.steps * settings.updates), settings.max_norm, policy.world,
        tail=settings.average, weight_decay=settings.weight_decay,
    )  # fmt: skip
    progress = trainer.restore(checkpoint) or {}
    curve: list[dict[str, Any]] = progress.get("curve", [])
    stopped: str | None = progress.get("stopped")
    baseline.restore(progress.get("baseline", []))
    begun = time.monotonic()
    for step in range(len(curve), settings.steps):
        if stopped is not None:
            break
        before = time.monotonic() - begun
        trainer.spent = 0.0 if guard.seconds is None else before / guard.seconds
        indices = prompts_of_step(len(problems), settings.prompts, step, settings.seed)
        rollouts = collect(policy, reader, problems, indices, settings, settings.seed * 65_537 + step)
        if settings.level == "outcome":
            give = action_advantages if settings.credit == "action" else outcome_advantages
            give(rollouts, settings.samples, settings.skip_agreeing, settings.repeat_penalty)
        else:
            process_advantages(rollouts, baseline, context_keys, settings)
        if settings.weigh_by_length:
            weigh_by_length(rollouts, settings.units)
        scored = score(policy, reader, rollouts, settings, same=False)
        rows = list(range(len(rollouts)))
        random.Random(f"{settings.seed}:updates:{step}").shuffle(rows)
        size = -(-len(rows) // settings.updates)
        figures = [
            update(policy, reader, scored, rows[begin : begin + size], settings, trainer)
            for begin in range(0, len(rows), size)
        ]
        record = curve_record(step + 1, scored, figures, settings)
        curve.append(record)
        after = time.monotonic() - begun
        # one clock decides for all
        stopped = policy.world.tell(guard.reason(record, 2 * after - before))
        on_step(record)
        if due(step + 1, settings.save_every, step + 1 == settings.steps or stopped is not None):
            trainer.save(checkpoint, {"curve": curve, "baseline": baseline.state(), "stopped": stopped})
    trainer.finish()
    return curve, stopped
