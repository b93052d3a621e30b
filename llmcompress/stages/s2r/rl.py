"""Stage ``s2r_rl``: reinforce self-verification and self-correction, at outcome or process level, online or offline
(S2R section 2.3, 2.4).
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.section import Section
from llmcompress.stages.base import Estimate, PlanInputs, StageConfig
from llmcompress.stages.s2r.config import CHECKPOINT, SamplingConfig, TrainingConfig, estimate_training
from llmcompress.stages.s2r.training import TrainingStage, from_trl, noted, refuse_for_trl
from llmcompress.stages.s2r.work import (
    GATE_PROBLEMS,
    PROMPT_TOKENS,
    measured,
    passes,
    problem_count,
    trained,
    with_work,
)

if TYPE_CHECKING:
    from llmcompress.algorithms.rl_objectives import GroupBaseline
    from llmcompress.data.problems.base import Problem
    from llmcompress.evaluation.self_correction import Reader
    from llmcompress.stages.state import RunContext
    from llmcompress.training.offline import OfflineSettings
    from llmcompress.training.policy import Policy
    from llmcompress.training.rl import RlSettings

# more tokens than the longest prompt of a problem has, for plans
LONGEST_PROMPT = 2048


class BaselineConfig(Section):
    """Baseline of the process level and of offline training. Online outcome level always uses RLOO."""

    scope: Literal["batch", "running", "ema"] = "batch"
    """``batch``: the group is the pool at hand, as in the paper. ``running``: mean over the run so far, as in the
    authors' code. ``ema``: the same, forgetting. Offline there is one pool, and ``batch`` alone."""

    min_group: Annotated[int, Field(ge=1)] = 10
    """Smaller groups get baseline 0 (the authors' code)."""

    decay: Annotated[float, Field(gt=0, le=1)] = 0.95
    """What ``ema`` keeps of its table at each batch."""

    softmax: Annotated[float, Field(gt=0)] | None = None
    """τ of ``τ log mean exp(r/τ)`` instead of the mean; an option of the authors' offline code."""


class OfflineConfig(Section):
    """Training on a pool sampled once."""

    min_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.1
    """Prompts with a lower sampled accuracy are left out."""

    max_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.7
    """Prompts with a higher one too."""

    max_actions: Annotated[int, Field(ge=2)] = 20
    """Longer responses are dropped (20 in the paper; its code counts characters, which makes 10)."""

    after_confirmed: Literal["truncate", "drop", "keep"] = "truncate"
    """What goes on after a right attempt was accepted is cut off (the code) or the response dropped (the paper)."""

    balance: bool = False
    """Per problem no more never-right than right responses; on in the authors' code, not in the paper."""

    bins: Annotated[int, Field(ge=1)] = 9
    """Bins of problem accuracy; samples + 1 gives every count its own."""

    grouping: Literal["position", "context"] = "position"
    """Groups inside a bin at process level: by position of the action (the paper's best) or by reward context."""

    epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the pool."""


class ScreenConfig(Section):
    """Leave out prompts that are too easy or too hard for the starting policy, by sampling before training."""

    samples: Annotated[int, Field(ge=2)] = 4
    """Responses for each prompt."""

    min_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Prompts with a lower sampled accuracy are left out; the paper gives no figures for online training."""

    max_accuracy: Annotated[float, Field(ge=0, le=1)] = 0.99
    """Prompts with a higher one too."""


class GuardConfig(Section):
    """Limits that end online training early, measured on the sampled responses of a step."""

    ended_below: Annotated[float, Field(ge=0, le=1)] | None = None
    """Smallest share of responses with an end."""

    trials_above: Annotated[float, Field(gt=1)] | None = None
    """Most trials a response."""

    seconds: Annotated[float, Field(gt=0)] | None = None
    """Longest training from its start or resume; a step that would not end in time is not begun. A decaying rate
    reaches zero by then at the latest, so that what a run has learned depends on the machine."""


class S2RRlConfig(TrainingConfig):
    """Recipe section of the stage. Defaults are the paper's; deviations of its code are off and named."""

    type: Literal["s2r_rl"]

    level: Literal["outcome", "process"]
    """What is rewarded: the last answer, or every action."""

    engine: Literal["own", "trl"] = "own"
    """Whose loop trains: the reference of this package, or trl's ``RLOOTrainer`` (extra ``trl``) for online training at
    outcome level with ``ratio: sum``. With trl the KL is part of the reward and so of the baseline of other samples;
    with ``kl: 0`` both compute the same. What trl cannot express is refused by name."""

    mode: Literal["online", "offline"] = "online"
    """Sample at every step, or train on a pool sampled once."""

    problems: Annotated[int, Field(ge=1)] | None = None
    """Training problems, chosen by the run's seed; null for all."""

    steps: Annotated[int, Field(ge=1)] = 500
    """Online steps: one round of sampling and ``updates`` optimiser steps each."""

    prompts: Annotated[int, Field(ge=1)] = 64
    """Problems of a step."""

    samples: Annotated[int, Field(ge=2)] = 4
    """Responses for each problem (4 online, 8 offline in the paper)."""

    updates: Annotated[int, Field(ge=1)] = 4
    """Optimiser steps on the responses of one round (256 responses in 4 steps of 64)."""

    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled (temperature 0.7 online, 0.8 offline in the paper's code); ``top_p`` has to be 1: the
    ratio and the KL are those of the whole distribution."""

    lr: Annotated[float, Field(gt=0)] = 5e-7
    """Peak learning rate."""

    warmup: Annotated[int, Field(ge=0)] = 5
    """Optimiser steps of linear warm-up."""

    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up, to zero where it falls; the paper names none. A model whose supervised training
    ended at rate 0 loses accuracy to any constant rate before it learns: there ``linear`` is the better choice."""

    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Last share of the optimiser steps whose weights are averaged into the trained ones; 0 keeps the last weights, as
    in the paper. Ours: a step is mostly noise, and the mean keeps what the steps agree on."""

    clip_grad: Annotated[float, Field(gt=0)] | None = 1.0
    """Limit of the gradient norm."""

    kl: Annotated[float, Field(ge=0)] = 0.05
    """β: taken off the advantages, times the log-ratio of the sampling policy to the starting one (0.05; Qwen2.5-Math
    0.01; offline 0.1)."""

    kl_mean: bool = False
    """Log-ratio as a mean over the tokens instead of their sum (the authors' offline code)."""

    clip: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """ε of the clipped surrogate."""

    ratio: Literal["mean", "sum", "token"] = "mean"
    """Importance ratio: exp of the mean log-ratio of a unit's tokens (the authors' code), their plain product (the
    paper's formula), or one for each token."""

    baseline: BaselineConfig = BaselineConfig()
    """Baseline by groups."""

    truncation_reward: Literal[-1] | None = -1
    """Reward of a response (process level: of its last action) that was cut off; null leaves it to the answer."""

    flip_bonus: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the advantage of a retry that changes correctness; 2 in the authors' code, absent from the paper."""

    verify_correct_bonus: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the advantage of verifying a right attempt; 2 in the authors' code, absent from the paper."""

    repeat_penalty: Annotated[float, Field(ge=0)] = 0.0
    """Taken off the advantage of a retry that gives an answer given before in the response; at outcome level off the
    reward, times the share of such retries. Ours, 0 in the paper: small models retry what they have just rejected, and
    where every sample of a problem fails nothing else tells them apart."""

    weigh_by_length: bool = False
    """Weigh a response by its number of actions (outcome level: tokens). In the paper's mean over a response an action
    of a response of seven attempts has a seventh of the weight of a single attempt's; ours, off in the paper."""

    credit: Literal["response", "action"] = "response"
    """Outcome level, online: one advantage for a response, as in the paper, or one for each action: the outcome less
    what was to be expected before it, which is the mean outcome of the problem's other samples before the first
    attempt and that of all responses with the same reward context before a later action. Ours: an attempt that was
    known to be wrong is not credited with the success of the one after it."""

    discount: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Credit of later actions; 0 in the paper. Above 0 the baseline is that of the return."""

    train_end: bool = True
    """Train the end token; the authors' code leaves it out in this stage."""

    skip_agreeing: bool = True
    """Outcome level: groups whose samples all agree have weight 0, KL included (the authors' code)."""

    anchor: Annotated[float, Field(ge=0)] = 0.0
    """Weight of KL(π ‖ π_start) on the tokens of the first attempt; ours, 0 in the paper."""

    min_verdict_recall: Annotated[float, Field(ge=0, le=1)] | None = None
    """Refuse to begin unless right and wrong attempts on validation problems are recognised at least this often. A
    weak verifier makes outcome training unlearn verification; null trains anyway, as the paper does."""

    screen: ScreenConfig | None = None
    """Choose prompts by sampling before online training."""

    guard: GuardConfig = GuardConfig()
    """When to stop early."""

    offline: OfflineConfig = OfflineConfig()
    """Settings of ``mode: offline``."""

    max_length: Annotated[int, Field(ge=8)] = 8000
    """Longest prompt and response in tokens, for the memory estimate."""

    checkpoint_every: Annotated[int, Field(ge=1)] | None = 10
    """Steps between two checkpoints; null for none: a killed stage then starts over."""

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: 0 gives equal responses and nothing to learn from")
        if self.sampling.top_p < 1:
            # probabilities of what is left would have to be those of a set that changes while the policy moves: a token
            # that falls out of it has none, one that enters it was never sampled
            raise ValueError("sampling.top_p: below 1 the responses are not the policy's own, which biases training")
        return self

    @model_validator(mode="after")
    def _credited(self) -> Self:
        if self.credit == "action" and (self.level, self.mode) != ("outcome", "online"):
            raise ValueError("credit: action is for level: outcome, mode: online; process level credits actions anyway")
        return self

    @model_validator(mode="after")
    def _pooled(self) -> Self:
        if self.mode == "offline" and self.baseline.scope != "batch":
            # what came before the one pool is nothing: every baseline would be 0
            raise ValueError(f"baseline.scope: {self.baseline.scope} is for mode: online; offline takes scope: batch")
        return self

    @model_validator(mode="after")
    def _expressible(self) -> Self:
        if self.engine == "own":
            return self
        found = {
            "level: process": self.level != "outcome",
            "mode: offline": self.mode != "online",
            f"ratio: {self.ratio} (its ratio is the product: ratio: sum)": self.ratio != "sum",
            "kl_mean: true": self.kl_mean,
            "micro_tokens": self.micro_tokens is not None,
            "train_end: false": not self.train_end,
            "weigh_by_length: true": self.weigh_by_length,
            "an anchor": self.anchor > 0,
            "credit: action": self.credit != "response",
            "an average of weights": self.average > 0,
            "skip_agreeing: true with a KL (skip_agreeing: false, or kl: 0)": self.skip_agreeing and self.kl > 0,
            "updates that do not divide prompts × samples": self.prompts * self.samples % self.updates != 0,
        }
        refuse_for_trl(found)
        return self


class S2RRl(TrainingStage):
    """Samples, scores, updates."""

    Config: ClassVar[type[StageConfig]] = S2RRlConfig
    config: S2RRlConfig

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Training dominates; sampling fits beside it because gradients are free then."""
        c = self.config
        length = min(c.max_length, LONGEST_PROMPT + c.sampling.max_new_tokens)
        checkpoints = int(c.checkpoint_every is not None)
        found = estimate_training(c, inputs, length, c.micro_batch, checkpoints, copy=c.average > 0)
        return noted(with_work(found, self._work(inputs)), c.engine, c.sampler)

    def _work(self, inputs: PlanInputs) -> list[float | None]:
        """Arithmetic of sampling, scoring (policy and reference), training and measuring."""
        c = self.config
        length = PROMPT_TOKENS + c.sampling.max_new_tokens
        known = problem_count(c.task, c.problems, "train")
        every = None if known is None else float(known)
        if c.mode == "online":
            responses: float | None = float(c.steps * c.prompts * c.samples)
            again, scores, screened = 1, 2, 0.0 if c.screen is None else every and every * c.screen.samples
        else:
            responses = None if every is None else every * c.samples
            # the pool is sampled by the reference, whose scores are those of the policy too
            again, scores, screened = c.offline.epochs, 1, 0.0
        gate = 0.0 if c.min_verdict_recall is None else passes(inputs, GATE_PROBLEMS, length)
        anchored = c.anchor > 0
        return [
            None if screened is None else passes(inputs, screened, length),
            None if responses is None else (1 + scores + again * anchored) * passes(inputs, responses, length),
            None if responses is None else again * trained(c, inputs, responses, length),
            gate,
            measured(c.measure, c.task, inputs),
        ]

    def learn(self, policy: Policy, reader: Reader, ctx: RunContext) -> list[dict[str, Any]]:
        """Check the verifier, then train from the checkpoint that exists.

        Raises:
            InputError: A verdict recall is below ``min_verdict_recall`` or nothing is judged; no prompt or no
                response is left after the filters.
        """
        self._gate(policy, reader, ctx)
        return (self._offline if self.config.mode == "offline" else self._online)(policy, reader, ctx)

    def _gate(self, policy: Policy, reader: Reader, ctx: RunContext) -> None:
        """Measure verdicts on validation problems before anything is trained."""
        from llmcompress.errors import InputError
        from llmcompress.stages.s2r import config as shared

        wanted = self.config.min_verdict_recall
        if wanted is None:
            return
        problems = shared.MeasureConfig(
            split="validation", problems=GATE_PROBLEMS, max_new_tokens=self.config.sampling.max_new_tokens,
            batch=max(256, self.config.sampling.batch),
        )  # fmt: skip
        with policy.reference() as model:
            figures = shared.measure_behaviour(problems, model, reader, "gate", ctx)
        found = {"right": figures["correct_recall"], "wrong": figures["error_recall"]}
        if all(value is None for value in found.values()):
            raise InputError(
                f"stages.{self.name}: the model judged none of its attempts, so there is no verifier to reinforce",
                "teach it to verify first with a stage of type s2r_init",
            )
        low = {kind: value for kind, value in found.items() if value is not None and value < wanted}
        if low:
            listing = ", ".join(f"{kind} attempts {value:.1%}" for kind, value in low.items())
            raise InputError(
                f"stages.{self.name}: the verifier is too weak to reinforce: recognised {listing}, wanted {wanted:.0%}",
                "train verification longer (pair_epochs, pair_share of s2r_init), or lower min_verdict_recall",
            )

    def _settings(self, ctx: RunContext) -> RlSettings:
        from llmcompress.training.rl import RlSettings

        c = self.config
        return RlSettings(
            level=c.level, steps=c.steps, prompts=c.prompts, samples=c.samples, updates=c.updates, lr=c.lr,
            warmup=c.warmup, max_norm=c.clip_grad, kl=c.kl, kl_mean=c.kl_mean, clip=c.clip, ratio=c.ratio,
            sampling=c.sampling.settings(), truncation_reward=c.truncation_reward, flip_bonus=c.flip_bonus,
            verify_correct_bonus=c.verify_correct_bonus, discount=c.discount, train_end=c.train_end,
            skip_agreeing=c.skip_agreeing, micro_batch=c.micro_batch, micro_tokens=c.micro_tokens,
            save_every=c.checkpoint_every, seed=ctx.seed,
            anchor=c.anchor, repeat_penalty=c.repeat_penalty, weigh_by_length=c.weigh_by_length,
            decay=c.decay, credit=c.credit, average=c.average, weight_decay=c.weight_decay,
        )  # fmt: skip

    def _baseline(self) -> GroupBaseline:
        from llmcompress.algorithms.rl_objectives import GroupBaseline

        c = self.config.baseline
        return GroupBaseline(c.scope, c.min_group, c.decay, c.softmax)

    def _online(self, policy: Policy, reader: Reader, ctx: RunContext) -> list[dict[str, Any]]:
        from llmcompress.stages.s2r.sampling import note_idle
        from llmcompress.training.rl import Guard, train_online

        problems = self._problems(policy, reader, ctx)
        note_idle(self.config.prompts * self.config.samples, self.config.sampling.settings(), ctx)
        limits = self.config.guard
        guard = Guard(limits.ended_below, limits.trials_above, limits.seconds)
        common = (policy, reader, problems, self._settings(ctx))
        responses = min(self.config.prompts, len(problems)) * self.config.samples
        clock = time.monotonic()

        def tell(record: dict[str, Any]) -> None:
            nonlocal clock
            begun, clock = clock, time.monotonic()
            # not in the curve: a resumed run ends with the same one
            self._tell({**record, "tokens_per_second": record["tokens"] * responses / max(clock - begun, 1e-9)}, ctx)

        rest = (guard, ctx.stage_dir / CHECKPOINT, tell)
        if self.config.engine == "trl":
            curve, stopped = from_trl(self.name, "trl_rloo", "train_trl")(*common, *rest)
        else:
            curve, stopped = train_online(*common, self._baseline(), *rest)
        if stopped is not None:
            ctx.emit("warning", text=f"{self.name} stopped after step {len(curve)}: {stopped}")
        return curve

    def _problems(self, policy: Policy, reader: Reader, ctx: RunContext) -> list[Problem]:
        """Training problems, screened if asked for; the screen samples from the starting policy."""
        from llmcompress.algorithms.rl_objectives import keep_problem
        from llmcompress.errors import InputError
        from llmcompress.evaluation.self_correction import choose
        from llmcompress.stages.s2r.sampling import sample_all

        problems = choose(reader.problems.problems("train"), self.config.problems, ctx.seed)
        screen = self.config.screen
        if screen is None:
            return problems
        with policy.responding(start=True) as write:
            found = sample_all(write, reader, problems, screen.samples, self.config.sampling.settings(), ctx)

        def solved(place: int) -> int:
            return sum(reader.judge(problems[place], ids).final for ids in found[place])

        kept = [
            problem
            for problem, right in zip(problems, ctx.world.spread(len(problems), solved))
            if keep_problem(right, screen.samples, screen.min_accuracy, screen.max_accuracy)
        ]
        ctx.emit("note", text=f"{len(kept)} of {len(problems)} problems are neither too easy nor too hard")
        if not kept:
            raise InputError(
                f"stages.{self.name}.screen: no problem is left",
                "lower screen.min_accuracy or raise screen.max_accuracy",
            )
        return kept

    def _offline(self, policy: Policy, reader: Reader, ctx: RunContext) -> list[dict[str, Any]]:
        from llmcompress.errors import InputError
        from llmcompress.evaluation.self_correction import choose
        from llmcompress.stages.s2r.sampling import sample_all
        from llmcompress.training.offline import filter_pool, pool_advantages, train_offline

        c, settings = self.config, self._settings(ctx)
        problems = choose(reader.problems.problems("train"), c.problems, ctx.seed)
        with policy.responding(start=True) as write:
            responses = sample_all(write, reader, problems, c.samples, c.sampling.settings(), ctx)
        prompts = [reader.prompt(problem.question) for problem in problems]
        pool = filter_pool(
            reader, problems, prompts, responses, self._offline_settings(), c.truncation_reward, ctx.world
        )  # fmt: skip
        ctx.emit("note", text=f"{len(pool.rollouts)} responses kept; left out: {pool.counts}")
        if not pool.rollouts:
            raise InputError(
                f"stages.{self.name}.offline: no response is left after the filters",
                "lower offline.min_accuracy or raise offline.max_accuracy",
            )
        pool_advantages(pool, settings, self._offline_settings(), self._baseline())
        return train_offline(
            policy, reader, pool, settings, c.offline.epochs, ctx.stage_dir / CHECKPOINT,
            lambda record: self._tell(record, ctx),
        )  # fmt: skip

    def _offline_settings(self) -> OfflineSettings:
        from llmcompress.training.offline import OfflineSettings

        c = self.config.offline
        return OfflineSettings(
            c.min_accuracy, c.max_accuracy, c.max_actions, c.after_confirmed, c.balance, c.bins, c.grouping, c.epochs
        )

    def _tell(self, record: dict[str, Any], ctx: RunContext) -> None:
        for key, value in record.items():
            if key != "step" and value is not None:
                ctx.emit("metric", name=f"{self.name}.{key}", value=value, step=record["step"])
        if record["step"] % max(1, self.config.steps // 20) == 0:
            said = "–" if record["verification_accuracy"] is None else f"{record['verification_accuracy']:.1%}"
            speed = f", {record['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in record else ""
            text = (
                f"accuracy {record['accuracy']:.1%}, first attempt {record['first_accuracy']:.1%}, verdicts true {said}"
            )
            ctx.emit(
                "note",
                text=f"step {record['step']}: {text}, {record['trials']:.2f} trials, {record['ended']:.1%} ended, "
                f"KL {record['kl']:.3f}{speed}",
            )
