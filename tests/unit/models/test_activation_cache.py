from __future__ import annotations

import errno
import gc
import os
from pathlib import Path

import pytest
import torch

from llmcompress.errors import ResourceError
from llmcompress.models.activation_cache import ActivationCache

MIB = 1 << 20


def resident() -> int:
    """Resident bytes of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE")


def test_without_limit_everything_is_on_the_heap(tmp_path: Path) -> None:
    cache = ActivationCache(None, tmp_path / "spill")
    cache.empty((1000, 1000), torch.float32)
    assert cache.spilled == 0
    assert not (tmp_path / "spill").exists()


def test_what_exceeds_the_limit_lies_in_nameless_files(tmp_path: Path) -> None:
    cache = ActivationCache(3000, tmp_path / "spill")
    first = cache.empty((500,), torch.float32)
    second = cache.empty((500,), torch.float32)
    assert cache.spilled == 2000
    assert not list((tmp_path / "spill").iterdir())
    del first
    gc.collect()
    third = cache.empty((500,), torch.float32)
    assert cache.spilled == 2000
    assert second.shape == third.shape


def test_dropped_pages_leave_memory_and_keep_their_values(tmp_path: Path) -> None:
    cache = ActivationCache(0, tmp_path)
    tensor = cache.empty((64, MIB), torch.uint8)
    before = resident()
    for row in range(64):
        tensor[row] = row
    filled = resident() - before
    assert filled > 50 * MIB
    cache.drop(tensor)
    assert resident() - before < 8 * MIB
    assert [int(tensor[row].max()) for row in range(64)] == list(range(64))
    cache.drop(tensor)
    other = cache.copy(tensor)
    assert resident() - before < 8 * MIB
    assert torch.equal(other[63], tensor[63])


def test_a_tensor_on_the_heap_is_never_dropped(tmp_path: Path) -> None:
    cache = ActivationCache(10 * MIB, tmp_path)
    heap = cache.empty((MIB,), torch.uint8).fill_(7)
    cache.empty((20 * MIB,), torch.uint8)
    cache.drop(heap)
    assert int(heap.min()) == 7


def test_a_full_disk_is_said_before_anything_is_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"no room for .* of activations"):
        ActivationCache(0, tmp_path).empty((MIB,), torch.uint8)
    assert not list(tmp_path.iterdir())


def test_where_disk_cannot_be_reserved_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    cache = ActivationCache(0, tmp_path)
    held = cache.empty((1000,), torch.float32)
    held.fill_(3.0)
    assert cache.spilled == 4000
    assert float(held.sum()) == 3000.0
    room = os.statvfs(tmp_path)
    with pytest.raises(ResourceError, match="no room"):
        cache.empty((room.f_bavail * room.f_frsize,), torch.float32)
