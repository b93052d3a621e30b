"""Device and dtype policy, threads, seeds, memory readings. The only place that asks about CUDA.

Readings come from ``/proc`` where it exists: ``VmHWM`` is the peak resident memory of the process,
and writing ``5`` to ``clear_refs`` starts a new peak, so that every stage gets a figure of its own.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress.errors import EnvironmentProblem

MIB = 1 << 20
# resident memory of a process that has imported torch, transformers and one of its model files and has run one
# matrix product (475 MiB), and what every stage adds whatever its model: freed memory that the allocator keeps (32 MiB
# at the heap's end and the holes before it), generated code of oneDNN, kernels of our own. Measured with torch 2.13 for
# CPU and transformers 5.23 on x86-64 Linux
BASELINE_RAM = (475 + 65) * MIB
# a CUDA build maps more code and the driver keeps host memory per context; a round figure from experience, not measured
BASELINE_RAM_CUDA = 2400 * MIB
# CUDA context, cuBLAS handles and workspace; likewise
BASELINE_VRAM = 650 * MIB

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


def usable_cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def baseline_ram(device: str) -> int:
    """Bytes of a process that has loaded its libraries and no model."""
    return BASELINE_RAM_CUDA if device == "cuda" else BASELINE_RAM


def ram_budget(recipe: Mapping[str, Any]) -> int | None:
    """``host.ram`` of a resolved recipe, bytes; None where it sets none."""
    return (recipe.get("host") or {}).get("ram")


def ram_above_baseline(budget: int | None, device: str) -> int | None:
    """What a stage may use of a budget of main memory; None where there is none."""
    return None if budget is None else max(0, budget - baseline_ram(device))


def cuda_available() -> bool:
    """Whether torch sees a CUDA device."""
    import torch

    return torch.cuda.is_available()


def resolve_device(name: str) -> str:
    """Turn ``auto``, ``cpu`` or ``cuda`` into ``cpu`` or ``cuda``.

    Raises:
        EnvironmentProblem: CUDA was asked for and is not there.
    """
    if name == "cpu":
        return "cpu"
    available = cuda_available()
    if name == "cuda" and not available:
        raise EnvironmentProblem("run.device is cuda, but torch sees no CUDA device", "run.device=cpu")
    return "cuda" if available else "cpu"


def resolve_dtype(name: str, device: str) -> str:
    """Compute dtype name; ``auto`` is float32 on the CPU and bfloat16 on CUDA."""
    if name != "auto":
        return name
    return "bfloat16" if device == "cuda" else "float32"


def set_threads(count: int | None) -> int:
    """Set torch's intra-op threads; None keeps its default (which honours ``OMP_NUM_THREADS``).

    Returns:
        The number in force. Sums depend on it, so a resumed run uses the number it began with.
    """
    import torch

    if count is not None and count != torch.get_num_threads():
        torch.set_num_threads(count)
    return torch.get_num_threads()


def make_deterministic() -> None:
    """Ask torch for deterministic algorithms; an operation that has none warns instead of failing."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    # torch.use_deterministic_algorithms would also set it for the compiler, and imports that first: a second of CPU
    torch.set_deterministic_debug_mode("warn")
    # cuDNN's attention, which torch prefers on recent GPUs, is built anew for each shape, and batches differ in theirs
    torch.backends.cuda.enable_cudnn_sdp(False)
    # filling every torch.empty with NaN costs time and changes no result
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def stage_seed(seed: int, name: str) -> int:
    """Seed of one stage: 31 bits of SHA-256 over the run's seed and the stage's name.

    Adding or removing a stage leaves the random numbers of the others alone.
    """
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:4], "little") & 0x7FFF_FFFF


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices)."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def current_rss() -> int:
    """Resident memory of this process now, in bytes."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """Peak resident memory in bytes, since the last successful :func:`reset_peaks` or process start."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def reset_peaks() -> bool:
    """Start new peaks of RSS and, where CUDA is in use, of device memory.

    Returns:
        Whether the RSS peak could be reset; if not, :func:`peak_rss` covers the whole process.
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def peak_vram() -> int:
    """Peak CUDA memory allocated by torch in bytes, 0 without CUDA."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return 0
    return int(torch.cuda.max_memory_allocated())


def describe_gpus() -> list[dict[str, object]]:
    """Name and memory in bytes of each CUDA device torch sees."""
    import torch

    if not torch.cuda.is_available():
        return []
    found: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        found.append({"name": properties.name, "bytes": properties.total_memory, "capability": capability})
    return found
