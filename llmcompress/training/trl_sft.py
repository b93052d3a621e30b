"""``engine: trl``: behaviour initialisation by trl's ``SFTTrainer`` (trl 1.16) instead of our own loop.

trl's are the loss, the accumulation of gradients and the loop around them. Ours stay the rows with their masks (its
``labels``: the tokens that are trained, −100 elsewhere), their order, the rates and the checkpoints, so that a killed
run resumes here too. Both compute the same, which ``tests/unit/training/test_trl_sft.py`` holds together: loss and
gradient of a batch, and weights after whole runs.

What ``SFTTrainer`` cannot express, and this engine therefore refuses: it has no reference policy, so neither the
paper's KL to the base nor the anchor on first attempts, and every target has the same weight. Rows are computed by
number, not by tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling
from trl.trainer.utils import disable_dropout_in_model

from llmcompress.training.optimizer import Trainer, due
from llmcompress.training.policy import Policy
from llmcompress.training.sft import SftRow, SftSettings, order
from llmcompress.training.trl_model import Paced, lent, rows_at_once

# what transformers leaves out of the loss
IGNORED = -100


class Sft(SFTTrainer):  # type: ignore[misc]
    """``SFTTrainer`` that tells nobody what is trained on which hardware."""

    def _send_telemetry(self) -> None:
        """Nothing."""


class _Loop(Paced):
    """One training, seen from trl's events: the rate is ours, and what a step did is kept."""

    def __init__(
        self, policy: Policy, settings: SftSettings, steps: int, checkpoint: Path,
        on_step: Callable[[int, int, dict[str, float]], None],
    ) -> None:  # fmt: skip
        self.settings, self.steps, self.checkpoint, self.tell = settings, steps, checkpoint, on_step
        self.trainer = Trainer(
            policy.trainable, settings.schedule(steps), settings.max_norm,
            weight_decay=settings.weight_decay,
        )  # fmt: skip
        self.curve: list[dict[str, Any]] = (self.trainer.restore(checkpoint) or {}).get("curve", [])

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Figures of the step."""
        if logs is None or "loss" not in logs:
            return
        step = self.trainer.step
        figures = {"cross_entropy": float(logs["loss"]), "grad_norm": float(logs["grad_norm"])}
        self.curve.append({"step": step, **figures})
        self.tell(step, self.steps, figures)
        if due(step, self.settings.save_every, step == self.steps):
            self.trainer.save(self.checkpoint, {"curve": self.curve})


def labelled(row: SftRow) -> dict[str, list[int]]:
    """A row as ``SFTTrainer`` takes it: ``input_ids``, and ``labels`` that are −100 where nothing is trained."""
    targets = [token if trained else IGNORED for token, trained in zip(row.response, row.trained, strict=True)]
    return {"input_ids": [*row.prompt, *row.response], "labels": [IGNORED] * len(row.prompt) + targets}


def train_trl_sft(
    policy: Policy, rows: Sequence[SftRow], pad: int, settings: SftSettings, checkpoint: Path,
    on_step: Callable[[int, int, dict[str, float]], None], tokenizer: PreTrainedTokenizerBase,
) -> list[dict[str, Any]]:  # fmt: skip
    """Like :func:`~llmcompress.training.sft.train_sft` where there is no KL, no anchor and no weight of verdicts;
    continue from ``checkpoint`` if it exists.

    The arguments are those of that one, and a tokenizer that trl wants to see; the rows are tokens already.

    Returns:
        One record a step: cross-entropy of all targets, gradient norm.

    Raises:
        UsageError: There are several processes.
        EnvironmentProblem: The installed trl has not the parts that are replaced here.
    """
    per_epoch = math.ceil(len(rows) / settings.batch)
    with lent(policy, SFTTrainer, ("_send_telemetry",)) as folder:
        loop = _Loop(policy, settings, per_epoch * settings.epochs, checkpoint, on_step)
        disable_dropout_in_model(policy.model)
        # an epoch at a time: its last batch may be a smaller one, which trl knows from the end of the data
        for epoch in range(loop.trainer.step // per_epoch, settings.epochs):
            begin = (loop.trainer.step - epoch * per_epoch) * settings.batch
            left = [labelled(rows[place]) for place in order(len(rows), epoch, settings.seed)[begin:]]
            _trainer(policy, tokenizer, pad, loop, Dataset.from_list(left), folder).train()
    return loop.curve


def _trainer(
    policy: Policy, tokenizer: PreTrainedTokenizerBase, pad: int, loop: _Loop, data: Dataset, folder: str
) -> Sft:
    settings = loop.settings
    part = rows_at_once(settings.batch, settings.micro_batch)
    arguments = SFTConfig(
        output_dir=folder, per_device_train_batch_size=part, gradient_accumulation_steps=settings.batch // part,
        num_train_epochs=1, train_sampling_strategy="sequential", shuffle_dataset=False, max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True}, packing=False, loss_type="nll", router_aux_loss_coef=0.0,
        max_grad_norm=float("inf") if settings.max_norm is None else settings.max_norm, learning_rate=settings.lr,
        bf16=policy.compute == torch.bfloat16, use_cpu=next(iter(policy.trainable.values())).device.type == "cpu",
        dataloader_pin_memory=False, gradient_checkpointing=False, seed=settings.seed % 2**32, logging_steps=1,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    found = Sft(
        model=policy.model, args=arguments, train_dataset=data, processing_class=tokenizer,
        # one of our own: with trl's it would change the padding token of tokenizer and model
        data_collator=DataCollatorForLanguageModeling(pad_token_id=pad), callbacks=[loop],
        optimizers=(loop.trainer.optimizer, LambdaLR(loop.trainer.optimizer, lambda _: 1.0)),
    )  # fmt: skip
    found.remove_callback(PrinterCallback)
    return found
