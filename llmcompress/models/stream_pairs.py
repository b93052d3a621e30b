"""Inputs of the same weights in two streams: kept from the full-precision one, paired with the quantized one.

A :class:`StreamRecorder` listens to the full-precision pass through a block, a :class:`StreamPairs` to the
quantized pass after it. Batches come in the same order in both, so rows pair up; experts are
paired by token, because the two streams may route differently.

Legend: T tokens, K inputs of a weight, H hidden size, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.models.activation_cache import ActivationCache
from llmcompress.models.capture import gated

if TYPE_CHECKING:
    from llmcompress.models.layout import ExpertBank, LinearGroup


class StreamRecorder:
    """Tap of the full-precision pass: keeps the inputs of planned weights of one block, on the CPU.

    Args:
        planned: Plan names of the weights that will be paired.
        cache: Where the inputs lie; without one on the heap.
        dtype: Type in which inputs of linears are kept, None for their own.
    """

    def __init__(
        self, planned: Collection[str], cache: ActivationCache | None = None, dtype: torch.dtype | None = None
    ) -> None:
        self.planned, self.cache, self.dtype = planned, cache or ActivationCache(), dtype
        self.shard = 0
        self.inputs: dict[str, list[Tensor]] = {}
        self.routed: dict[str, Tensor] = {}

    def wants(self, names: Sequence[str]) -> bool:
        """Whether inputs of these weights are to be kept."""
        return any(name in self.planned for name in names)

    def linears(self, group: LinearGroup, x: Tensor) -> None:
        """Keep a batch of a group's inputs, ``[T, K]``."""
        self.inputs.setdefault(group.linears[0].name, []).append(self.cache.keep(x.to("cpu", self.dtype or x.dtype)))

    def moe(self, bank: ExpertBank, x: Tensor) -> None:
        """Keep the expert bank's inputs, ``[T, H]``."""
        if self.wants([bank.gate_up, bank.down]):
            self.routed[bank.module] = x

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, expert: int, tokens: Tensor, x: Tensor, weight: Tensor | None
    ) -> None:
        """Nothing: which tokens an expert gets is known in the quantized pass only."""


class StreamPairs:
    """Tap of the quantized pass: adds up ``Σ (x − x̂) x̂ᵀ`` for planned weights.

    Args:
        recorded: The full-precision inputs of this block; given up as they are used.
        model: Holds the block's experts module.
    """

    def __init__(self, recorded: StreamRecorder, model: nn.Module) -> None:
        self.recorded, self.model = recorded, model
        self.shard = 0
        self._cross: dict[str, dict[int, Tensor]] = {}
        self._original: tuple[slice, Tensor] | None = None

    def wants(self, names: Sequence[str]) -> bool:
        """Whether these weights are paired."""
        return self.recorded.wants(names)

    def linears(self, group: LinearGroup, x: Tensor) -> None:
        """Pair the next batch of a group's inputs, ``[T, K]``."""
        name = group.linears[0].name
        queue = self.recorded.inputs[name]
        self._add(name, 0, 1, queue.pop(0).to(x.device), x, None)
        if not queue:
            del self.recorded.inputs[name]

    def moe(self, bank: ExpertBank, x: Tensor) -> None:
        """Nothing: experts are paired one by one."""

    def keep_original(self, bank: ExpertBank, experts: slice) -> None:
        """Remember the gate and up projections of some experts before they are overwritten."""
        stored: Tensor = getattr(self.model.get_submodule(bank.module), bank.gate_up.rpartition(".")[2])
        self._original = (experts, stored.detach()[experts].clone())

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, expert: int, tokens: Tensor, x: Tensor, weight: Tensor | None
    ) -> None:
        """Pair some tokens of one expert.

        Args:
            bank: The experts.
            name: Plan name of the projection whose input ``x`` is.
            experts: The chunk that is being worked on.
            expert: Which expert of the bank.
            tokens: int64 ``[n]`` rows of the block's tokens.
            x: ``[n, K]`` the quantized stream's input.
            weight: ``[n]`` weights of the tokens, or None for 1.
        """
        if not self.wants([name]):
            return
        every = self.recorded.routed[bank.module]
        reference = every[tokens.to(every.device)].to(x.device)
        self.recorded.cache.drop(every)
        if name == bank.down:
            module = self.model.get_submodule(bank.module)
            kept = self._original
            original = kept[1][expert - kept[0].start] if kept is not None and kept[0] == experts else None
            reference = gated(module, bank, expert, reference, original)
        self._add(name, expert - experts.start, experts.stop - experts.start, reference, x, weight)

    def take(self, name: str) -> Tensor | None:
        """The sum for a group (by its first linear) or for the current chunk of experts, ``[E, K, K]``; once."""
        found = self._cross.pop(name, {})
        assert len(found) <= 1, "of a sharded walk, take_shards"
        return next(iter(found.values()), None)

    def put(self, name: str, total: Tensor) -> None:
        """Give back a sum over all shards, for :meth:`take`."""
        self._cross[name] = {0: total}

    def take_shards(self, name: str, shards: int, like: Tensor) -> list[Tensor]:
        """The sums of each shard, zeros like ``like [E, K, K]`` where a shard had nothing; once."""
        found = self._cross.pop(name, {})
        return [found[shard] if shard in found else torch.zeros_like(like) for shard in range(shards)]

    def _add(self, name: str, row: int, rows: int, x: Tensor, x_hat: Tensor, weight: Tensor | None) -> None:
        width = x_hat.shape[-1]
        sums = self._cross.setdefault(name, {})
        if self.shard not in sums:
            sums[self.shard] = torch.zeros(rows, width, width, dtype=torch.float32, device=x_hat.device)
        difference = (x - x_hat).float()
        if weight is not None:
            difference = difference * weight.float().unsqueeze(-1)
        sums[self.shard][row].addmm_(difference.T, x_hat.float())
