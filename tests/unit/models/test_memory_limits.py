from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from llmcompress.models.memory_limits import DEFAULT, GIB, MIB, Limits, choose, give_back_memory


def need(limits: Limits) -> int:
    """A stage that takes whatever it is given, and 100 MiB."""
    activations = 4 * GIB if limits.activations is None else min(4 * GIB, limits.activations)
    return 100 * MIB + limits.gram + limits.keep + activations


def test_no_budget_no_limit() -> None:
    assert choose(None, need, 4 * GIB) == DEFAULT


def test_an_ample_budget_changes_nothing() -> None:
    assert choose(100 * GIB, need, 4 * GIB) == DEFAULT


def test_computing_twice_comes_before_the_disk() -> None:
    found = choose(5 * GIB, need, 4 * GIB)
    assert found.activations is None
    assert found.gram < GIB
    assert need(found) <= 0.9 * 5 * GIB
    assert need(Limits(2 * found.gram, 2 * found.keep)) > 0.9 * 5 * GIB


def test_then_activations_go_to_the_disk_in_parts() -> None:
    found = choose(3 * GIB, need, 4 * GIB)
    assert found.activations == 2 * GIB
    assert choose(MIB, need, 4 * GIB) == Limits(16 * MIB, 16 * MIB, 0)


def test_freed_pages_go_back() -> None:
    """What lies below a block that is still in use stays with the process until it is asked for."""

    def resident() -> int:
        return psutil.Process().memory_info().rss

    held = [bytes(range(256)) * 400 for _ in range(2000)]
    last = bytes(range(256)) * 400
    full = resident()
    held.clear()
    if not give_back_memory():
        pytest.skip("not glibc")
    assert full - resident() > 100 * MIB
    assert last[255] == 255


PROBE = """
import subprocess
import sys

import psutil
from llmcompress.models.memory_limits import MIB, map_large_blocks
mapped = map_large_blocks()
bytearray(20 * MIB)  # freed once: glibc would now keep blocks up to this size in the heap
held = [bytearray(4 * MIB) for _ in range(50)]
held.append(bytearray(MIB // 2))  # above them in the heap
full = psutil.Process().memory_info().rss
del held[:50]
print(int(mapped), (full - psutil.Process().memory_info().rss) // MIB)
"""


def test_large_blocks_go_back_at_once() -> None:
    """Without a trim, and although a block above them is in use."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    mapped, returned = map(int, done.stdout.split())
    if not mapped:
        pytest.skip("not glibc")
    assert returned >= 190
