"""The scheduler with batches made of paper: order, room, failures, cancelling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.inference.generate import Sampling
from llmcompress.serving.limits import Limits
from llmcompress.serving.metrics import Metrics
from llmcompress.serving.scheduler import FAILED, STOPPED, Busy, Group, Job, Piece, Scheduler
from llmcompress.serving.text import TextStream


class Paper:
    """Writes the token after the last one, up to 200; token 9 breaks it, 10 is followed by no number, a gate may hold
    its steps. Prompts are read in parts; what is read and written is in the record.
    """

    kind, longest, limit = "paper", 50, 3

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.most = 0
        self.at: dict[int, int] = {}
        self.record: list[tuple[int, ...]] = []
        self.watch: Callable[[tuple[int, ...]], None] = lambda part: None
        self.gate = threading.Event()
        self.gate.set()

    def _logits(self, token: int) -> Tensor:
        if token == 9:
            raise RuntimeError("broken")
        if token == 10:
            return torch.full((200,), torch.nan)
        return torch.nn.functional.one_hot(torch.tensor((token + 1) % 200), 200).float()

    def join(
        self, key: int, prompt: Sequence[int], member: str | None, total: int, most: int | None = None
    ) -> Tensor | None:
        start = self.at.setdefault(key, 0)
        self.at[key] = min(len(prompt), start + (most or len(prompt)))
        self.record.append(tuple(prompt[start : self.at[key]]))
        self.watch(self.record[-1])
        logits = self._logits(self.record[-1][-1])
        if self.at[key] < len(prompt):
            return None
        self.held[key] = total
        self.most = max(self.most, len(self.held))
        return logits

    def reused(self, key: int) -> int:
        return 0

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        self.gate.wait(10)
        self.record.append(())
        assert set(tokens) == set(self.held)
        return {key: self._logits(token) for key, token in tokens.items()}

    def leave(self, key: int) -> None:
        self.held.pop(key, None)
        self.at.pop(key, None)

    def held_bytes(self) -> int:
        return len(self.held)


class Bench:
    def __init__(self, words: Any, **limits: Any) -> None:
        self.words, self.rows = words, Paper()
        self.scheduler = Scheduler([Group(self.rows, {"m": None})], Limits(**limits), Metrics())
        self.pieces: dict[int, list[Piece]] = {}

    def job(self, start: int, count: int = 5, stop: tuple[int, ...] = (), prompt: Sequence[int] = ()) -> Job:
        number = len(self.pieces)
        self.pieces[number] = []
        return Job(
            "m",
            list(prompt or [start]),
            Sampling(count),
            stop,
            TextStream(self.words),
            self.pieces[number].append,
            logprobs=0,
        )

    def held_up(self, count: int) -> None:
        """One answer of so many tokens begins, and its steps wait at the gate."""
        self.rows.gate.clear()
        self.scheduler.submit([self.job(20, count=count)])
        while not self.pieces[0]:
            time.sleep(0.01)

    def ended(self, number: int) -> Piece:
        for _ in range(500):
            last = self.pieces[number][-1:]
            if last and (last[0].reason is not None or last[0].error is not None):
                return last[0]
            time.sleep(0.01)
        raise AssertionError("never ended")

    def tokens(self, number: int) -> list[int]:
        return [choice.token for piece in self.pieces[number] for choice in piece.choices]


@pytest.fixture
def bench(tiny_tokenizer: Any, request: pytest.FixtureRequest) -> Any:
    made = Bench(tiny_tokenizer, **getattr(request, "param", {}))
    yield made
    made.rows.gate.set()
    made.scheduler.stop()


def test_each_gets_its_tokens_and_no_more_than_fit_run(bench: Bench) -> None:
    bench.scheduler.submit([bench.job(20 + 10 * i, count=3 + i) for i in range(6)])
    for i in range(6):
        assert bench.ended(i).reason == "length"
        assert bench.tokens(i) == [21 + 10 * i + k for k in range(3 + i)]
    assert bench.rows.most == 3
    assert bench.rows.held == {}


def test_a_stop_token_ends_and_is_not_reported(bench: Bench) -> None:
    bench.scheduler.submit([bench.job(20, count=30, stop=(24,))])
    assert bench.ended(0).reason == "stop"
    assert bench.tokens(0) == [21, 22, 23]


@pytest.mark.parametrize("bench", [{"cache_tokens": 12}], indirect=True)
def test_answers_wait_for_room_in_the_cache(bench: Bench) -> None:
    bench.scheduler.submit([bench.job(20 + i, count=6) for i in range(4)])
    assert [bench.ended(i).reason for i in range(4)] == ["length"] * 4
    assert bench.rows.most == 1


@pytest.mark.parametrize("bench", [{"queue": 2}], indirect=True)
def test_a_full_queue_takes_all_of_a_request_or_nothing(bench: Bench) -> None:
    bench.held_up(8)
    with pytest.raises(Busy, match="too many"):
        bench.scheduler.submit([bench.job(30 + i) for i in range(3)])
    bench.scheduler.submit([bench.job(40), bench.job(50)])
    bench.rows.gate.set()
    assert [bench.ended(i).reason for i in (0, 4, 5)] == ["length"] * 3
    assert bench.pieces[1] == bench.pieces[2] == []


def test_one_that_nobody_reads_any_more_leaves(bench: Bench) -> None:
    long, other = bench.job(20, count=40), bench.job(30, count=40)
    bench.rows.gate.clear()
    bench.scheduler.submit([long, other])
    bench.scheduler.cancel([long])
    bench.rows.gate.set()
    assert bench.ended(1).reason == "length"
    assert bench.rows.held == {}
    assert len(bench.tokens(0)) < 40


def test_what_breaks_a_batch_ends_its_answers_and_the_next_ones_work(bench: Bench) -> None:
    bench.scheduler.submit([bench.job(5, count=20), bench.job(9)])
    assert bench.ended(0).error == FAILED
    assert bench.ended(1).error == FAILED
    bench.scheduler.submit([bench.job(20)])
    assert bench.ended(2).reason == "length"
    assert bench.scheduler.alive


def test_a_sequence_of_which_no_token_can_be_drawn_ends_alone(bench: Bench) -> None:
    bad, good = bench.job(10), bench.job(20, count=8)
    bad.how = Sampling(5, temperature=1.0)
    bench.scheduler.submit([bad, good])
    assert bench.ended(0).error == FAILED
    assert bench.ended(1).reason == "length"
    assert bench.tokens(1) == list(range(21, 29))
    assert bench.scheduler.alive and not bench.rows.held


@pytest.mark.parametrize("bench", [{"prompt_chunk": 8}], indirect=True)
def test_long_prompts_are_read_between_the_steps_of_others(bench: Bench) -> None:
    bench.held_up(10)
    # the last two are short and go together
    long = list(range(30, 50))
    bench.scheduler.submit([bench.job(0, prompt=long, count=4), bench.job(60, count=4), bench.job(70, count=2)])
    bench.rows.gate.set()
    assert [bench.ended(i).reason for i in range(4)] == ["length"] * 4
    record = bench.rows.record
    assert record[: 1 + record.index((60,))] == [
        (20,), (), tuple(long[:8]), (), tuple(long[8:16]), (), tuple(long[16:]), (), (60,),
    ]  # fmt: skip
    assert bench.tokens(1) == [50, 51, 52, 53]
    assert bench.tokens(0) == list(range(21, 31))


@pytest.mark.parametrize("bench", [{"prompt_chunk": 8}], indirect=True)
def test_a_prompt_that_fails_or_is_cancelled_half_way_leaves(bench: Bench) -> None:
    bench.held_up(30)
    broken, given_up = bench.job(0, prompt=[*range(100, 115), 9, 11]), bench.job(0, prompt=range(30, 49))
    bench.scheduler.submit([broken, given_up, bench.job(60, count=2)])
    bench.rows.watch = lambda part: bench.scheduler.cancel([given_up] if part[0] == 30 else [])
    bench.rows.gate.set()
    assert bench.ended(1).error == FAILED
    assert bench.ended(3).reason == bench.ended(0).reason == "length"
    bench.scheduler.stop()
    assert bench.pieces[2] == []
    assert [part for part in bench.rows.record if 30 in part or 38 in part] == [tuple(range(30, 38))]
    assert bench.rows.held == bench.rows.at == {}


def test_draining_takes_nothing_new_and_stopping_ends_the_rest(tiny_tokenizer: Any) -> None:
    bench = Bench(tiny_tokenizer)
    bench.rows.gate.clear()
    bench.scheduler.submit([bench.job(20, count=40)])
    bench.scheduler.drain()
    with pytest.raises(Busy, match="shutting down"):
        bench.scheduler.submit([bench.job(30)])
    threading.Timer(0.1, bench.rows.gate.set).start()
    bench.scheduler.stop()
    assert bench.ended(0).error == STOPPED or bench.ended(0).reason == "length"
    assert not bench.scheduler.alive
