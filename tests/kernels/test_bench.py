"""The protocol of timing: turns, samples that lost their core, rotation of weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from llmcompress_kernels.bench import timing


def test_candidates_take_turns() -> None:
    order: list[str] = []
    candidates = {name: (lambda name=name: order.append(name)) for name in "ab"}
    timing.interleave(candidates, rounds=3, budget=5.0, warm=1)
    turns = [name for at, name in enumerate(order) if at == 0 or order[at - 1] != name]
    assert turns == ["a", "b"] * (len(turns) // 2)
    assert len(turns) >= 8


def test_samples_that_lost_their_core_are_taken_again(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter([0, 1] * 20 + [40] * 1000)
    monkeypatch.setattr(timing.resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=next(switches)))
    found = timing.interleave({"a": lambda: None}, rounds=4, budget=5.0, warm=0)["a"]
    assert found.clean == 4
    assert found.total == 24


def test_a_candidate_without_clean_samples_gets_more_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(float(i) for i in range(10000))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock))
    switches = iter([0, 1] * 30 + [2] * 1000)
    monkeypatch.setattr(timing.resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=next(switches)))
    # a sample takes two ticks and the check of the time one: the budget is over before the first clean one
    found = timing.interleave({"a": lambda: None}, rounds=5, budget=60.0, warm=0)["a"]
    assert 1 <= found.clean <= 3
    assert found.total > 20


def test_when_no_sample_is_clean_all_count(monkeypatch: pytest.MonkeyPatch) -> None:
    switches = iter(range(100000))
    monkeypatch.setattr(timing.resource, "getrusage", lambda _: SimpleNamespace(ru_nivcsw=next(switches)))
    found = timing.interleave({"a": lambda: None}, rounds=2, budget=0.01, warm=0)["a"]
    assert found.clean == 0
    assert found.total > 0
    assert found.median > 0


def test_rotation_gives_every_call_another_copy() -> None:
    made = torch.zeros(1024)
    seen = set()
    rotation = timing.Rotation(lambda t: seen.add(t.data_ptr()), lambda: (made,), made.nbytes, cold=4 * made.nbytes)
    for _ in range(8):
        rotation()
    assert len(seen) == 4
