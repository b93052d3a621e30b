"""How launches for few tokens are cut up: defaults, tables per GPU, and where a search keeps what it finds.

A table is a JSON file that maps a key (kind of product, bits, tokens, N, K) to a launch. The one of the user's cache,
``<cache>/cuda/<gpu>.json``, goes before the one that comes with this package, ``launches/<gpu>.json``. A call never
times anything: ``kernels/bench/gpu_tune.py`` does, when it is asked to.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch

CACHE_VARIABLE = "LLMCOMPRESS_CACHE"
SHIPPED = Path(__file__).parent / "launches"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a launch is cut up.

    Attributes:
        warps: Of a block, 1 to 16; each owns 32 rows.
        stages: Steps of a warp's pipeline, 3 to 6.
        blocks: That a multiprocessor is meant to hold at once.
        overlap: Begin to read weights before the launch in front has ended (compute capability 9.0 and more).
    """

    warps: int = 8
    stages: int = 4
    blocks: int = 1
    overlap: bool = True


def key(mode: str, bits: int, tokens: int, rows: int, columns: int) -> str:
    """Name of a table's entry; ``tokens`` counts for its next power of two."""
    return f"{mode}/{bits}/{1 << max(0, tokens - 1).bit_length()}/{rows}x{columns}"


def table_name(gpu: str) -> str:
    """File name of a GPU's table."""
    return "".join(c if c.isalnum() else "-" for c in gpu.lower()) + ".json"


def cache_path(gpu: str) -> Path:
    """Where the table of the user's cache lies."""
    base = os.environ.get(CACHE_VARIABLE)
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmcompress")
    return Path(base).expanduser() / "cuda" / table_name(gpu)


def pick(mode: str, bits: int, tokens: int, rows: int, columns: int, device: torch.device) -> Launch:
    """The launch of a product: a table's, or the default."""
    if device.type != "cuda":
        return Launch()
    name = _gpu(device.index if device.index is not None else torch.cuda.current_device())
    return _table(name).get(key(mode, bits, tokens, rows, columns), Launch())


def keep(gpu: str, found: dict[str, Launch]) -> None:
    """Add entries to the table of the user's cache."""
    path = cache_path(gpu)
    merged = {**_read(path), **found}
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as handle:
        json.dump({name: asdict(launch) for name, launch in merged.items()}, handle, indent=1, sort_keys=True)
    Path(handle.name).replace(path)
    _table.cache_clear()


@cache
def _gpu(number: int) -> str:
    return str(torch.cuda.get_device_properties(number).name)


@cache
def _table(gpu: str) -> dict[str, Launch]:
    return {**_read(SHIPPED / table_name(gpu)), **_read(cache_path(gpu))}


def _read(path: Path) -> dict[str, Launch]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {name: Launch(**values) for name, values in stored.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        # absent, or written by another version: the default is always right, only slower
        return {}
