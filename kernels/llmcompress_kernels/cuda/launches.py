"""How launches for few tokens are cut up: defaults, tables per GPU, and where a search keeps what it finds.

A table maps a key (kind of product, bits, tokens, N, K) to a launch. The one of the user's cache
(:mod:`llmcompress_kernels.tables`), which counts with the kernels that it was measured with, goes before the one that
comes with this package, ``launches/<gpu>.json``. A call never times anything; ``llmcompress bench tune`` does.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from llmcompress_kernels import tables

BACKEND = "cuda"
SHIPPED = Path(__file__).parent / "launches"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a launch is cut up.

    Attributes:
        warps: Warps of a block, 1 to 16; each owns 32 rows.
        stages: Steps of a warp's pipeline, 2 to 6.
        blocks: That a multiprocessor is meant to hold at once.
        overlap: Begin to read weights before the launch in front has ended (compute capability 9.0 and more).
        whole: Blocks take whole strips, where the groups of a weight allow it.
        teams: Strips that a block works at side by side, 1, 2, 4 or 8, where it takes whole ones; 0 leaves it open.
    """

    warps: int = 8
    stages: int = 4
    blocks: int = 1
    overlap: bool = True
    whole: bool = True
    teams: int = 0


def key(mode: str, bits: int, tokens: int, rows: int, columns: int) -> str:
    """Name of a table's entry; ``tokens`` counts for its next power of two."""
    return f"{mode}/{bits}/{1 << max(0, tokens - 1).bit_length()}/{rows}x{columns}"


# warps, stages and blocks worth timing, for blocks that take whole strips and for those that share them
_WHOLE = ((8, 2, 1), (8, 3, 1), (8, 4, 1), (4, 2, 2), (4, 3, 2), (4, 2, 3), (4, 3, 3))
_TEAMS = tuple((8, stages, 1, teams) for stages in (2, 3) for teams in (1, 2, 4, 8))
_SHARED = ((16, 2, 1), (12, 2, 1), (8, 2, 1), (8, 4, 1), (6, 2, 2), (8, 2, 2), (4, 2, 3), (4, 2, 4))


def usual(mode: str, tokens: int) -> Launch:
    """What a product without an entry takes: about the fastest of ``kernels/bench/gpu_few_tokens.py`` on an H200.

    Down projections of many tokens read more activations the fewer rows a block takes, which is what whole strips do.
    """
    return shared(mode, tokens) if mode == "down" and tokens > 4 else Launch(8, 2, 1)


def shared(mode: str, tokens: int) -> Launch:
    """The same for blocks that share strips, as they do with groups of 32 or 64 columns.

    Many warps with little in flight each: what limits is how long a warp waits for its own operations.
    """
    if mode == "dense":
        return Launch(12 if tokens <= 4 else 8, 2, 1, whole=False)
    return Launch(16, 2, 1, whole=False) if mode == "gate_up" else Launch(6, 2, 2, whole=False)


def candidates() -> dict[str, Launch]:
    """Launches worth timing by name: warps, stages, blocks of a multiprocessor and teams, or that strips are shared."""
    found = {_named(shape): Launch(*shape) for shape in _WHOLE}
    found |= {_named(shape): Launch(*shape[:3], teams=shape[3]) for shape in _TEAMS}
    found |= {f"{_named(shape)}/shared": Launch(*shape, whole=False) for shape in _SHARED}
    return {**found, "8/2/1/apart": Launch(8, 2, 1, overlap=False)}


def _named(shape: tuple[int, ...]) -> str:
    return "/".join(map(str, shape))


def pick(mode: str, bits: int, tokens: int, rows: int, columns: int, device: torch.device) -> Launch:
    """The launch of a product: a table's, or the usual one."""
    if device.type != "cuda":
        return Launch()
    name = _gpu(device.index if device.index is not None else torch.cuda.current_device())
    return _table(name).get(key(mode, bits, tokens, rows, columns), usual(mode, tokens))


def keep(gpu: str, found: Mapping[str, Launch]) -> None:
    """Add entries to the table of the user's cache."""
    tables.write(BACKEND, gpu, {name: asdict(launch) for name, launch in found.items()})
    _table.cache_clear()


@cache
def _gpu(number: int) -> str:
    return str(torch.cuda.get_device_properties(number).name)


@cache
def _table(gpu: str) -> dict[str, Launch]:
    return {**_launches(_shipped(gpu)), **_launches(tables.read(BACKEND, gpu)[0])}


def _shipped(gpu: str) -> dict[str, Any]:
    try:
        return dict(json.loads((SHIPPED / tables.file_name(gpu)).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return {}


def _launches(stored: Mapping[str, Any]) -> dict[str, Launch]:
    try:
        return {name: Launch(**values) for name, values in stored.items()}
    except TypeError:
        # the default is always right, only slower
        return {}
