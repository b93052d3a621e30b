"""The processes of a run and what they exchange; torch.distributed underneath, with one process nothing at all.

Everything goes through host memory by gloo: what travels is small beside the arithmetic (partial Hessians once per
block, packed weights once). Messages are JSON and raw tensor bytes, no pickle. All ranks call the same methods in the
same order; a rank that dies closes its connections, which ends every call of the others with :class:`PeerLost`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from llmcompress.distributed.balance import shares
from llmcompress.errors import EnvironmentProblem, UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

# set by the launcher for the processes it starts
LAUNCHED = "LLMCOMPRESS_LAUNCHED"
# exit code of a launched process that has lost another and leaves the word to the launcher, which never passes it on
LOST = 41
# shards of the calibration set that are summed in order when results must not depend on the number of processes
FIXED_SHARDS = 8
# a rank may wait for hours while another evaluates; one that has died is noticed at once all the same
_PATIENCE_DAYS = 30


def shards_of(samples: int, ranks: int, deterministic: bool) -> int:
    """Shards that a calibration set of ``samples`` windows is cut into over all ranks."""
    return max(min(FIXED_SHARDS, samples) if deterministic else 0, ranks)


class PeerLost(EnvironmentProblem):
    """Another rank has ended; this one cannot go on. What it was about is told by the launcher."""


@dataclass(frozen=True, slots=True)
class World:
    """This process among its peers.

    Attributes:
        rank: Its number; 0 owns the run folder, the display and the event log.
        size: How many there are.
        deterministic: Sum in an order that does not depend on ``size``.
        count: Shards of the calibration set, 0 for one per rank.
        traffic: Bytes sent and received by this rank, under ``bytes``.
    """

    rank: int = 0
    size: int = 1
    deterministic: bool = False
    count: int = 0
    traffic: dict[str, int] = field(default_factory=lambda: {"bytes": 0}, compare=False)

    @property
    def shards(self) -> int:
        """Number of shards that the calibration set is cut into, over all ranks."""
        return self.count or self.size

    def cut(self, samples: int) -> World:
        """This world with a number of shards for ``samples`` windows; 0 where no data flows.

        Raises:
            UsageError: There are fewer windows than ranks.
        """
        if 0 < samples < self.size:
            raise UsageError(
                f"{samples} calibration windows cannot be shared by {self.size} processes",
                f"--nproc {samples} or less, or more samples",
            )
        return replace(self, count=shards_of(samples, self.size, self.deterministic))

    def dealt(self, items: int) -> World:
        """This world with a number of shards for ``items`` things of which a rank may well get none."""
        return replace(self, count=max(1, min(items, max(FIXED_SHARDS if self.deterministic else 1, self.size))))

    @property
    def pooled(self) -> bool:
        """Whether statistics are summed over shards."""
        return self.shards > 1

    def owner_of_shard(self, shard: int) -> int:
        """Rank that runs a shard."""
        return next(rank for rank, own in enumerate(shares(self.shards, self.size)) if shard in own)

    def own_shards(self) -> range:
        """Shards of this rank."""
        return shares(self.shards, self.size)[self.rank]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            import torch.distributed as dist

            with _peers():
                dist.barrier()

    def tell(self, message: Any = None, source: int = 0) -> Any:
        """Pass plain data from one rank to all; returns it everywhere."""
        if self.size == 1:
            return message
        import torch

        text = json.dumps(message).encode() if self.rank == source else b""
        length = self._broadcast(torch.tensor([len(text)]), source)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else None
        if data is None:
            data = torch.empty(int(length), dtype=torch.uint8)
        return json.loads(self._broadcast(data, source).numpy().tobytes())

    def everyone(self, message: Any) -> list[Any]:
        """Plain data of each rank, in order of rank, on all of them."""
        return [self.tell(message if rank == self.rank else None, rank) for rank in range(self.size)]

    def spread(self, count: int, act: Callable[[int], Any]) -> list[Any]:
        """Do things that do not depend on each other, each on one rank.

        Args:
            count: Number of things.
            act: Does one, returns plain data.

        Returns:
            What ``act`` returned, in order, on all ranks.
        """
        own = [act(item) for item in range(self.rank, count, self.size)]
        found = self.everyone(own)
        return [found[item % self.size][item // self.size] for item in range(count)]

    def share_tensors(self, tensors: Mapping[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """Pass named tensors from one rank to all, on the CPU, bit by bit."""
        if self.size == 1:
            assert tensors is not None
            return dict(tensors)
        import torch

        own = {} if tensors is None else {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        header = {name: [list(t.shape), str(t.dtype).removeprefix("torch.")] for name, t in own.items()}
        found = {}
        for name, (shape, dtype) in self.tell(header, source).items():
            place = own[name] if self.rank == source else torch.empty(shape, dtype=getattr(torch, dtype))
            if place.numel():
                self._broadcast(place.reshape(-1).view(torch.uint8), source)
            found[name] = place
        return found

    def add_counts(self, counts: Sequence[int]) -> list[int]:
        """Sum of whole numbers over the ranks, everywhere."""
        if self.size == 1:
            return list(counts)
        import torch
        import torch.distributed as dist

        total = torch.tensor(list(counts), dtype=torch.int64)
        with _peers():
            dist.all_reduce(total)
        return [int(value) for value in total]

    def sum_in_order(self, parts: Iterable[Tensor], owner: int) -> Tensor | None:
        """Sum of every shard's tensor, in the order of the shards, on one rank.

        Args:
            parts: This rank's, one per shard of its own, fp32, equal shapes everywhere. Each is asked for when it is
                added or sent.
            owner: Rank that wants the sum.

        Returns:
            The sum on the owner, None elsewhere.
        """
        import torch

        total: Tensor | None = None
        mine = iter(parts)
        for shard in range(self.shards):
            source = self.owner_of_shard(shard)
            if source == self.rank:
                part = next(mine).contiguous()
                if self.rank != owner:
                    self._send(part.cpu(), owner)
            elif self.rank == owner:
                # a rank may have no shard of its own, and then no tensor to take the shape from
                part = torch.empty(self._receive_shape(source), dtype=torch.float32)
                self._receive(part, source)
            if self.rank == owner:
                total = part.clone() if total is None else total.add_(part.to(total.device))
        return total

    def gather_rows(self, rows: Tensor) -> Tensor | None:
        """Rows ``[n, K]`` of all ranks one after another, on the first; None elsewhere."""
        if self.size == 1:
            return rows
        import torch

        if self.rank != 0:
            self._send(rows.cpu().contiguous(), 0)
            return None
        found = [rows]
        for source in range(1, self.size):
            part = torch.empty(self._receive_shape(source), dtype=rows.dtype)
            self._receive(part, source)
            found.append(part.to(rows.device))
        return torch.cat(found)

    def _broadcast(self, tensor: Tensor, source: int) -> Tensor:
        import torch.distributed as dist

        self.traffic["bytes"] += tensor.numel() * tensor.itemsize
        with _peers():
            dist.broadcast(tensor, source)
        return tensor

    def _send(self, tensor: Tensor, target: int) -> None:
        import torch
        import torch.distributed as dist

        self.traffic["bytes"] += tensor.numel() * tensor.itemsize
        shape = torch.zeros(8, dtype=torch.int64)
        shape[: tensor.dim() + 1] = torch.tensor([tensor.dim(), *tensor.shape])
        with _peers():
            dist.send(shape, target)
            if tensor.numel():
                dist.send(tensor.reshape(-1).view(torch.uint8), target)

    def _receive_shape(self, source: int) -> list[int]:
        import torch
        import torch.distributed as dist

        shape = torch.empty(8, dtype=torch.int64)
        with _peers():
            dist.recv(shape, source)
        values: list[int] = shape.tolist()
        return values[1 : 1 + values[0]]

    def _receive(self, tensor: Tensor, source: int) -> None:
        import torch
        import torch.distributed as dist

        if tensor.numel():
            self.traffic["bytes"] += tensor.numel() * tensor.itemsize
            with _peers():
                dist.recv(tensor.view(-1).view(torch.uint8), source)


ALONE = World()


def joined(deterministic: bool) -> World:
    """The world this process was launched into; alone where it was not.

    Args:
        deterministic: The recipe's ``run.deterministic``.
    """
    if LAUNCHED not in os.environ:
        return World(deterministic=deterministic)
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if not dist.is_initialized():
        with _peers():
            dist.init_process_group("gloo", timeout=timedelta(days=_PATIENCE_DAYS))
    return World(dist.get_rank(), dist.get_world_size(), deterministic)


@contextmanager
def _peers() -> Iterator[None]:
    """Turn what torch says of a lost connection into :class:`PeerLost`."""
    try:
        yield
    except RuntimeError as error:
        raise PeerLost(f"another process of this run has ended ({first_line(error)})") from error


def each_owner(owners: Sequence[int], size: int, act: Callable[[int, list[int]], None]) -> None:
    """Call ``act(rank, items)`` for every rank that owns something, in order of rank.

    Args:
        owners: Rank of each item.
        size: Number of ranks.
        act: What all ranks do together for one of them.
    """
    for rank in range(size):
        items = [item for item, owner in enumerate(owners) if owner == rank]
        if items:
            act(rank, items)
