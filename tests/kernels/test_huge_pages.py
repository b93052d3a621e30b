"""Which tensors ask for huge pages, and that the system gives them."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest
import torch
from llmcompress_kernels import pages
from llmcompress_kernels.reference.group_gemm import interleave


def test_whole_pages_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, int, int]] = []

    def advise(address: object, length: object, advice: object) -> int:
        asked.append((address.value, length.value, advice.value))  # type: ignore[attr-defined]
        return 0

    monkeypatch.setattr(pages, "_madvise", lambda: advise)
    pages.empty((pages.HUGE // 4 - 1,), torch.int32, torch.device("cpu"))
    assert not asked
    held = pages.empty((3, pages.HUGE // 4), torch.int32, torch.device("cpu"))
    assert held.shape == (3, pages.HUGE // 4) and held.dtype == torch.int32
    ((address, length, _),) = asked
    assert address % mmap.PAGESIZE == length % mmap.PAGESIZE == 0
    assert 0 <= held.data_ptr() - address < mmap.PAGESIZE
    assert 0 <= address + length - (held.data_ptr() + held.nbytes) < mmap.PAGESIZE


def test_without_the_call_tensors_are_as_usual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pages, "_madvise", lambda: None)
    assert pages.empty((2, pages.HUGE), torch.uint8, torch.device("cpu")).nbytes == 2 * pages.HUGE


def test_interleaved_weights_lie_in_huge_pages() -> None:
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not enabled.exists() or "[madvise]" not in enabled.read_text():
        pytest.skip("the kernel gives huge pages to all or to none")
    rows = torch.arange(32 << 20, dtype=torch.uint8).view(512, -1)
    turned = interleave(rows)
    assert _huge_kib(turned) > 24 << 10 and _huge_kib(rows) < 4 << 10


def _huge_kib(tensor: torch.Tensor) -> int:
    """KiB in huge pages of the mappings in which a tensor lies."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
    inside, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first:
            low, high = (int(edge, 16) for edge in first.split("-"))
            inside = low < end and high > begin
        elif inside and first == "AnonHugePages:":
            found += int(line.split()[1])
    return found
