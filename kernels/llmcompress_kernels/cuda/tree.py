"""``delta_decode`` for up to 16 tokens in CUDA C++; ``csrc/cuda/tree/tree.cuh`` says how.

Nodes of 1, 2 and 4 bits in groups of 128 columns, all in one launch. Triton takes whatever this declines.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from llmcompress_kernels.cuda import library as libraries

FAMILY = "tree-cuda"
BITS, GROUP, TOKENS, TILE, MOST_NODES = (1, 2, 4), 128, 16, 8, 64
TYPES = (torch.bfloat16, torch.float16)
# shape.cuh: groups of a slab, rows of a tile, bytes of a step in a row, of a token's record
SLAB, TILE_ROWS, STEP_BYTES, RECORD = 8, 16, 128, 288
# call.h: most tokens of a node of 1 bit that counts bits; what stands for such nodes beside the widths of the others
MOST_COUNTED, COUNTS = 4, 8
# bytes of shared memory that a block may have
MOST_SHARED = {80: 163 << 10, 90: 227 << 10}

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
            for name in (
                "tokens",
                "rows",
                "columns",
                "groups",
                "nodes",
                "forms",
                "slabs",
                "blocks",
                "strips",
                "steps",
                "last_steps",
                "overlap",
            )
        ),
        ("node", Node * MOST_NODES),
    )


@dataclass(frozen=True, slots=True)
class Config:
    """How a launch is shaped; instances are in ``launch.h``.

    Attributes:
        tiles: Tiles of 16 rows that a warp takes together.
        warps: Warps of a block.
        stages: Stages of a warp's ring.
        blocks: That a multiprocessor is to hold.
        overlap: Begin to read weights before the launch in front has ended (compute capability 9.0 and more).
        spread: Add up a strip's parts as soon as they are there; only in libraries compiled for benches.
    """

    tiles: int = 2
    warps: int = 12
    stages: int = 2
    blocks: int = 1
    overlap: bool = True
    spread: bool = False


DEFAULT = Config()
# where shared memory does not hold the default, and where a block has few strips of rows for its warps: 4096 x 4096
# leaves it four, which take 8 warps 12.6 us with eight models and 10.1 with four, 12 warps 13.1 and 10.9; with ten and
# eleven strips (11008 x 4096, 4096 x 11008) 12 warps are 9 to 10 % faster (H200, kernels/bench/gpu_candidates.py)
SMALL = Config(warps=8)
FEW_STRIPS = 6


def verify(
    x: Tensor, packed: Sequence[Tensor], scale: Sequence[Tensor], bits: Sequence[int], group_size: int
) -> str | None:
    """Why :func:`delta_decode` declines, or None."""
    if any(b not in BITS for b in bits):
        return f"bits of {sorted(set(bits))}"
    if len(bits) > MOST_NODES or not 1 <= x.shape[0] <= TOKENS or not 1 <= packed[0].shape[0] < 1 << 22:
        return f"{len(bits)} nodes, {x.shape[0]} tokens, {packed[0].shape[0]} rows"
    if packed[0].shape[0] * x.shape[1] >= 1 << 36:
        return f"{packed[0].shape[0]} rows of {x.shape[1]} columns"
    if group_size != GROUP or x.shape[1] % (2 * GROUP) != 0:
        return f"{x.shape[1]} columns in groups of {group_size}: an even number of groups of {GROUP} is needed"
    if x.dtype not in TYPES:
        return f"activations of {x.dtype}"
    return libraries.declines_tensors(*packed, *scale)


def unavailable() -> str | None:
    """Why the kernel cannot run on this machine, or None; starts no build."""
    return libraries.unavailable(FAMILY)


def forms(bits: Sequence[int], ranges: Sequence[Sequence[int]]) -> int:
    """Sum of the different widths of nodes that multiply, and of ``COUNTS`` if some count.

    Args:
        bits: Bits of each node.
        ranges: Its tokens.
    """
    return sum({COUNTS if b == 1 and high - low <= MOST_COUNTED else b for b, (low, high) in zip(bits, ranges)})


def shared(config: Config, tokens: int, forms: int) -> int:
    """Bytes of shared memory of a block, as ``TreeShape::bytes`` of shape.cuh has them.

    Args:
        config: Tiles, warps and stages.
        tokens: T.
        forms: As from :func:`forms`.
    """
    ring = config.warps * config.stages * TILE_ROWS * config.tiles * (STEP_BYTES + 2 * SLAB)
    wide = (forms & ~COUNTS).bit_count() * SLAB * -(-tokens // TILE) * (2048 + 4 * TILE)
    return ring + (tokens * SLAB * RECORD if forms & COUNTS else 0) + wide


def shares(config: Config, rows: int, groups: int, processors: int) -> tuple[int, int, int]:
    """Slabs of columns, blocks of each, and strips of rows that the blocks of a slab share out evenly.

    Args:
        config: Tiles and blocks.
        rows: N.
        groups: G.
        processors: Multiprocessors.
    """
    slabs, strips = -(-groups // SLAB), -(-rows // (config.tiles * TILE_ROWS))
    return slabs, min(strips, max(1, processors * config.blocks // slabs)), strips


def launch_of(rows: int, groups: int, processors: int) -> Config:
    """The launch for a tree of N ``rows`` and G ``groups``, where shared memory holds it."""
    _, blocks, strips = shares(DEFAULT, rows, groups, processors)
    return SMALL if strips < FEW_STRIPS * blocks else DEFAULT


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
    config: Config | None = None,
    family: str = FAMILY,
) -> Tensor:
    """Arguments as in :func:`llmcompress_kernels.ops.delta_decode`, which :func:`verify` has accepted; sums in fp32.

    ``library`` is the emulation of the tests, on CPU tensors; ``processors`` decides how often the columns are split,
    None asks the GPU; ``config`` and ``family`` are the bench's, None for what :func:`launch_of` chooses.

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
    needed = forms([bits[v] for v in used], [ranges[v] for v in used])
    device = torch.cuda.get_device_properties(x.device) if processors is None else None
    arch = 90 if device is None or device.major >= 9 else 80
    groups, several = columns // GROUP, device.multi_processor_count if device else processors or 1
    config = config or launch_of(rows, groups, several)
    if shared(config, tokens, needed) > MOST_SHARED[arch] and config != SMALL:
        config = SMALL
    if tokens > TILE and shared(config, tokens, needed) > MOST_SHARED[arch]:
        # 16 tokens of nodes of all widths on an A100: eight at a time
        rest = (bits, multiplier, group_size, library, processors, config, family)
        low = delta_decode(x[:TILE], packed, scale, spans.clamp(max=TILE), *rest)
        return torch.cat([low, delta_decode(x[TILE:], packed, scale, spans.clamp(min=TILE) - TILE, *rest)])
    x = libraries.placed(x)
    out = x.new_empty((tokens, rows))
    early = config.overlap and device is not None and arch == 90
    slabs, blocks, strips = shares(config, rows, groups, several)
    steps = [sum(-(-g * bits[v] // SLAB) for v in used) for g in (SLAB, groups - (slabs - 1) * SLAB)]
    # sums of every strip over each slab, and of warps that begin within one
    sums = config.tiles * TILE_ROWS * -(-tokens // TILE) * TILE
    parts = x.new_empty((slabs * (strips + blocks * config.warps), sums), dtype=torch.float32)
    arrived = libraries.arrivals(strips if config.spread else blocks, x.device)
    call = Call(
        *(libraries.address(t) for t in (x, out, parts, arrived)),
        tokens, rows, columns, groups, len(used), needed, slabs, blocks, strips, *steps, int(early),
    )  # fmt: skip
    for place, v in enumerate(used):
        call.node[place] = Node(packed[v].data_ptr(), scale[v].data_ptr(), multiplier[v], bits[v], *ranges[v])
    arguments = (int(x.dtype == torch.bfloat16), config.tiles, config.warps, config.stages, int(config.spread))
    libraries.launch(family, "llmcompress_tree", "llmcompress_tree", call, arguments, x, library)
    return out
