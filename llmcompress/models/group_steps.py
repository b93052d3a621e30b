"""The linears of one module in stages, so that a visitor can change them between statistics and use. See the walker."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Gram
from llmcompress.errors import InputError
from llmcompress.models.alignment import aligned
from llmcompress.models.capture import identity, recorded_inputs, replaced_forward
from llmcompress.models.memory_limits import rounds

if TYPE_CHECKING:
    from llmcompress.models.layout import LinearGroup
    from llmcompress.models.visitor import Visitor
    from llmcompress.models.walker import Walker


@dataclass(frozen=True, slots=True)
class Moments:
    """Second moments of one set of inputs, a sum per shard.

    Attributes:
        shards: In the order of the shards.
        apart: Whether they are for the visitor to sum; if not there is one.
    """

    shards: list[Gram]
    apart: bool

    def checked(self, name: str) -> Gram | Moments:
        """What a visitor gets, once it is known to be finite.

        Raises:
            InputError: Naming the weight whose input is damaged.
        """
        for gram in self.shards:
            check_finite(gram, name)
        return self if self.apart else self.shards[0]


class GroupSteps:
    """The linears of one module in stages: first, inner, last.

    Args:
        walker: For batches and devices.
        groups: All groups of one module, in order.
        visitor: Sees each group before it is used.
        call: Runs the module on a batch and its input.
        inputs: The module's input for a batch.
    """

    def __init__(
        self,
        walker: Walker,
        groups: Sequence[LinearGroup],
        visitor: Visitor | None,
        call: Callable[[slice, Tensor], Tensor],
        inputs: Callable[[slice], Tensor],
    ) -> None:
        self.walker, self.visitor, self.call, self.inputs = walker, visitor, call, inputs
        self.first = [group for group in groups if group.position == "first"]
        self.inner = [group for group in groups if group.position == "inner"]
        # None where the module's output projection belongs to an earlier block
        self.last = next((group for group in groups if group.position == "last"), None)
        # inputs of the module and of its last projection, each kept until it has been used for the last time
        self.held: Tensor | None = None
        self.kept: Tensor | None = None

    def outputs(self, needed: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """Go through the stages, then yield each batch's output ``[B, L, H]``."""
        walker, visitor, last = self.walker, self.visitor, self.last
        if last is None:
            yield from self._outputs_of_another(needed)
            return
        projection = walker.model.get_submodule(last.linears[0].name)
        if visitor is not None:
            wanted = visitor.wants(names_of(last))
            seen = wanted or walker.tapped(names_of(last)) is not None
            self._take_memory(last, seen and needed)
            self._first(visitor)
            self._inner(projection, visitor)
            visitor.linears(last, walker.statistics(last, self._before(projection, True), wanted))
            self.held = None
        if not needed:
            return
        dtype, stored = walker.model.dtype, self._stored(last)
        if self.kept is not None:
            for rows in walker.batches:
                yield rows, projection(aligned(self.kept[rows].to(walker.device, dtype)))
            self.kept = None
        else:
            for rows, x in zip(walker.batches, self._before(projection, False)):
                yield rows, projection(x.to(stored).to(dtype))

    def _outputs_of_another(self, needed: bool) -> Iterator[tuple[slice, Tensor]]:
        """The same for a module of which only adapters belong to this block; it is then run as a whole."""
        if self.visitor is not None:
            self._first(self.visitor)
            self._inner(None, self.visitor)
        for rows in self.walker.batches if needed else ():
            yield rows, self.call(rows, self._input(rows))

    def _first(self, visitor: Visitor) -> None:
        """Groups that read the module's input."""
        for number, group in enumerate(self.first):
            inputs = self._first_inputs() if number == 0 else (self._input(rows) for rows in self.walker.batches)
            visitor.linears(group, self.walker.statistics(group, inputs, visitor.wants(names_of(group))))

    def _stored(self, group: LinearGroup) -> torch.dtype:
        """Type to which inputs of the last projection are rounded, kept or not, so that every pass gives the same."""
        dtype = self.walker.model.dtype
        # over all processes, so that their number does not change the result
        values = (self.walker.all_tokens or self.walker.tokens.numel()) * group.linears[0].in_features
        return torch.bfloat16 if rounds(values, dtype.itemsize) else dtype

    def _take_memory(self, group: LinearGroup, keep: bool) -> None:
        """Lay out what is kept for later in the walker's memory.

        Inputs of the last projection start at the front, inputs of the module end at the back. Both are used batch
        by batch from the front, so the former may overwrite those of the latter that have had their turn.
        """
        rows, length = self.walker.tokens.shape
        # a module that is its own last projection has no other
        first, last = (found[0].linears[0].in_features for found in (self.first or [group], [group]))
        dtype, stored, most = self.walker.model.dtype, self._stored(group), self.walker.limits.keep
        size, held = rows * length * last * stored.itemsize, rows * length * first * dtype.itemsize
        keep = keep and size <= most
        hold = bool(self.first) and self.walker.device.type == "cpu" and held <= most
        memory = self.walker.memory(max(size if keep else 0, held if hold else 0))
        if keep:
            self.kept = memory[:size].view(stored).view(rows, length, last)
        if hold:
            self.held = memory[memory.numel() - held :].view(dtype).view(rows, length, first)

    def _first_inputs(self) -> Iterator[Tensor]:
        """Yield the module's input, batch by batch, for the first time."""
        for rows in self.walker.batches:
            x = self.inputs(rows)
            if self.held is not None:
                self.held[rows] = x
            yield x

    def _input(self, rows: slice) -> Tensor:
        """The module's input of one batch."""
        return self.inputs(rows) if self.held is None else aligned(self.held[rows])

    def _before(self, projection: nn.Module, keep: bool) -> Iterator[Tensor]:
        """Yield the output projection's input, batch by batch."""
        for rows in self.walker.batches:
            with replaced_forward(projection, identity):
                before = self.call(rows, self._input(rows))
            if keep and self.kept is not None:
                self.kept[rows] = before
            yield before

    def _inner(self, projection: nn.Module | None, visitor: Visitor) -> None:
        """Groups in the middle of the module (MLA), all seen in one pass."""
        walker = self.walker
        counted = [visitor.wants(names_of(group)) for group in self.inner]
        grams = [
            Moments([Gram(1, g.linears[0].in_features, walker.device) for _ in walker.parts], walker.sharded)
            if c
            else None
            for g, c in zip(self.inner, counted)
        ]
        shard = 0
        taps = [walker.tapped(names_of(group)) for group in self.inner]

        def seen(position: int, x: Tensor) -> None:
            gram, tap = grams[position], taps[position]
            if gram is not None:
                gram.shards[shard].add(x.flatten(0, -2))
            if tap is not None:
                tap.shard = shard
                tap.linears(self.inner[position], x.flatten(0, -2))

        if any(counted) or any(tap is not None for tap in taps):
            modules = [walker.model.get_submodule(group.linears[0].name) for group in self.inner]
            silent = nullcontext() if projection is None else replaced_forward(projection, identity)
            with recorded_inputs(modules, seen), silent:
                for rows in walker.batches:
                    shard = walker.shard_of(rows)
                    self.call(rows, self._input(rows))
        for group, gram in zip(self.inner, grams):
            visitor.linears(group, None if gram is None else gram.checked(group.linears[0].name))


def check_finite(gram: Gram, name: str) -> None:
    """Refuse statistics with NaN or infinity.

    Raises:
        InputError: Naming the weight whose input is damaged.
    """
    if not bool(torch.isfinite(gram.total.diagonal(dim1=-2, dim2=-1)).all()):
        raise InputError(
            f"{name}: its calibration inputs contain NaN or infinity",
            "check the model's weights, or use run.compute_dtype=float32",
        )


def names_of(group: LinearGroup) -> list[str]:
    """Names of a group's linears."""
    return [linear.name for linear in group.linears]
