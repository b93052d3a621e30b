"""Inputs of the same weights in two streams: kept from the full-precision one, paired with the quantized one.

A :class:`StreamRecorder` listens to the full-precision pass through a block, a :class:`StreamPairs` to the
quantized pass after it. Batches come in the same order in both, so rows pair up; experts are
paired by token, because the two streams may route differently.

With residuals the streams' difference before each sublayer, the drift ``d = h − ĥ``, is paired with the inputs of the
projections that write to the residual stream as well. Of a bank every expert that a token meets is to give back all
of d over the sum of the token's routing weights, so that their weighted sum gives back d; shared experts beside it take
no part. Outputs that pass a norm or a projection before they are added are left alone.

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
    from llmcompress.models.capture import Routing
    from llmcompress.models.layout import ExpertBank, LinearGroup, Sublayer

# rows that are changed at once
ROWS = 512


def _outputs(sublayer: Sublayer) -> tuple[str, ...]:
    """Plan names of the weights whose outputs are added to the residual stream as they are."""
    if sublayer.post_norm is not None or sublayer.keeps is not None:
        return ()
    if sublayer.experts is not None:
        # the sum of experts that work on a projection is projected back before it is added
        return (sublayer.experts.down,) if sublayer.experts.entry is None else ()
    return tuple(group.linears[0].name for group in sublayer.groups if group.position == "last")


class StreamRecorder:
    """Tap of the full-precision pass: keeps the inputs of planned weights of one block, on the CPU.

    Args:
        planned: Plan names of the weights that will be paired.
        cache: Where the inputs lie; without one on the heap.
        dtype: Type in which inputs of linears are kept, None for their own.
        residuals: Whether to keep the residual stream before each sublayer too.
    """

    def __init__(
        self,
        planned: Collection[str],
        cache: ActivationCache | None = None,
        dtype: torch.dtype | None = None,
        residuals: bool = False,
    ) -> None:
        self.planned, self.cache, self.dtype = planned, cache or ActivationCache(), dtype
        self.residuals: dict[str, Tensor] | None = {} if residuals else None
        self.shard = 0
        self.inputs: dict[str, list[Tensor]] = {}
        self.inputs_of: dict[str, Tensor] = {}

    def wants(self, names: Sequence[str]) -> bool:
        """Whether inputs of these weights are to be kept."""
        return any(name in self.planned for name in names)

    def residual(self, sublayer: Sublayer, hidden: Tensor) -> None:
        """Keep a copy of the residual stream, ``[S, L, H]``."""
        if self.residuals is not None and self.wants(_outputs(sublayer)):
            self.residuals[sublayer.module] = self.cache.copy(hidden)

    def linears(self, group: LinearGroup, x: Tensor) -> None:
        """Keep a batch of a group's inputs, ``[T, K]``."""
        self.inputs.setdefault(group.linears[0].name, []).append(self.cache.keep(x.to("cpu", self.dtype or x.dtype)))

    def moe(self, bank: ExpertBank, x: Tensor) -> None:
        """Keep the expert bank's inputs, ``[T, H]``."""
        if self.wants([bank.gate_up, bank.down]):
            self.inputs_of[bank.module] = x

    def routed(self, routing: Sequence[Routing]) -> None:
        """Nothing: the quantized pass has its own."""

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, expert: int, tokens: Tensor, x: Tensor, weight: Tensor | None
    ) -> None:
        """Nothing: which tokens an expert gets is known in the quantized pass only."""


class StreamPairs:
    """Tap of the quantized pass: adds up ``Σ (x − x̂) x̂ᵀ`` for planned weights, and below it ``Σ d x̂ᵀ``.

    Args:
        recorded: The full-precision inputs of this block; given up as they are used.
        model: Holds the block's experts module.
    """

    def __init__(self, recorded: StreamRecorder, model: nn.Module) -> None:
        self.recorded, self.model = recorded, model
        self.shard = 0
        self._cross: dict[str, dict[int, Tensor]] = {}
        self._original: tuple[slice, Tensor] | None = None
        # the drift before the sublayer at work, [T, H], and the weights that are to give it back
        self._drift: Tensor | None = None
        self._outputs: tuple[str, ...] = ()
        self._row = 0

    def wants(self, names: Sequence[str]) -> bool:
        """Whether these weights are paired."""
        return self.recorded.wants(names)

    def residual(self, sublayer: Sublayer, hidden: Tensor) -> None:
        """Form the drift of the residual stream, ``[S, L, H]``."""
        kept = (self.recorded.residuals or {}).pop(sublayer.module, None)
        self._drift, self._outputs, self._row = None, (), 0
        if kept is None:
            return
        for own, now in zip(kept.split(1), hidden.split(1)):
            own.sub_(now).div_(sublayer.output_scale)
            self.recorded.cache.drop(kept, hidden)
        self._drift, self._outputs = kept.flatten(0, 1), _outputs(sublayer)

    def routed(self, routing: Sequence[Routing]) -> None:
        """Divide each token's drift by the sum of its routing weights; tokens that meet no expert do not matter."""
        if self._drift is None:
            return
        total = torch.zeros(len(self._drift))
        for shard in routing:
            total.index_add_(0, shard.token.cpu(), shard.weight.float().cpu())
        total[total == 0] = 1.0
        for own, weight in zip(self._drift.split(ROWS), total.split(ROWS)):
            own.div_(weight[:, None])
            self.recorded.cache.drop(self._drift)

    def linears(self, group: LinearGroup, x: Tensor) -> None:
        """Pair the next batch of a group's inputs, ``[T, K]``."""
        name = group.linears[0].name
        queue = self.recorded.inputs[name]
        rows = slice(self._row, self._row + len(x))
        drift = self._drifted(name, rows, x)
        if drift is not None:
            self._row = rows.stop
        self._add(name, 0, 1, queue.pop(0).to(x.device), x, drift, None)
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
            weight: ``[n]`` weights of the tokens, or None for 1; those by which ``x`` is scaled where the bank says so.
        """
        if not self.wants([name]):
            return
        every = self.recorded.inputs_of[bank.module]
        reference = every[tokens.to(every.device)].to(x.device)
        self.recorded.cache.drop(every)
        if bank.scales_inputs and weight is not None:
            # the scale is the router's, whose error is not these weights' to mend
            reference, weight = reference * weight.unsqueeze(-1), None
        if name == bank.down:
            module = self.model.get_submodule(bank.module)
            kept = self._original
            original = kept[1][expert - kept[0].start] if kept is not None and kept[0] == experts else None
            reference = gated(module, bank, expert, reference, original)
        drift = self._drifted(name, tokens, x)
        self._add(name, expert - experts.start, experts.stop - experts.start, reference, x, drift, weight)

    def take(self, name: str) -> Tensor | None:
        """The sum for a group (by its first linear) or for the current chunk of experts, ``[E, K, K]``; once.

        With residuals and for weights that write to the residual stream ``[E, K + H, K]``.
        """
        found = self._cross.pop(name, {})
        assert len(found) <= 1, "of a sharded walk, take_shards"
        return next(iter(found.values()), None)

    def put(self, name: str, total: Tensor) -> None:
        """Give back a sum over all shards, for :meth:`take`."""
        self._cross[name] = {0: total}

    def take_shards(self, name: str, shards: int, like: Tensor) -> list[Tensor]:
        """The sums of each shard, zeros for experts and K of ``like [E, K, K]`` where a shard had nothing; once."""
        found = self._cross.pop(name, {})
        experts, _, width = like.shape
        empty = like.new_zeros(experts, width + self._drift_width(name), width)
        return [found[shard] if shard in found else empty.clone() for shard in range(shards)]

    def _drift_width(self, name: str) -> int:
        return self._drift.shape[-1] if self._drift is not None and name in self._outputs else 0

    def _drifted(self, name: str, rows: slice | Tensor, like: Tensor) -> Tensor | None:
        if self._drift is None or name not in self._outputs:
            return None
        found = self._drift[rows if isinstance(rows, slice) else rows.cpu()].to(like.device)
        self.recorded.cache.drop(self._drift)
        return found

    def _add(
        self, name: str, row: int, rows: int, x: Tensor, x_hat: Tensor, drift: Tensor | None, weight: Tensor | None
    ) -> None:
        width = x_hat.shape[-1]
        sums = self._cross.setdefault(name, {})
        if self.shard not in sums:
            high = width + self._drift_width(name)
            sums[self.shard] = torch.zeros(rows, high, width, dtype=torch.float32, device=x_hat.device)
        difference = (x - x_hat).float()
        if drift is not None:
            difference = torch.cat((difference, drift.float()), -1)
        if weight is not None:
            difference = difference * weight.float().unsqueeze(-1)
        sums[self.shard][row].addmm_(difference.T, x_hat.float())
