from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from llmcompress.models import memory_limits
from llmcompress.models.memory_limits import DEFAULT, GIB, MIB, Limits, choose, total_ram


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


def test_experts_are_solved_in_chunks_that_fit() -> None:
    one = (64**2 + 32**2) * 4
    assert Limits(gram=3 * one).chunks(8, 64, 32) == [slice(0, 3), slice(3, 6), slice(6, 8)]
    # one at least, and never more than there are
    assert Limits(gram=1).chunks(2, 64, 32) == [slice(0, 1), slice(1, 2)]
    assert Limits(gram=100 * one).chunks(2, 64, 32) == [slice(0, 2)]


@pytest.mark.parametrize(("text", "expected"), [("max", 8 * GIB), (str(2 * GIB), 2 * GIB), (str(64 * GIB), 8 * GIB)])
def test_a_control_group_lowers_the_machines_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, expected: int
) -> None:
    (tmp_path / "memory.max").write_text(f"{text}\n")
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=8 * GIB))
    monkeypatch.setattr(memory_limits, "Path", lambda name: tmp_path / Path(name).name)
    assert total_ram() == expected
