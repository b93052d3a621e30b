"""A batch dealt out to the processes of a run: parts of similar length, in shards whose gradients are summed in order.

Every process holds the whole model. A shard is computed by one process from beginning to end, and its sums are added in
the order of the shards, so that where their number is fixed (``run.deterministic``) the result does not depend on the
number of processes, to the bit. Otherwise there is a shard for each process: the same sum in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from llmcompress.distributed.balance import greedy_bin_packing
from llmcompress.distributed.world import World
from llmcompress.training.rows import by_length


@dataclass(frozen=True, slots=True)
class Dealt:
    """Who computes what of a batch.

    Attributes:
        world: The processes, with the shards of this batch.
        parts: Places of the rows computed together.
        shard_of: Shard of each part.
    """

    world: World
    parts: list[list[int]]
    shard_of: list[int]

    def of_rank(self, rank: int) -> list[int]:
        """Numbers of the parts that a process computes."""
        return [part for part, shard in enumerate(self.shard_of) if self.world.owner_of_shard(shard) == rank]

    def exchange(self, own: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Bring together values that each process has computed for its rows.

        Args:
            own: ``[lengths[row]]`` on the CPU for each row of this process, part after part.
            lengths: Values of each row of the batch.

        Returns:
            The values of every row, in the order of the batch, on all processes.
        """
        found = [torch.empty(0)] * len(lengths)
        for rank in range(self.world.size):
            rows = [row for part in self.of_rank(rank) for row in self.parts[part]]
            mine = {"rows": torch.cat([torch.empty(0), *own])} if rank == self.world.rank else None
            together = self.world.share_tensors(mine, rank)["rows"]
            for row, values in zip(rows, together.split([lengths[row] for row in rows])):
                found[row] = values
        return found

    def sum_gradients(
        self, parameters: Mapping[str, nn.Parameter], act: Callable[[list[int]], dict[str, Tensor]]
    ) -> list[dict[str, float]]:
        """Call ``act`` for the rows of every part of this process; the first process ends with the sum in ``.grad``.

        Args:
            parameters: What is trained, equal names and order everywhere.
            act: Runs the backward pass of its rows and returns single values worth keeping.

        Returns:
            What ``act`` returned for each part of the batch, on all processes.
        """
        figures: dict[int, dict[str, Tensor]] = {}

        def run(shard: int) -> None:
            for part, place in enumerate(self.shard_of):
                if place == shard:
                    figures[part] = act(self.parts[part])

        def gradients() -> Iterator[Tensor]:
            for shard in self.world.own_shards():
                run(shard)
                yield _take(parameters)

        if self.world.size == self.world.shards == 1:
            run(0)
        else:
            # the first process adds each to the sum as it comes; what the others send waits until it is asked for
            first = self.world.rank == 0
            total = self.world.sum_in_order(gradients() if first else [g.cpu() for g in gradients()], 0)
            if total is not None:
                for parameter, part in zip(parameters.values(), total.split([p.numel() for p in parameters.values()])):
                    parameter.grad = part.view_as(parameter).to(parameter.dtype)
        return self._told(figures)

    def figures(self, act: Callable[[list[int]], dict[str, Tensor]]) -> list[dict[str, float]]:
        """Call ``act`` for the rows of every part of this process and bring together what it returns.

        Args:
            act: Returns single values.

        Returns:
            What ``act`` returned for each part of the batch, on all processes.
        """
        return self._told({part: act(self.parts[part]) for part in self.of_rank(self.world.rank)})

    def _told(self, figures: Mapping[int, dict[str, Tensor]]) -> list[dict[str, float]]:
        # read at the end: reading waits for the device
        own = [[part, {key: float(value) for key, value in found.items()}] for part, found in figures.items()]
        told = dict(pair for pairs in self.world.everyone(own) for pair in pairs)
        return [told[part] for part in range(len(self.parts))]


def deal(world: World, lengths: Sequence[int], size: int, tokens: int | None = None) -> Dealt:
    """Cut a batch into parts and deal them out by their padded length.

    Args:
        world: The processes.
        lengths: Tokens of each row.
        size: Rows of a part, at most; less where there would be fewer parts than shards.
        tokens: See :func:`~llmcompress.training.rows.by_length`.
    """
    world = world.dealt(len(lengths))
    parts = by_length(lengths, min(size, max(1, len(lengths) // world.shards)), tokens)
    costs = [float(len(part) * lengths[part[-1]]) for part in parts]
    return Dealt(world, parts, greedy_bin_packing(costs, world.shards))


def _take(parameters: Mapping[str, nn.Parameter]) -> Tensor:
    """The gradients as one vector in float32, cleared."""
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    for parameter in parameters.values():
        parameter.grad = None
    return torch.cat([gradient.flatten().float() for gradient in found])
