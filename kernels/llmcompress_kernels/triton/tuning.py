"""Launch configurations: defaults by shape, tables per GPU, and a search that fills them.

A table (:mod:`llmcompress_kernels.tables`) maps a key (operator, bits, type, power-of-two bucket of the tokens, N, K)
to a configuration; it counts only on the GPU and with the versions that it was measured with. ``search``, which
``llmcompress bench tune`` runs, times candidates and stores the best; a call outside of it never times anything, so
CUDA graphs and latencies stay predictable. Under the interpreter the configuration is fixed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache

import torch
import triton

from llmcompress_kernels import tables

BACKEND = "triton"


@dataclass(frozen=True, slots=True)
class Config:
    """One way to launch a matrix kernel.

    Attributes:
        tokens: Rows of the activation per program, at least 16.
        rows: Rows of the weight per program.
        columns: Columns per step, a multiple of 32.
        splits: Parts the columns are divided into over programs.
        warps: Warps per program.
        stages: Depth of the software pipeline.
        joined: What splits leave is added and rounded in one launch of the package, not two of PyTorch's.
    """

    tokens: int
    rows: int
    columns: int
    splits: int = 1
    warps: int = 4
    stages: int = 3
    joined: bool = False


# small enough for the interpreter, which spends milliseconds per program and step; ragged against most shapes
INTERPRETED = Config(16, 32, 64, splits=2, warps=4, stages=1)


def interpreted() -> bool:
    """Whether kernels of this process are interpreted on CPU tensors."""
    return bool(triton.knobs.runtime.interpret)


def power_of_two(value: int) -> int:
    """Smallest power of two that is not below ``value``."""
    return 1 << max(0, value - 1).bit_length()


def default(tokens: int, rows: int, columns: int, processors: int, wide: bool = True) -> Config:
    """Configuration without a table.

    Few tokens: the weight is read once whatever the tile, so tiles are narrow and the columns are split until
    every multiprocessor has about four programs. Many tokens: large tiles, so that a decoded weight serves
    many tokens and the tensor cores get their widest instruction.

    Args:
        tokens: Tokens per weight (per expert, for experts).
        rows: N.
        columns: K.
        processors: Multiprocessors of the GPU.
        wide: Compute capability 9 or more, whose tensor cores read 64 rows and 256 tokens at a time.
    """
    if tokens <= 64:
        tile = max(16, power_of_two(tokens))
        programs = -(-rows // 128)
        wanted = max(1, (4 * processors) // programs)
        splits = min(power_of_two(wanted), 16, max(1, power_of_two(columns // 512)))
        return Config(tile, 128, 128, splits, warps=4 if tile <= 32 else 8, stages=3)
    # 256 tokens leave about 15 instructions per weight before the tensor cores wait, 128 leave half of it
    tile = (256 if tokens >= 256 else 128) if wide else 64
    # a weight of few rows leaves multiprocessors without a tile; sums that go through memory cost less than that
    programs = -(-rows // 128) * -(-tokens // tile)
    splits = min(8, max(1, processors // programs), max(1, columns // 1024))
    return Config(tile, 128, 64, splits, warps=8, stages=3)


def few_parts(tokens: int, rows: int, columns: int, bits: int, processors: int) -> Config:
    """A configuration for 17 to 255 tokens that ``kernels/bench/gpu_candidates.py`` holds against :func:`default`'s.

    Every split writes and reads 8 bytes a token and row, where a row's codes have ``columns bits / 8``. With 64 tokens
    and 2560 columns of 4 bits one split is 512 bytes beside 1280, and :func:`default` makes eight. Here tiles get lower
    until every multiprocessor has one, and parts take at most half as many bytes as codes.

    Args:
        tokens: T.
        rows: N.
        columns: K.
        bits: Code width.
        processors: Multiprocessors of the GPU.
    """
    tile = min(128, max(16, power_of_two(tokens)))
    heights = (128, 64, 32)
    height = next((h for h in heights if -(-rows // h) * -(-tokens // tile) >= processors), heights[-1])
    programs = -(-rows // height) * -(-tokens // tile)
    splits = min(2 * processors // programs, columns * bits // (128 * tokens), columns // 512)
    wide = tile * height >= 128 * 64
    return Config(tile, height, 64 if wide else 128, max(1, splits), 8 if wide else 4, joined=True)


def candidates(tokens: int) -> Iterable[Config]:
    """Configurations worth timing for this many tokens."""
    if tokens <= 64:
        tile = max(16, power_of_two(tokens))
        for rows in (32, 64, 128):
            for columns in (64, 128, 256):
                for splits in (1, 2, 4, 8):
                    for stages in (2, 4):
                        yield Config(tile, rows, columns, splits, 4, stages)
        return
    for tile in (64, 128, 256):
        for rows in (64, 128, 256):
            for columns in (32, 64):
                for stages in (2, 3, 4):
                    if tile * rows <= 128 * 256:
                        yield Config(tile, rows, columns, 1, 8 if tile * rows >= 128 * 128 else 4, stages)


def key(op: str, bits: int, dtype: torch.dtype, tokens: int, rows: int, columns: int) -> str:
    """Name of a table's entry."""
    return f"{op}/{bits}/{str(dtype).removeprefix('torch.')}/{power_of_two(tokens)}/{rows}x{columns}"


@cache
def _table(gpu: str) -> dict[str, Config]:
    stored, _ = tables.read(BACKEND, gpu)
    try:
        return {name: Config(**values) for name, values in stored.items()}
    except TypeError:
        # the defaults are always right, only slower
        return {}


@cache
def _device(index: int) -> tuple[str, int, bool]:
    properties = torch.cuda.get_device_properties(index)
    return properties.name, properties.multi_processor_count, properties.major >= 9


def pick(op: str, bits: int, dtype: torch.dtype, tokens: int, rows: int, columns: int, device: torch.device) -> Config:
    """The configuration of a call: interpreter's, table's, or default."""
    if device.type != "cuda":
        return INTERPRETED
    name, processors, wide = _device(device.index if device.index is not None else torch.cuda.current_device())
    found = _table(name).get(key(op, bits, dtype, tokens, rows, columns))
    return found or default(tokens, rows, columns, processors, wide)


def search(
    name: str, gpu: str, options: Iterable[Config], milliseconds: Callable[[Config], float]
) -> tuple[Config, float]:
    """Time every option, store the fastest under ``name``, return it with its time.

    An option that does not fit the GPU (shared memory, registers) is passed over.

    Raises:
        RuntimeError: No option ran.
    """
    best: tuple[float, Config] | None = None
    for option in options:
        try:
            took = milliseconds(option)
        except (RuntimeError, triton.runtime.errors.OutOfResources, triton.CompilationError):
            continue
        if best is None or took < best[0]:
            best = (took, option)
    if best is None:
        raise RuntimeError(f"no configuration of {name} runs on {gpu}")
    tables.write(BACKEND, gpu, {name: asdict(best[1])})
    _table.cache_clear()
    return best[1], best[0]
