from __future__ import annotations

from llmcompress.models.memory_limits import DEFAULT, GIB, MIB, Limits, choose


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
