"""How many processors this process may keep busy: those it may run on, and no more than a container's quota pays for.

A group of Linux (cgroup) gives its processes so much of a processor's time a period. With more threads than that all
stand still for the rest of it, and those that wait by spinning have used up what the others needed.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
from collections.abc import Callable
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")
GROUPS = Path("/proc/self/cgroup")
# by these OpenMP binds every thread to a place, the first already when torch is imported: what a thread may run on then
# says nothing of the process
BINDING = ("OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY", "KMP_AFFINITY")


def count() -> int:
    """At least 1. A part of a processor counts as one: so many threads use up what there is."""
    bound = any(os.environ.get(name, "false").lower() != "false" for name in BINDING)
    asks = hasattr(os, "sched_getaffinity") and not bound
    able = len(os.sched_getaffinity(0)) if asks else os.cpu_count() or 1
    allowed = quota()
    return able if math.isinf(allowed) else max(1, min(able, math.ceil(allowed)))


@functools.cache
def quota() -> float:
    """Processors that the groups of this process allow, the least of them and those above; infinite without a limit.

    Read once: it is asked for every token.
    """
    try:
        lines = [os.fsdecode(line) for line in GROUPS.read_bytes().splitlines()]  # names need not be text
    except OSError:
        return math.inf
    found = math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            found = min(found, _least(ROOT, path, _second))
        elif "cpu" in controllers.split(","):
            found = min(found, _least(ROOT / "cpu", path, _first))
    return found


def _least(root: Path, path: str, limit: Callable[[Path], float]) -> float:
    """The least limit of a group and of those above it; within a container the root is often the group itself."""
    found = math.inf
    group = root / path.lstrip("/")
    for place in (group, *group.parents):
        # no limit here, or a name of outside this container
        with contextlib.suppress(OSError, ValueError):
            found = min(found, limit(place))
        if place == root:
            break
    return found


def _second(group: Path) -> float:
    allowed, period = (group / "cpu.max").read_text().split()
    return math.inf if allowed == "max" else int(allowed) / int(period)


def _first(group: Path) -> float:
    allowed = int((group / "cpu.cfs_quota_us").read_text())
    return math.inf if allowed <= 0 else allowed / int((group / "cpu.cfs_period_us").read_text())
