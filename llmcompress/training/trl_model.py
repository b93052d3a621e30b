"""A policy lent to a trainer of trl: one process, our parameters move at our rate, the model comes back as it was."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback

from llmcompress.errors import EnvironmentProblem, UsageError
from llmcompress.training.optimizer import Trainer
from llmcompress.training.policy import Policy


class Paced(TrainerCallback):  # type: ignore[misc]
    """Follows trl's events: each step has our rate and is counted.

    Attributes:
        trainer: With the optimizer that trl uses.
    """

    trainer: Trainer

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        """Set our learning rate."""
        for group in self.trainer.optimizer.param_groups:
            group["lr"] = self.trainer.rate()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """An optimiser step is done."""
        self.trainer.step += 1


@contextmanager
def lent(policy: Policy, trainer: Any, hooks: tuple[str, ...]) -> Iterator[str]:
    """Inside the ``with`` block the model is trl's; gives an empty folder for what trl writes.

    Args:
        policy: Its trainable parameters, and no others, ask for gradients.
        trainer: The class of trl.
        hooks: Methods of it that are replaced, none of them promised to last.

    Raises:
        EnvironmentProblem: The installed trl has them not.
        UsageError: There are several processes: trl would wrap the model by itself.
    """
    if policy.world.size > 1:
        # of a process under --nproc only the message reaches the terminal
        raise UsageError("engine: trl trains in one process: go on without --nproc, or with engine: own")
    missing = [name for name in hooks if not hasattr(trainer, name)]
    if missing:
        raise EnvironmentProblem(
            f"engine: trl was written for trl 1.16; this one has no {trainer.__name__}.{missing[0]}",
            "pip install 'llmcompress[trl]'",
        )
    for name, parameter in policy.model.named_parameters():
        parameter.requires_grad_(name in policy.trainable)
    forward = policy.model.__dict__.get("forward")
    try:
        with tempfile.TemporaryDirectory(prefix="llmcompress-trl-") as folder:
            yield folder
    finally:
        # trl puts a forward of its own into the model
        policy.model.__dict__.pop("forward", None)
        if forward is not None:
            policy.model.forward = forward  # type: ignore[method-assign]
        policy.model.eval()


def rows_at_once(rows: int, limit: int) -> int:
    """The largest divisor of ``rows`` up to ``limit``: trl computes parts of equal size."""
    return max(size for size in range(1, min(rows, limit) + 1) if rows % size == 0)
