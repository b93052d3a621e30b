"""The protocol of timing: turns, samples that lost their core, rotation of weights."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from llmcompress_kernels import cpu
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


@pytest.mark.skipif(not cpu.ready(), reason="no native kernels")
def test_byte_products_of_all_threads_and_turns_are_counted() -> None:
    rate = timing.byte_product_rate(1, rounds=1, budget=0.1)
    if not cpu.runs("avx2"):
        assert rate is None
        return
    assert rate is not None
    assert rate > 1e9
    run = cpu.library().llmcompress_byte_products
    # 16 instructions of 64 products, or 12 of 32, each a multiplication and an addition
    assert run(1, 1000) in (1000 * 16 * 64 * 2, 1000 * 12 * 32 * 2)
    assert run(2, 3000) == 6 * run(1, 1000)
