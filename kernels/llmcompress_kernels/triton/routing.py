"""Sort routed slots by expert into blocks of tokens, without asking the host.

A block holds up to ``size`` slots of one expert. With T tokens of k slots over E experts there are at most
``min(T k, ceil(T k / size) + E)`` blocks; a launch covers them all and the empty ones return at once. Slots whose
expert is ``E`` (skipped), or none at all, enter no block, so an expert that every token skips costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from llmcompress_kernels.triton.tuning import power_of_two

# one program ranks this many slots by comparing all pairs; more are sorted by torch
ONE_PROGRAM = 1024


@dataclass(frozen=True, slots=True)
class Blocks:
    """Blocks of slots.

    Attributes:
        slots: int32 ``[blocks * size]``: slot at each place, ``T k`` where there is none.
        experts: int32 ``[blocks]``: expert of each block, E where the block is empty.
        size: Places per block.
    """

    slots: Tensor
    experts: Tensor
    size: int


@triton.jit
def route_kernel(
    index,
    slots,
    experts,
    count,
    places,
    EXPERTS: tl.constexpr,
    SIZE: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCKS: tl.constexpr,
    BANK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """One program: counts per expert, first block per expert, then rank of every slot within its expert."""
    bank = tl.arange(0, BANK)
    totals = tl.zeros((BANK,), tl.int32)
    for start in range(0, COUNT, CHUNK):
        at = start + tl.arange(0, CHUNK)
        expert = tl.load(index + at, mask=at < count, other=EXPERTS).to(tl.int32)
        totals += tl.sum((expert[:, None] == bank[None, :]).to(tl.int32), 0)
    blocks = tl.where(bank < EXPERTS, (totals + SIZE - 1) // SIZE, 0)
    ends = tl.cumsum(blocks, 0)
    block = tl.arange(0, BLOCKS)
    owner = tl.sum(((ends[None, :] <= block[:, None]) & (bank < EXPERTS)[None, :]).to(tl.int32), 1)
    tl.store(experts + block, owner, mask=block * SIZE < places)
    for start in range(0, COUNT, CHUNK):
        at = start + tl.arange(0, CHUNK)
        expert = tl.load(index + at, mask=at < count, other=EXPERTS).to(tl.int32)
        rank = tl.zeros((CHUNK,), tl.int32)
        for before in range(0, start + CHUNK, CHUNK):
            other_at = before + tl.arange(0, CHUNK)
            other = tl.load(index + other_at, mask=other_at < count, other=EXPERTS).to(tl.int32)
            same = (expert[:, None] == other[None, :]) & (other_at[None, :] < at[:, None])
            rank += tl.sum(same.to(tl.int32), 1)
        mine = (expert[:, None] == bank[None, :]).to(tl.int32)
        first = tl.sum(mine * (ends - blocks)[None, :], 1) * SIZE
        tl.store(slots + first + rank, at, mask=(at < count) & (expert >= 0) & (expert < EXPERTS))


def block_limit(slots: int, experts: int, size: int) -> int:
    """Most blocks that ``slots`` slots over ``experts`` experts can need."""
    return min(slots, -(-slots // size) + experts)


def route(index: Tensor, experts: int, size: int) -> Blocks:
    """Sort the slots of ``index [T, k]`` into blocks; E in ``index`` skips a slot."""
    count = index.numel()
    limit = block_limit(count, experts, size)
    if count > ONE_PROGRAM:
        return route_by_sorting(index, experts, size)
    slots = torch.full((limit * size,), count, dtype=torch.int32, device=index.device)
    owners = torch.empty((limit,), dtype=torch.int32, device=index.device)
    chunk = min(64, power_of_two(count))
    route_kernel[(1,)](
        index.contiguous(), slots, owners, count, limit * size,
        experts, size, -(-count // chunk) * chunk, power_of_two(limit), power_of_two(experts), chunk,
        num_warps=4,
    )  # fmt: skip
    return Blocks(slots, owners, size)


def route_by_sorting(index: Tensor, experts: int, size: int) -> Blocks:
    """:func:`route` in PyTorch operations; no result goes to the host."""
    count, device = index.numel(), index.device
    limit = block_limit(count, experts, size)
    flat = index.reshape(-1)
    flat = torch.where((flat < 0) | (flat > experts), experts, flat)
    ordered, order = torch.sort(flat, stable=True)
    totals = torch.zeros(experts + 1, dtype=torch.int64, device=device)
    totals.scatter_add_(0, flat, torch.ones_like(flat))
    blocks = (totals + size - 1) // size
    blocks[experts:] = 0
    ends, starts = blocks.cumsum(0), totals.cumsum(0) - totals
    place = (ends - blocks)[ordered] * size + torch.arange(count, device=device) - starts[ordered]
    # skipped slots go to one place too many, which is cut off
    place = torch.where(ordered < experts, place, limit * size)
    slots = torch.full((limit * size + 1,), count, dtype=torch.int32, device=device)
    slots.scatter_(0, place, order.to(torch.int32))
    owners = torch.searchsorted(ends[:experts], torch.arange(limit, device=device), right=True)
    return Blocks(slots[: limit * size], owners.to(torch.int32), size)
