"""``delta_decode`` for up to 16 tokens in CUDA C++; ``csrc/cuda/tree/tree.cuh`` says how.

Nodes of 1, 2 and 4 bits in groups of 128 columns, all in one launch. Triton takes whatever this declines.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels.cuda import library as libraries

FAMILY = "tree-cuda"
BITS, GROUP, TOKENS, TILE, MOST_NODES = (1, 2, 4), 128, 16, 8, 64
TYPES = (torch.bfloat16, torch.float16)
# tree.cuh: rows of a warp, bytes of a stage of its ring
ROWS_OF_WARP, STAGE_BYTES = 32, 32 * 64 + 32 * 16
# bytes of shared memory that a block may have, and that a multiprocessor has
MOST_SHARED, RESERVED = {80: 163 << 10, 90: 227 << 10}, 1024
REGISTERS = 65536

libraries.register(FAMILY, "tree/tree.cu")


class Node(ctypes.Structure):
    """``TreeNode`` of ``csrc/cuda/tree/call.h``."""

    _fields_ = (
        ("words", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("multiplier", ctypes.c_float),
        ("bits", ctypes.c_int), ("low", ctypes.c_int), ("high", ctypes.c_int),
    )  # fmt: skip


class Call(ctypes.Structure):
    """What one launch is told, as in ``csrc/cuda/tree/call.h``."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "out", "parts", "arrived")),
        *(
            (name, ctypes.c_int)
            for name in ("tokens", "rows", "columns", "groups", "nodes", "widths", "splits", "each")
        ),
        ("node", Node * MOST_NODES),
    )


@dataclass(frozen=True, slots=True)
class Config:
    """Warps of a block and stages of a warp's ring; instances are in ``launch.h``."""

    warps: int = 8
    stages: int = 6


DEFAULT = Config()


def verify(
    x: Tensor, packed: Sequence[Tensor], scale: Sequence[Tensor], bits: Sequence[int], group_size: int
) -> str | None:
    """Why :func:`delta_decode` declines, or None."""
    if any(b not in BITS for b in bits):
        return f"bits of {sorted(set(bits))}"
    if len(bits) > MOST_NODES or not 1 <= x.shape[0] <= TOKENS or packed[0].shape[0] == 0:
        return f"{len(bits)} nodes, {x.shape[0]} tokens, {packed[0].shape[0]} rows"
    if group_size != GROUP or x.shape[1] % (2 * GROUP) != 0:
        return f"{x.shape[1]} columns in groups of {group_size}: an even number of groups of {GROUP} is needed"
    if x.dtype not in TYPES:
        return f"activations of {x.dtype}"
    return libraries.declines_tensors(*packed, *scale)


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, or None; starts no build."""
    return libraries.unavailable(FAMILY)


def shared(config: Config, tokens: int, widths: int, each: int) -> int:
    """Bytes of shared memory of a block, as ``TreeShape::bytes`` of tree.cuh has them."""
    tiles = -(-tokens // TILE)
    return config.warps * config.stages * STAGE_BYTES + 16 + widths * each * tiles * (32 + 2048)


@lru_cache(maxsize=4096)
def split(
    config: Config, tokens: int, widths: int, rows: int, groups: int, processors: int, most_shared: int
) -> tuple[int, int]:
    """Parts that the columns are divided into, and groups per part: what takes the fewest rounds of groups.

    Args:
        config: Warps and stages.
        tokens: T.
        widths: Different widths of the nodes.
        rows: N.
        groups: G.
        processors: Multiprocessors.
        most_shared: Bytes of shared memory that a block may have.
    """
    tiles = -(-rows // (config.warps * ROWS_OF_WARP))
    by_registers = REGISTERS // (config.warps * 32 * 128)
    best: tuple[int, int, int] | None = None
    for splits in range(1, groups + 1):
        each = -(-groups // splits)
        if -(-groups // each) != splits or shared(config, tokens, widths, each) > most_shared:
            continue
        held = (most_shared + RESERVED) // (shared(config, tokens, widths, each) + RESERVED)
        rounds = -(-tiles * splits // (processors * max(1, min(held, by_registers))))
        # blocks that share a multiprocessor share its bandwidth; a part costs about a group to begin and to add
        cost = rounds * min(held, by_registers, -(-tiles * splits // processors)) * (each + 1)
        if best is None or cost < best[0]:
            best = (cost, splits, each)
    assert best is not None
    return best[1:]


def delta_decode(
    x: Tensor,
    packed: Sequence[Tensor],
    scale: Sequence[Tensor],
    spans: Tensor,
    bits: Sequence[int],
    multiplier: Sequence[float],
    group_size: int,
    library: Any = None,
    processors: int | None = None,
    config: Config = DEFAULT,
    family: str = FAMILY,
) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.ops.delta_decode`, which :func:`verify` has accepted; sums in fp32.

    ``library`` is the emulation of the tests, on CPU tensors; ``processors`` decides how often the columns are split,
    None asks the GPU; ``config`` and ``family`` are the bench's.

    Raises:
        BuildError: The kernels cannot be built.
        RuntimeError: The launch fails.
    """
    assert group_size == GROUP
    (tokens, columns), rows = x.shape, packed[0].shape[0]
    ranges = spans.tolist()
    used = [v for v, (low, high) in enumerate(ranges) if high > low]
    if not used:
        return x.new_zeros((tokens, rows))
    x = libraries.placed(x)
    out = x.new_empty((tokens, rows))
    widths = sum({bits[v] for v in used})
    if processors is None:
        properties = torch.cuda.get_device_properties(x.device)
        processors, most = properties.multi_processor_count, MOST_SHARED[90 if properties.major >= 9 else 80]
    else:
        most = MOST_SHARED[90]
    splits, each = split(config, tokens, widths.bit_count(), rows, columns // GROUP, processors, most)
    parts = None if splits == 1 else x.new_empty((splits, tokens, rows), dtype=torch.float32)
    arrived = None if splits == 1 else libraries.arrivals(-(-rows // (config.warps * ROWS_OF_WARP)), x.device)
    call = Call(
        *(libraries.address(t) for t in (x, out, parts, arrived)),
        tokens, rows, columns, columns // GROUP, len(used), widths, splits, each,
    )  # fmt: skip
    for place, v in enumerate(used):
        call.node[place] = Node(packed[v].data_ptr(), scale[v].data_ptr(), multiplier[v], bits[v], *ranges[v])
    arguments = (int(x.dtype == torch.bfloat16), config.warps, config.stages)
    libraries.launch(family, "llmcompress_tree", "llmcompress_tree", call, arguments, x, library)
    return out
