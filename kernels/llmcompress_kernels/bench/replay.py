"""How a GPU candidate is timed: graph replay, weights rotated through the caches, medians; the rate of memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from llmcompress_kernels.cuda import library

# weights of all rotations together, in sizes of the L2 cache
CACHES = 4
SAMPLES = 50


@dataclass(frozen=True)
class Timed:
    """Microseconds of one call.

    Attributes:
        median: Over the samples.
        low: Fastest sample.
        high: Slowest sample.
    """

    median: float
    low: float
    high: float


def l2_bytes() -> int:
    """Size of the L2 cache."""
    return int(torch.cuda.get_device_properties(0).L2_cache_size)


def rotations(weight_bytes: int, most: int = 64) -> int:
    """Copies of the weights that together exceed the caches."""
    return max(1, min(most, -(-CACHES * l2_bytes() // weight_bytes)))


def copy_rate(size: int = 1 << 30) -> float:
    """Bytes per second, read and written, of a device-to-device copy."""
    source, target = (
        torch.empty(size, dtype=torch.uint8, device="cuda"),
        torch.empty(size, dtype=torch.uint8, device="cuda"),
    )
    took = replay({"copy": [lambda: target.copy_(source)]})["copy"].median
    return 2 * size / took * 1e6


def read_rate(size: int = 1 << 30) -> float:
    """Bytes per second of the faster of two ways to read memory: a sum; a bfloat16 matrix times a vector."""
    columns = 8192
    wide = torch.zeros(size // 2 // columns, columns, dtype=torch.bfloat16, device="cuda").normal_()
    vector, numbers = wide[0].clone(), wide.view(torch.float32)
    times = replay({"sum": [numbers.sum], "product": [lambda: torch.mv(wide, vector)]})
    return size / min(each.median for each in times.values()) * 1e6


def replay(candidates: Mapping[str, Sequence[Callable[[], object]]], samples: int = SAMPLES) -> dict[str, Timed]:
    """Time candidates against each other.

    Args:
        candidates: Name → one callable per rotation; a graph runs them all, its time is divided by their number.
        samples: Replays per candidate; the candidates take turns.

    Returns:
        Name → microseconds per call.
    """
    with library.graphs_that_end():
        return _replay({name: (_capture(calls), len(calls)) for name, calls in candidates.items()}, samples)


def _replay(graphs: Mapping[str, tuple[torch.cuda.CUDAGraph, int]], samples: int) -> dict[str, Timed]:
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for _ in range(samples):
        for name, (graph, calls) in graphs.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            found[name].append(begin.elapsed_time(end) * 1e3 / calls)
    return {name: Timed(statistics.median(each), min(each), max(each)) for name, each in found.items()}


def _capture(calls: Sequence[Callable[[], object]]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    torch.cuda.synchronize()
    return graph
