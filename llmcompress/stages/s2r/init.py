"""Stage ``s2r_init``: teach a model to verify and retry by supervised training on its own trials (S2R section 2.2).

It samples solutions from the model itself, has every different answer verified, puts trials and verifications
together into trajectories that end right, and trains on the verifications, the last attempt and the end.
"""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, model_validator

from llmcompress.data.trajectories import KeepProbabilities
from llmcompress.data.verifiers import EndpointVerifier, ProgramVerifier
from llmcompress.section import Section
from llmcompress.stages.base import Estimate, PlanInputs, StageConfig
from llmcompress.stages.s2r.config import CHECKPOINT, SamplingConfig, TrainingConfig, estimate_training
from llmcompress.stages.s2r.training import TrainingStage, from_trl, noted, refuse_for_trl
from llmcompress.stages.s2r.work import PROMPT_TOKENS, measured, passes, problem_count, trained, with_work

if TYPE_CHECKING:
    from llmcompress.data.problems.base import Problem
    from llmcompress.data.trajectories import Trajectory
    from llmcompress.evaluation.self_correction import Reader
    from llmcompress.stages.state import RunContext
    from llmcompress.training.policy import Policy
    from llmcompress.training.sft import SftRow


class GiveUpConfig(Section):
    """Rows of wrong attempts alone, all rejected, after which the response ends; none of them is a target. Ours: a
    search has a last trial, and a right answer that was rejected again and again still is the answer then.
    """

    after: Annotated[int, Field(ge=2)] = 4
    """Trials in such a row."""

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Their share of trajectories and these rows together."""


class ValidationConfig(Section):
    """Training problems set aside, whose rows are not trained: their loss is measured while training goes on. Ours; the
    paper names none.
    """

    share: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the problems."""

    every: Annotated[int, Field(ge=1)] | None = None
    """Steps between two measurements; null for the end of each epoch. The end of the training has one anyway."""

    patience: Annotated[int, Field(ge=1)] | None = None
    """End training after this many measurements that are no better than the best one, and keep the weights of that one;
    null trains to the end and keeps the last ones."""


class S2RInitConfig(TrainingConfig):
    """Recipe section of the stage. Defaults are the paper's; where its code differs, the field says so."""

    type: Literal["s2r_init"]

    problems: Annotated[int, Field(ge=1)] | None = None
    """Training problems to sample for, chosen by the run's seed; null for all."""

    samples: Annotated[int, Field(ge=2)] = 5
    """Solutions sampled for each problem (5 in the paper). Their accuracy is the problem's difficulty."""

    sampling: SamplingConfig = SamplingConfig()
    """How they are sampled (temperature 0.7, top_p 1 in the paper's code)."""

    verifier: Annotated[ProgramVerifier | EndpointVerifier, Field(discriminator="kind")] = ProgramVerifier()
    """Who writes verifications. Those with a false verdict are dropped."""

    keep: KeepProbabilities = KeepProbabilities()
    """Share of the trajectories that is kept, by difficulty; the authors' figures."""

    trajectories: Annotated[int, Field(ge=1)] = 1
    """Different trajectories of each problem, at most: other wrong attempts, another order; 1 in the paper. With more
    of them instead of more epochs a small model repeats fewer of its failed attempts."""

    data: Literal["trajectories", "solutions", "program"] = "trajectories"
    """``solutions`` trains on right samples alone: the paper's control. ``program`` samples nothing and trains on
    solutions that the task's program writes to problems set aside for it: what a model needs that has never seen the
    task or its format, before anything can be sampled from it."""

    single_trials: bool = False
    """Beside each trajectory that begins with wrong attempts, a row with the right one alone and its verification. In
    the paper a right first attempt is trained where every sample was right; small models have few such problems, and
    their first attempts stay behind those of the control."""

    give_up: GiveUpConfig | None = None
    """Rows that end after a number of trials; null as in the paper: a search that finds nothing is cut off by the
    tokens."""

    read_back: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """``data: program``: share of rows that verify a given attempt, right or not. Neither the attempt nor the marker
    behind it is a target, nor is what would follow the verdict: the model learns how to verify, and goes on answering
    with one attempt. A large model can tell whether an answer fits its problem before it is taught S2R; a small one
    cannot. Word problems alone."""

    pair_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of (attempt, verification) pairs among the rows, as a warm-up of verification; 0 in the paper. Small
    models need
    it: without it their verdicts stay near chance."""

    pair_epochs: Annotated[int, Field(ge=0)] = 0
    """Epochs on pairs alone before the main training, balanced between right and wrong attempts; 0 in the paper."""

    train_markers: bool = True
    """Train the marker that opens a retry, also where the retry itself is not trained. The authors' loss leaves it
    out."""

    epochs: Annotated[int, Field(ge=1)] = 3
    """Passes over the trajectories (3 in the paper, 5 in its script)."""

    batch: Annotated[int, Field(ge=1)] = 32
    """Rows of an optimiser step."""

    lr: Annotated[float, Field(gt=0)] = 5e-6
    """Peak learning rate; 10 to 50 times as much for adapters."""

    warmup: Annotated[int, Field(ge=0)] = 5
    """Steps of linear warm-up."""

    decay: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up, to zero where it falls; the paper names none."""

    kl: Annotated[float, Field(ge=0)] = 0.1
    """λ of KL(π ‖ π_base) on the trained tokens (0.1 in the paper, 0.01 for Qwen2.5-Math)."""

    anchor: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the same KL on the tokens of the first attempt, which are no targets where it is wrong; 0 in the
    paper. Without it a small model's first attempts get worse."""

    verdict_weight: Annotated[float, Field(gt=0)] = 1.0
    """Weight of the word that gives a verdict ("correct" or "incorrect") in the cross-entropy; 1 in the paper. It is
    one token of the sixty of a verification and the one that decides; ours."""

    clip_grad: Annotated[float, Field(gt=0)] | None = None
    """Limit of the gradient norm; the paper names none for this stage."""

    engine: Literal["own", "trl"] = "own"
    """Whose loop trains: the reference of this package, or trl's ``SFTTrainer`` (extra ``trl``), which has no reference
    policy and so takes ``kl: 0`` and no anchor; then both compute the same."""

    max_length: Annotated[int, Field(ge=8)] = 8000
    """Longest row in tokens (8000 in the paper, 6000 for Qwen2-7B); longer ones are left out."""

    validation: ValidationConfig | None = None
    """Held-out loss: in the curve, the metrics and the report, in the terminal and in trackers; null for none."""

    checkpoint_every: Annotated[int, Field(ge=1)] | None = 50
    """Steps between two checkpoints; null for none: a killed stage then samples no more, but trains from the start."""

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if self.data != "program" and self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: 0 gives equal samples: no problem has a wrong and a right one")
        return self

    @model_validator(mode="after")
    def _expressible(self) -> Self:
        if self.engine == "own":
            return self
        found = {
            f"kl: {self.kl:g} (it has no reference policy; kl: 0)": self.kl > 0,
            "an anchor": self.anchor > 0,
            "verdict_weight": self.verdict_weight != 1,
            "micro_tokens": self.micro_tokens is not None,
            "validation": self.validation is not None,
        }
        refuse_for_trl(found)
        return self

    @model_validator(mode="after")
    def _written(self) -> Self:
        if self.data == "program" and self.task.kind == "file":
            raise ValueError("data: no program writes solutions to problems from a file; use trajectories or solutions")
        if self.read_back > 0 and (self.data != "program" or self.task.kind != "word_problems"):
            raise ValueError("read_back: for data: program with word problems")
        return self


class S2RInit(TrainingStage):
    """Samples, builds, trains, measures."""

    Config: ClassVar[type[StageConfig]] = S2RInitConfig
    config: S2RInitConfig

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Training dominates; the reference's weights stay in memory beside the model's."""
        c = self.config
        # that of the warm-up stays until the main training is over
        phases = 1 + (c.pair_epochs > 0 and c.data == "trajectories")
        best = c.validation is not None and c.validation.patience is not None
        found = estimate_training(
            c, inputs, c.max_length, c.batch, 0 if c.checkpoint_every is None else phases, copy=best
        )
        return noted(with_work(found, self._work(inputs)), c.engine, c.sampler)

    def _work(self, inputs: PlanInputs) -> list[float | None]:
        """Arithmetic of sampling, training (with the reference's pass and those of the held-out loss), and
        measuring before and after.
        """
        c = self.config
        known = problem_count(c.task, c.problems, "pretrain" if c.data == "program" else "train")
        before = measured(c.measure, c.task, inputs)
        held_out = [before, before]
        if known is None:
            return [*held_out, None]
        rows, again = float(known), 0.0
        if c.data == "trajectories":
            rows *= c.trajectories + c.single_trials
            rows /= (1 - c.pair_share) * (1 - (c.give_up.share if c.give_up else 0))
            # every different answer is a pair
            again = float(known * c.samples * c.pair_epochs)
        sampled = 0 if c.data == "program" else known * c.samples
        seen = rows * c.epochs + again
        # four trials at most (S2R section 3.1), verifications as long as attempts
        parts = {"solutions": 1, "trajectories": 2 * 4}.get(c.data)
        length = c.max_length if parts is None else min(c.max_length, PROMPT_TOKENS + parts * c.sampling.max_new_tokens)
        reference = passes(inputs, seen, length) if c.kl > 0 or c.anchor > 0 else 0.0
        writing = passes(inputs, sampled, PROMPT_TOKENS + c.sampling.max_new_tokens)
        aside = 0.0
        if c.validation is not None:
            times = max(1, rows * c.epochs / c.batch / c.validation.every) if c.validation.every else c.epochs
            aside = passes(inputs, times * rows * c.validation.share, length)
        return [*held_out, writing, trained(c, inputs, seen, length), reference, aside]

    def learn(self, policy: Policy, reader: Reader, ctx: RunContext) -> list[dict[str, Any]]:
        """Measure, build the rows, train on them; samples and checkpoint of an interrupted run are used again.

        Raises:
            InputError: Nothing to train on: no problem was solved by any sample.
        """
        from llmcompress.stages.s2r import config as shared

        if self.config.measure is not None:
            with policy.reference() as model:
                figures = shared.measure_behaviour(self.config.measure, model, reader, "before", ctx)
            shared.announce(f"{self.name}.before", figures, ctx)
        rows, pairs = self._rows(policy, reader, ctx)
        return self._train(policy, reader, *self._set_aside(rows, pairs, ctx), ctx)

    def _set_aside(
        self, rows: list[Trajectory], pairs: list[Trajectory], ctx: RunContext
    ) -> tuple[list[Trajectory], list[Trajectory], list[Trajectory]]:
        """Rows and pairs without the problems of the validation, and rows of these.

        Raises:
            InputError: Nothing would be left of one of them.
        """
        from llmcompress.data.trajectories import by_problem
        from llmcompress.errors import InputError

        if self.config.validation is None:
            return rows, pairs, []
        kept, aside = by_problem(rows, self.config.validation.share, ctx.seed)
        if not kept or not aside:
            raise InputError(
                f"stages.{self.name}.validation: all {len(rows)} training rows are of one problem",
                "take more problems, or set validation to null",
            )
        chosen = {row.problem for row in aside}
        ctx.emit("note", text=f"{len(aside)} rows of {len(chosen)} problems are held out for the validation")
        return kept, [pair for pair in pairs if pair.problem not in chosen], aside

    def _rows(self, policy: Policy, reader: Reader, ctx: RunContext) -> tuple[list[Trajectory], list[Trajectory]]:
        """Sample with all processes, then judge and build in the first: rows of the training, kept in
        ``trajectories.jsonl``, and pairs of the warm-up.
        """
        from dataclasses import asdict

        from llmcompress.data.trajectories import Trajectory
        from llmcompress.errors import InputError
        from llmcompress.evaluation.self_correction import choose
        from llmcompress.stages.s2r.sampling import note_idle, sample_all

        config = self.config
        if config.data == "program":
            rows = self._written_rows(reader, ctx)
            self._keep_rows(rows, {"rows": len(rows)}, ctx)
            return rows, []
        problems = choose(reader.problems.problems("train"), config.problems, ctx.seed)
        sampling = config.sampling.settings()
        note_idle(len(problems) * config.samples, sampling, ctx)
        with policy.responding(start=True) as write:
            responses = sample_all(write, reader, problems, config.samples, sampling, ctx)
        found = self._built(problems, responses, reader, ctx) if ctx.world.rank == 0 else ([], [])
        told = ctx.world.tell([[asdict(row) for row in part] for part in found] if ctx.world.size > 1 else None)
        rows, pairs = found if told is None else ([Trajectory(**row) for row in part] for part in told)
        if not rows:
            raise InputError(
                f"stages.{self.name}: no training row could be built from {len(problems)} problems",
                "the model solves none of them: choose an easier task, more samples, or another model",
            )
        return rows, pairs

    def _built(
        self, problems: list[Problem], responses: list[list[list[int]]], reader: Reader, ctx: RunContext
    ) -> tuple[list[Trajectory], list[Trajectory]]:
        """Rows and pairs out of the model's own samples; no rows where no problem was solved."""
        from llmcompress.data.trajectories import Builder, Sample, balanced_pairs, first_attempt, some, trial_counts
        from llmcompress.data.verifiers import build_verifier

        config = self.config
        builder = Builder(
            reader.problems, build_verifier(config.verifier, reader.problems, ctx.stage_dir / "verifications.jsonl"),
            config.keep, ctx.seed,
        )  # fmt: skip
        main: list[Trajectory] = []
        pairs: list[Trajectory] = []
        given_up: list[Trajectory | None] = []
        for problem, ids in zip(problems, responses):
            texts = [first_attempt(reader.text(i)) for i in ids]
            samples = [Sample(text, _right(reader, problem, text)) for text in texts]
            if config.data == "solutions":
                row = builder.solution(problem, samples)
                main += [row] if row is not None else []
            else:
                main += builder.trajectories(problem, samples, config.trajectories)
                single = builder.single(problem, samples) if config.single_trials else None
                main += [single] if single is not None else []
                if config.give_up is not None:
                    given_up.append(builder.given_up(problem, samples, config.give_up.after))
            if config.data == "trajectories" and (config.pair_share > 0 or config.pair_epochs > 0):
                pairs += builder.pairs(problem, samples)
        if not main:
            return [], []
        if config.give_up is not None:
            share = config.give_up.share
            main += some([row for row in given_up if row is not None], round(len(main) * share / (1 - share)), ctx.seed)
        pairs = balanced_pairs(pairs, len(pairs), ctx.seed)
        wanted = round(len(main) * config.pair_share / (1 - config.pair_share))
        rows = main + pairs[:wanted]
        counts = {"rows": len(main), "pairs": len(rows) - len(main), "by_trials": trial_counts(main), **builder.counts}
        self._keep_rows(rows, counts, ctx)
        ctx.emit("note", text=f"{len(main)} rows by trials {trial_counts(main)}, {len(rows) - len(main)} pairs")
        return rows, pairs

    def _written_rows(self, reader: Reader, ctx: RunContext) -> list[Trajectory]:
        """Solutions and verifications by the task's program, of problems that nothing else uses."""
        import random

        from llmcompress.data.actions import CHECK
        from llmcompress.data.problems.base import ReadBack, boxed
        from llmcompress.data.trajectories import Trajectory
        from llmcompress.data.verifiers import Program
        from llmcompress.evaluation.self_correction import choose

        problems = choose(reader.problems.problems("pretrain"), self.config.problems, ctx.seed)
        rng, verifier = random.Random(f"{ctx.seed}:written"), Program(reader.problems)
        rows = []
        for problem in problems:
            # no number is drawn where none is asked for
            if self.config.read_back > 0 and rng.random() < self.config.read_back:
                attempt, _ = cast(ReadBack, reader.problems).read_back(problem, rng)
                text = f"{attempt}{CHECK}{verifier.write(problem, boxed(attempt) or '')}"
                rows.append(Trajectory(problem.key, problem.question, text, 1, "verification", ends=False))
            else:
                rows.append(
                    Trajectory(problem.key, problem.question, reader.problems.solution(problem, rng), 1, "solution")
                )
        return rows

    def _keep_rows(self, rows: list[Trajectory], counts: dict[str, Any], ctx: RunContext) -> None:
        """Leave the training set and what it consists of in the stage's folder."""
        from llmcompress.durable import write_durably

        if ctx.world.rank > 0:
            return
        write_durably(ctx.stage_dir / "rows.json", json.dumps(counts, indent=1).encode())
        lines = [json.dumps(_record(row), ensure_ascii=False) for row in rows]
        write_durably(ctx.stage_dir / "trajectories.jsonl", ("\n".join(lines) + "\n").encode())

    def _train(
        self, policy: Policy, reader: Reader, rows: list[Trajectory], pairs: list[Trajectory],
        aside: list[Trajectory], ctx: RunContext,
    ) -> list[dict[str, Any]]:  # fmt: skip
        from llmcompress.training.sft import SftSettings

        config = self.config
        train = self._loop(reader)
        validation = config.validation or ValidationConfig()
        held_out = self._tokens(reader, aside, "validation", ctx)
        curve: list[dict[str, Any]] = []
        phases = [("warm-up", pairs, config.pair_epochs), ("training", rows, config.epochs)]
        for number, (name, texts, epochs) in enumerate(phases):
            kept = self._tokens(reader, texts, name, ctx)
            if not kept or not epochs:
                continue
            settings = SftSettings(
                epochs, config.batch, config.lr, config.kl, config.anchor, config.warmup, config.decay,
                config.clip_grad, config.micro_batch, config.micro_tokens, config.checkpoint_every,
                ctx.seed + number, config.verdict_weight, config.weight_decay, validation.every, validation.patience,
            )  # fmt: skip
            # pairs are a warm-up: what is measured, and may end early, is the training
            more = {"held_out": held_out} if held_out and texts is rows else {}
            base = len(curve)

            def on_step(step: int, total: int, figures: dict[str, float], phase: str = name, base: int = base) -> None:
                if step % 10 == 0 or step == total or "validation" in figures:
                    for key, value in figures.items():
                        ctx.emit("metric", name=f"{self.name}.{phase}.{key}", value=value, step=base + step)
                if step % max(1, total // 10) == 0 or step == total or "validation" in figures:
                    ctx.emit("note", text=f"{phase} {step}/{total}: {_progress(figures)}")

            path = ctx.stage_dir / f"{number}_{CHECKPOINT}"
            part = train(policy, kept, reader.pad, settings, path, on_step, **more)
            if part and part[-1]["step"] < -(-len(kept) // config.batch) * epochs:
                ctx.emit("note", text=f"{name}: ended after step {part[-1]['step']}, the held-out loss fell no more")
            curve += [{**record, "phase": name} for record in part]
        return curve

    def _tokens(self, reader: Reader, texts: list[Trajectory], name: str, ctx: RunContext) -> list[SftRow]:
        """Rows as tokens, without those that are too long."""
        from llmcompress.training.sft import to_row

        longest = self.config.max_length
        found = [to_row(text, reader, longest, self.config.train_markers) for text in texts]
        kept = [row for row in found if row is not None]
        if len(kept) < len(found):
            ctx.emit("warning", text=f"{name}: {len(found) - len(kept)} rows are longer than {longest} tokens")
        return kept

    def _loop(self, reader: Reader) -> Any:
        """The loop that trains.

        Raises:
            EnvironmentProblem: ``engine: trl`` is not installed.
        """
        if self.config.engine == "trl":
            return partial(from_trl(self.name, "trl_sft", "train_trl_sft"), tokenizer=reader.tokenizer)
        from llmcompress.training.sft import train_sft

        return train_sft


def _progress(figures: dict[str, float]) -> str:
    """A step in words."""
    words = [f"cross-entropy {figures['cross_entropy']:.4f}"]
    if "validation" in figures:
        words.append(f"held out {figures['validation']:.4f}")
    words.append(f"gradient norm {figures['grad_norm']:.3g}")
    if "tokens_per_second" in figures:
        words.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    return ", ".join(words)


def _right(reader: Reader, problem: Problem, text: str) -> bool:
    from llmcompress.data.problems.base import boxed

    return reader.problems.check(problem, boxed(text))


def _record(row: Trajectory) -> dict[str, Any]:
    return {
        "problem": row.problem,
        "kind": row.kind,
        "trials": row.trials,
        "question": row.question,
        "response": row.response,
    }
