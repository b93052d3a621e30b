"""``engine: trl``: online training at outcome level by trl's ``RLOOTrainer`` (trl 1.16) instead of our own loop.

trl's are the leave-one-out advantages, the clipped loss, the accumulation of gradients and the loop around them. Ours
stay the prompts and their tokens, the sampler, the rewards, the rates and the checkpoints; so both engines see the same
responses, and a killed run resumes here too. With ``kl`` 0 and ``ratio: sum`` they compute the same thing, which
``tests/unit/training/test_trl_rloo.py`` holds together: advantages, loss, gradients, and weights after whole runs.

What trl cannot express, and this engine therefore refuses or does in trl's way:

- *process level* (S2R section 2.3.2): a response has one advantage there. Rewards of single actions, baselines by
  reward context and bonuses on verifications have no place in it.
- *offline training* (section 2.4): responses are sampled anew at every step. A pool with its filters by accuracy and
  position, and baselines from bins of accuracy, are not possible.
- *KL outside the baseline* (Eq. 2): here β times the log-ratio is taken off the reward, so that a response's advantage
  holds the KL of the other samples too: ``A = LOO(R − β KL)``. In S2R it is ``LOO(R) − β KL``. The first sums to zero
  over the samples of a problem and the second does not, so no reward makes one of the other; with ``kl: 0`` they agree.
- *ratio by the mean over tokens* (the authors' code) or for each token: trl's is the plain product of the paper.
- *weight 0 for samples that agree* while there is a KL; *weights by length*; *an anchor on first attempts*; *an end
  token that is not trained*; *steps of unequal size*.

Packed weights take adapters as they do with our loop. One process only: under several, ``RLOOTrainer`` would wrap the
model by itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PrinterCallback
from trl import RLOOConfig, RLOOTrainer

from llmcompress.data.problems.base import Problem
from llmcompress.errors import EnvironmentProblem, UsageError
from llmcompress.evaluation.self_correction import Reader
from llmcompress.training import rl
from llmcompress.training.optimizer import Trainer, due
from llmcompress.training.policy import Policy
from llmcompress.training.trl_model import Paced, lent, rows_at_once

# what is replaced here, none of it promised to last
_HOOKS = ("_generate_single_turn", "_tokenize_prompts", "_send_telemetry")


class Rloo(RLOOTrainer):  # type: ignore[misc]
    """``RLOOTrainer`` that is told the tokens of prompts and responses and tells nobody else anything.

    Args:
        prompt: Question → its tokens.
        write: Tokens of the prompts, each as often as it has samples → tokens of the responses.
        **rest: As trl takes it.
    """

    def __init__(
        self, prompt: Callable[[str], list[int]], write: Callable[[list[list[int]]], list[list[int]]], **rest: Any
    ) -> None:
        self._prompt, self._write = prompt, write
        super().__init__(**rest)

    def _send_telemetry(self) -> None:
        """Nothing: trl would report what is trained on which hardware."""

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        return [self._prompt(prompt) for prompt in prompts], None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any) -> list[list[int]]:
        return self._write(prompt_ids)


class _Loop(Paced):
    """One training, seen from trl's events: it writes responses when asked and keeps count when a step is done."""

    def __init__(
        self, policy: Policy, reader: Reader, problems: Sequence[Problem], settings: rl.RlSettings, guard: rl.Guard,
        checkpoint: Path, on_step: Callable[[dict[str, Any]], None],
    ) -> None:  # fmt: skip
        self.policy, self.reader, self.problems = policy, reader, problems
        self.settings, self.guard, self.checkpoint, self.tell = settings, guard, checkpoint, on_step
        self.trainer = Trainer(
            policy.trainable, settings.schedule(settings.steps * settings.updates), settings.max_norm,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        progress = self.trainer.restore(checkpoint) or {}
        self.curve: list[dict[str, Any]] = progress.get("curve", [])
        self.stopped: str | None = progress.get("stopped")
        self.figures: list[dict[str, float]] = []
        self.scored: rl.Scored | None = None
        self.begun = time.monotonic()
        self.before = 0.0

    def prompts(self) -> list[int]:
        """Problems of the steps that are left, in order."""
        wanted, count = self.settings.prompts, len(self.problems)
        steps = range(len(self.curve), self.settings.steps)
        return [index for step in steps for index in rl.prompts_of_step(count, wanted, step, self.settings.seed)]

    def write(self, prompt_ids: list[list[int]]) -> list[list[int]]:
        """Sample and judge the responses of a step.

        Raises:
            EnvironmentProblem: trl asks for other prompts than were laid out for it.
        """
        step, seed = len(self.curve), self.settings.seed
        self.before = time.monotonic() - self.begun
        self.trainer.spent = 0.0 if self.guard.seconds is None else self.before / self.guard.seconds
        indices = rl.prompts_of_step(len(self.problems), self.settings.prompts, step, seed)
        self.policy.model.eval()
        rollouts = rl.collect(
            self.policy, self.reader, self.problems, indices, self.settings, seed * 65_537 + step
        )  # fmt: skip
        if [rollout.prompt for rollout in rollouts] != prompt_ids:
            raise EnvironmentProblem(
                "trl deals prompts in another order than trl 1.16 does", "pip install 'trl==1.16.*'"
            )
        self.scored = rl.score(self.policy, self.reader, rollouts, self.settings, same=False)
        self.policy.model.train()
        # trl shuffles responses by the global generator: here a function of the step, so that a resume does the same
        torch.manual_seed((seed * 65_537 + step) % 2**63)
        return [rollout.ids for rollout in rollouts]

    def reward(self, completion_ids: list[list[int]], **_: Any) -> list[float]:
        """Outcome of each response, less β times its log-ratio to the reference: RLOO's reward in trl."""
        assert self.scored is not None
        scored, settings = self.scored, self.settings
        kls = [float((old - reference).sum()) for old, reference in zip(scored.old, scored.reference)]
        rewards = [rl.penalised(rollout, settings.repeat_penalty) for rollout in scored.rollouts]
        return [reward - settings.kl * kl for reward, kl in zip(rewards, kls)]

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Figures of an optimiser step; after the last one of a round the step is complete."""
        if logs is None or "loss" not in logs:
            return
        self.figures.append(
            {"loss": logs["loss"], "clipped": logs["clip_ratio/region_mean"], "grad_norm": logs["grad_norm"]}
        )  # fmt: skip
        if len(self.figures) < self.settings.updates:
            return
        assert self.scored is not None
        step = len(self.curve) + 1
        # for the share of agreeing samples alone: the advantages that train are trl's
        settings = self.settings
        rl.outcome_advantages(
            self.scored.rollouts, settings.samples, settings.skip_agreeing, settings.repeat_penalty
        )  # fmt: skip
        record = rl.curve_record(step, self.scored, self.figures, self.settings)
        self.figures = []
        self.curve.append(record)
        after = time.monotonic() - self.begun
        self.stopped = self.guard.reason(record, 2 * after - self.before)
        control.should_training_stop = control.should_training_stop or self.stopped is not None
        self.tell(record)
        if due(step, self.settings.save_every, step == self.settings.steps or self.stopped is not None):
            self.trainer.save(self.checkpoint, {"curve": self.curve, "stopped": self.stopped})


def train_trl(
    policy: Policy, reader: Reader, problems: Sequence[Problem], settings: rl.RlSettings, guard: rl.Guard,
    checkpoint: Path, on_step: Callable[[dict[str, Any]], None],
) -> tuple[list[dict[str, Any]], str | None]:  # fmt: skip
    """Like :func:`~llmcompress.training.rl.train_online` at outcome level; continue from ``checkpoint`` if it exists.

    Returns:
        The curve, and why training stopped early if it did.

    Raises:
        UsageError: There are several processes, or too few problems for steps of equal size.
        EnvironmentProblem: The installed trl has not the parts that are replaced here.
    """
    with lent(policy, RLOOTrainer, _HOOKS) as folder:
        loop = _Loop(policy, reader, problems, settings, guard, checkpoint, on_step)
        if loop.stopped is None and len(loop.curve) < settings.steps:
            _trainer(loop, folder).train()
    return loop.curve, loop.stopped


def _trainer(loop: _Loop, folder: str) -> Rloo:
    policy, settings = loop.policy, loop.settings
    rows = min(settings.prompts, len(loop.problems)) * settings.samples
    if rows % settings.updates:
        raise UsageError(
            f"engine: trl: {rows} responses cannot be dealt into {settings.updates} equal steps",
            f"another number of updates, or at least {settings.prompts} problems",
        )
    step_rows = rows // settings.updates
    part = rows_at_once(step_rows, settings.micro_batch)
    device = next(iter(policy.trainable.values())).device
    arguments = RLOOConfig(
        output_dir=folder, per_device_train_batch_size=part, gradient_accumulation_steps=step_rows // part,
        steps_per_generation=rows // part, num_generations=settings.samples, num_iterations=1,
        max_steps=(settings.steps - len(loop.curve)) * settings.updates, beta=0.0, epsilon=settings.clip,
        max_completion_length=settings.sampling.max_new_tokens, temperature=settings.sampling.temperature,
        max_grad_norm=float("inf") if settings.max_norm is None else settings.max_norm, learning_rate=settings.lr,
        bf16=policy.compute == torch.bfloat16, use_cpu=device.type == "cpu", dataloader_pin_memory=False,
        gradient_checkpointing=False, disable_dropout=True, shuffle_dataset=False, seed=settings.seed % 2**32,
        logging_steps=1, report_to="none", disable_tqdm=True, save_strategy="no", router_aux_loss_coef=0.0,
    )  # fmt: skip
    questions = [loop.problems[index].question for index in loop.prompts()]
    steady = LambdaLR(loop.trainer.optimizer, lambda _: 1.0)
    found = Rloo(
        loop.reader.prompt, loop.write, model=policy.model, reward_funcs=loop.reward, args=arguments,
        train_dataset=Dataset.from_dict({"prompt": questions}), processing_class=loop.reader.tokenizer,
        callbacks=[loop], optimizers=(loop.trainer.optimizer, steady),
    )  # fmt: skip
    found.remove_callback(PrinterCallback)
    return found
