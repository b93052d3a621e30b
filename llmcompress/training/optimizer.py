"""AdamW with warm-up, and a checkpoint of everything a training loop needs in one file that is complete or absent."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from llmcompress.distributed.world import ALONE, World
from llmcompress.durable import write_durably
from llmcompress.errors import InputError

_MOMENTS = ("exp_avg", "exp_avg_sq")


def due(step: int, every: int | None, last: bool) -> bool:
    """Whether a checkpoint is to be written after this step: every so many and after the last; None is never."""
    return every is not None and (step % every == 0 or last)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Learning rate over a training.

    Attributes:
        lr: Peak.
        warmup: Steps of linear warm-up.
        steps: Optimizer steps in all.
        decay: ``constant`` (the paper names no schedule besides warm-up), or ``linear`` or ``cosine`` to zero.
    """

    lr: float
    warmup: int
    steps: int
    decay: str = "constant"

    def rate(self, step: int, spent: float = 0.0) -> float:
        """That of a step, counted from 0.

        Args:
            step: How many are done.
            spent: Share of the time that training may take; the rate falls by it too.
        """
        factor = min(1.0, (step + 1) / max(1, self.warmup))
        if self.decay == "linear":
            factor = min(factor, max(0.0, (self.steps - step) / max(1, self.steps)), max(0.0, 1 - spent))
        elif self.decay == "cosine":
            # from the end of the warm-up on (Loshchilov and Hutter, arXiv 1608.03983, without restarts)
            done = max((step - self.warmup) / max(1, self.steps - self.warmup), spent)
            factor = min(factor, (1 + math.cos(math.pi * min(1.0, max(0.0, done)))) / 2)
        return self.lr * factor


class Trainer:
    """Optimizer and progress. Of several processes the first one steps and tells the others the new values, so that
    no difference between processors can make them drift apart; it alone keeps moments and checkpoints.

    Args:
        parameters: Name → parameter.
        schedule: Learning rate and number of steps.
        max_norm: Gradient norm limit, None for none.
        world: The processes that train together.
        tail: Last share of the training whose values :meth:`finish` averages; 0 for none.
        weight_decay: Of matrices, decoupled from the gradient (Loshchilov and Hutter, arXiv 1711.05101); norms and
            biases have none.

    Attributes:
        step: Steps done.
        spent: Share of the time that training may take, where it may take no longer; the rate falls by it too.
        averaged: Steps in the mean so far.
    """

    def __init__(
        self, parameters: dict[str, nn.Parameter], schedule: Schedule, max_norm: float | None = None,
        world: World = ALONE, tail: float = 0.0, weight_decay: float = 0.0,
    ) -> None:  # fmt: skip
        self.world = world
        self.parameters, self.schedule, self.max_norm = parameters, schedule, max_norm
        values = list(parameters.values())
        # on a GPU one kernel for all parameters instead of a dozen for each group of them
        self.fused = all(value.is_cuda for value in values)
        groups: list[dict[str, Any]] = [{"params": values}]
        if weight_decay > 0:
            groups = [
                {"params": [value for value in values if value.ndim >= 2], "weight_decay": weight_decay},
                {"params": [value for value in values if value.ndim < 2]},
            ]
        groups = [group for group in groups if group["params"]]
        self.optimizer = torch.optim.AdamW(groups, lr=schedule.lr, weight_decay=0.0, fused=self.fused or None)
        self.step = 0
        self.spent = 0.0
        self.tail, self.averaged = tail, 0
        self._mean: dict[str, Tensor] = {}
        self._best: dict[str, Tensor] = {}

    def rate(self) -> float:
        """Learning rate of the next step."""
        return self.schedule.rate(self.step, self.spent)

    def update(self) -> float:
        """One step with the gradients at hand; returns their norm before the limit and clears them.

        All processes call this together; the gradients are those of the first.

        Raises:
            InputError: They are not finite; values and moments are as they were.
        """
        norm = self._step() if self.world.rank == 0 else 0.0
        self.step += 1
        if self.world.rank == 0 and max(self.step / max(1, self.schedule.steps), self.spent) > 1 - self.tail:
            self._add_to_mean()
        self._publish()
        return float(self.world.tell(norm))

    @torch.no_grad()
    def _add_to_mean(self) -> None:
        """``m ← m + (θ − m) / n``: the plain mean, without a sum that grows."""
        self.averaged += 1
        for name, parameter in self.parameters.items():
            if self.averaged == 1:
                self._mean[name] = parameter.detach().clone()
            else:
                self._mean[name].lerp_(parameter.detach(), 1 / self.averaged)

    @torch.no_grad()
    def finish(self) -> None:
        """Put the mean of the tail in the place of the last values, in all processes; nothing where none is kept.

        Steps of reinforcement are mostly noise: the mean keeps what they agree on (Polyak and Juditsky, "Acceleration
        of stochastic approximation by averaging", 1992; the mean over the last part is tail averaging).
        """
        for name, mean in self._mean.items():
            self.parameters[name].data.copy_(mean)
        self._publish()

    def remember(self) -> None:
        """Keep the present values as the best so far; checkpoints hold them too. The first process does."""
        if self.world.rank == 0:
            self._best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}

    @torch.no_grad()
    def recall(self) -> None:
        """Put the values that were kept last in the place of the present ones, in all processes; nothing where none
        were.
        """
        for name, best in self._best.items():
            self.parameters[name].data.copy_(best)
        self._publish()

    def _step(self) -> float:
        values = list(self.parameters.values())
        limit = self.max_norm if self.max_norm is not None else float("inf")
        norm = float(nn.utils.clip_grad_norm_(values, limit))
        if not math.isfinite(norm):
            raise InputError(
                f"step {self.step + 1} of the training: the gradients are not finite (NaN or infinity)",
                "set a lower lr, or run.compute_dtype=float32",
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def _publish(self) -> None:
        """Give all processes the values of the first."""
        if self.world.size == 1:
            return
        values = list(self.parameters.values())
        mine = {"values": torch.cat([v.detach().flatten() for v in values])} if self.world.rank == 0 else None
        told = self.world.share_tensors(mine, 0)["values"]
        if self.world.rank > 0:
            for value, part in zip(values, told.split([v.numel() for v in values])):
                value.data.copy_(part.view_as(value))

    def save(self, path: Path, progress: dict[str, Any]) -> None:
        """Write parameters, moments, the mean of the tail, the best values and ``progress`` (JSON data); the first
        process does.
        """
        if self.world.rank > 0:
            return
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"value.{name}"] = parameter.detach().cpu().contiguous()
            for key in _MOMENTS:
                moment = self.optimizer.state.get(parameter, {}).get(key)
                if moment is not None:
                    tensors[f"{key}.{name}"] = moment.cpu().contiguous()
        for kind, kept in (("mean", self._mean), ("best", self._best)):
            tensors |= {f"{kind}.{name}": value.cpu().contiguous() for name, value in kept.items()}
        record = json.dumps({"step": self.step, "averaged": self.averaged, **progress}, sort_keys=True)
        write_durably(path, save(tensors, metadata={"progress": record}))

    def restore(self, path: Path) -> dict[str, Any] | None:
        """Continue from what :meth:`save` wrote, all processes together; None if there is nothing.

        Raises:
            InputError: The file is damaged or of another model.
        """
        progress: dict[str, Any] | None = self.world.tell(self._read(path) if self.world.rank == 0 else None)
        if progress is not None:
            self._publish()
            self.step = int(progress.pop("step"))
            # checkpoints of versions that knew no mean have none
            self.averaged = int(progress.pop("averaged", 0))
        return progress

    def _read(self, path: Path) -> dict[str, Any] | None:
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as handle:
                progress: dict[str, Any] = json.loads((handle.metadata() or {})["progress"])
                there = set(handle.keys())
                for name, parameter in self.parameters.items():
                    parameter.data.copy_(handle.get_tensor(f"value.{name}"))
                    if f"{_MOMENTS[0]}.{name}" in there:
                        moments = {key: handle.get_tensor(f"{key}.{name}").to(parameter.device) for key in _MOMENTS}
                        # the fused optimizer counts on the device
                        step = torch.tensor(float(progress["step"]), device=parameter.device if self.fused else "cpu")
                        self.optimizer.state[parameter] = {"step": step, **moments}
                    if progress.get("averaged"):
                        self._mean[name] = handle.get_tensor(f"mean.{name}").to(parameter.device)
                    if f"best.{name}" in there:
                        self._best[name] = handle.get_tensor(f"best.{name}").to(parameter.device)
        except (SafetensorError, OSError, KeyError, ValueError, RuntimeError) as error:
            raise InputError(
                f"{path}: cannot continue from this checkpoint: {error}", "delete it and resume"
            ) from error
        return progress
