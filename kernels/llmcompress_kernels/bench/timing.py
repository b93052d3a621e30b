"""Timing on a machine that others use too.

One sample of every candidate per round, so that drift meets all alike; a sample during which the
process lost its core (``ru_nivcsw``) is dropped; weights rotate through more memory than the caches hold.
``chrt -f 10 COMMAND`` keeps other programs away for runs of seconds, where that is allowed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmcompress_kernels import cpu

COLD_BYTES = 256 << 20
MOST_COPIES = 128
PROBE_BYTES = 512 << 20
PROBE = "read memory"
SAMPLE_SECONDS = 5e-4
# clean samples below which a candidate is measured again
FEW = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """What was measured of one candidate.

    Attributes:
        median: Seconds per call, of the clean samples.
        best: Seconds of the fastest one.
        clean: Samples that count.
        total: Samples taken. When none is clean, all count.
    """

    median: float
    best: float
    clean: int
    total: int


class Rotation:
    """Calls ``function`` with the next item each time; the items together exceed the caches.

    Args:
        function: Takes an item.
        make: Makes one item, a tuple of tensors and other values.
        size: Bytes that a call reads of an item.
        cold: Bytes that the items shall hold together.
        bind: What an item becomes before it is handed to ``function``, such as an object that holds it.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        make: Callable[[], tuple[Any, ...]],
        size: int,
        cold: int = COLD_BYTES,
        bind: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        first = make()
        count = max(1, min(MOST_COPIES, -(-cold // max(1, size))))
        copies = [tuple(t.clone() if isinstance(t, torch.Tensor) else t for t in first) for _ in range(count - 1)]
        self.items = [first, *copies] if bind is None else [bind(*item) for item in (first, *copies)]
        self.function = function
        self.next = 0

    def __call__(self) -> Any:
        """One call."""
        self.next = (self.next + 1) % len(self.items)
        return self.function(*self.items[self.next])


def interleave(
    candidates: Mapping[str, Callable[[], Any]], rounds: int = 15, budget: float = 20.0, warm: int = 2
) -> dict[str, Timing]:
    """Time all candidates in turn until each has ``rounds`` clean samples or ``budget`` seconds are over.

    A candidate with fewer than three clean samples by then gets up to ``budget`` seconds more.

    A sample is as many calls in a row as take half a millisecond, after one that does not count, so that neither the
    clock nor what the candidate before left in the core decides; :class:`Rotation` gives each call other weights.
    """
    calls = {}
    for name, function in candidates.items():
        taken = []
        for _ in range(warm + 1):
            began = time.perf_counter()
            function()
            taken.append(time.perf_counter() - began)
        calls[name] = max(1, int(SAMPLE_SECONDS / taken[-1]))
    good: dict[str, list[float]] = {name: [] for name in candidates}
    bad: dict[str, list[float]] = {name: [] for name in candidates}

    def sample(name: str) -> None:
        function = candidates[name]
        function()
        lost = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
        began = time.perf_counter()
        for _ in range(calls[name]):
            function()
        seconds = (time.perf_counter() - began) / calls[name]
        clean = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw == lost
        (good if clean else bad)[name].append(seconds)

    end = time.perf_counter() + budget
    while time.perf_counter() < end and any(len(samples) < rounds for samples in good.values()):
        for name in candidates:
            sample(name)
    # what lost its core in nearly every sample gets as much time again
    end = time.perf_counter() + budget
    while left := [name for name in candidates if len(good[name]) < min(FEW, rounds)]:
        if time.perf_counter() >= end:
            break
        for name in left:
            sample(name)
    found = {}
    for name in candidates:
        everything = good[name] + bad[name]
        used = good[name] or everything
        found[name] = Timing(statistics.median(used), min(everything), len(good[name]), len(everything))
    return found


def bandwidth_probes(threads: int) -> dict[str, Callable[[], Any]]:
    """Ways to read :data:`PROBE_BYTES` of memory on ``threads`` threads, to be timed among the candidates.

    Raises:
        BuildError: The native kernels are not available.
    """
    read = cpu.library().llmcompress_read
    read.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int, ctypes.c_int64]
    read.restype = ctypes.c_uint64
    memory = torch.ones(PROBE_BYTES // 8, dtype=torch.int64)

    def probe(streams: int, ahead: int) -> Callable[[], Any]:
        return lambda: read(memory.data_ptr(), PROBE_BYTES, threads, streams, ahead)

    # one or several places at a time, without and with prefetching: machines differ in which is fastest
    return {f"{PROBE} {streams} {ahead}": probe(streams, ahead) for streams in (1, 4) for ahead in (0, 4096)}


def read_bandwidth(timings: Mapping[str, Timing]) -> float:
    """Bytes per second of the faster probe among ``timings``."""
    return PROBE_BYTES / min(timing.median for name, timing in timings.items() if name.startswith(PROBE))


def byte_product_rate(threads: int, rounds: int = 7, budget: float = 5.0) -> float | None:
    """Byte multiplications and additions per second from registers, or None where the CPU has neither VNNI nor AVX2.

    What no product of codes with bytes can exceed; products with exact 16-bit activations take two of them each.

    Raises:
        BuildError: The native kernels are not available.
    """
    run = cpu.library().llmcompress_byte_products
    run.argtypes, run.restype = [ctypes.c_int, ctypes.c_int64], ctypes.c_int64
    turns = 200_000
    counted = int(run(threads, turns))
    if counted == 0:
        return None
    return counted / interleave({"peak": lambda: run(threads, turns)}, rounds, budget)["peak"].median


def environment(threads: int) -> dict[str, Any]:
    """Where a benchmark ran, for its result file."""
    name, flags = platform.processor(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass
    wanted: Sequence[str] = ("avx2", "avx512f", "avx512_vnni", "avx512_vbmi2", "avx512_bf16", "amx_int8", "amx_bf16")
    return {
        "cpu": name,
        "flags": [flag for flag in wanted if flag in flags],
        "cores": os.cpu_count(),
        "threads": threads,
        "isa": cpu.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        # macOS does not say
        "real_time": hasattr(os, "sched_getscheduler") and os.sched_getscheduler(0) in (os.SCHED_FIFO, os.SCHED_RR),
    }
