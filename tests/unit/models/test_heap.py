"""What the C library is told about its heap, and that it does so."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from llmcompress.models import heap
from llmcompress.models.heap import MIB, give_back_memory


def test_freed_memory_is_kept_where_the_c_library_can(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self) -> None:
            self.calls: list[tuple[int, int]] = []

        def mallopt(self, what: int, value: int) -> int:
            self.calls.append((what, value))
            return 1

    monkeypatch.setenv("THP_MEM_ALLOC_ENABLE", "0")  # set by whoever started the process: stays
    library = Library()
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _name: library)
    assert heap.keep_freed_memory()
    # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
    assert library.calls == [(-3, 8 << 20), (-1, 32 << 20)]
    library.calls.clear()
    assert heap.keep_freed_memory(sparing=True)
    with heap.whole_models(sparing=True):
        assert library.calls == [(-3, 1 << 20), (-1, 32 << 20), (-3, 1 << 20)]
    assert library.calls[3:] == [(-3, 1 << 20), (-1, 32 << 20)]
    assert os.environ["THP_MEM_ALLOC_ENABLE"] == "0"
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _name: object())
    assert not heap.keep_freed_memory()


HUGE = """
import sys
from pathlib import Path
from llmcompress.models.heap import keep_freed_memory
keep_freed_memory(sparing="sparing" in sys.argv)
import torch
held = torch.zeros(64 << 20, dtype=torch.uint8)
print(sum(int(line.split()[1]) for line in Path("/proc/self/smaps").read_text().splitlines() if "AnonHuge" in line))
"""


def test_a_budget_asks_for_huge_pages() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[madvise]" not in enabled.read_text():
        pytest.skip("the kernel gives huge pages to all or to none")
    # a run within this process may have asked for them already
    plain = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"}
    sizes = []
    for words in ([], ["sparing"]):
        command = [sys.executable, "-c", HUGE, *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
        sizes.append(int(done.stdout))
    assert sizes[0] < 16 << 10 and sizes[1] > 48 << 10  # KiB


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
import psutil
from llmcompress.models.heap import MIB, keep_freed_memory, whole_models

def returned(guard):
    held = [bytearray(4 * MIB) for _ in range(50)]
    held.append(bytearray(guard))  # above them in the heap
    full = psutil.Process().memory_info().rss
    del held[:50]
    return (full - psutil.Process().memory_info().rss) // MIB

mapped = keep_freed_memory()
with whole_models():
    within = returned(MIB // 2)
print(int(mapped), within, returned(MIB))  # larger than the hole that the first guard left
"""


def test_large_blocks_go_back_at_once() -> None:
    """Within ``whole_models``, without a trim, and although a block above them is in use; afterwards they are kept."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True)
    mapped, within, afterwards = map(int, done.stdout.split())
    if not mapped:
        pytest.skip("not glibc")
    assert within >= 190
    assert afterwards < 10
