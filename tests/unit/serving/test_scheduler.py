"""The scheduler with batches made of paper: order, room, failures, cancelling."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from llmcompress.inference.generate import Sampling
from llmcompress.inference.grammar import GrammarError
from llmcompress.inference.penalties import Penalties, Tally
from llmcompress.serving import scheduler
from llmcompress.serving.limits import Limits
from llmcompress.serving.metrics import Metrics
from llmcompress.serving.scheduler import FAILED, NEVER, STOPPED, UNFOLLOWED, Busy, Group, Job, Piece, Scheduler
from llmcompress.serving.text import TextStream

# seconds for what takes milliseconds on a machine that does nothing else
PATIENCE = 120.0


def comes(wanted: Callable[[], object]) -> bool:
    """Wait until something holds; whether it came to that."""
    deadline = time.monotonic() + PATIENCE
    while not wanted():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


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
        # a step has come to the gate
        self.stands = threading.Event()
        # tokens of every prompt that are held already
        self.known = 0

    def _logits(self, token: int) -> Tensor:
        if token == 9:
            raise RuntimeError("broken")
        if token == 10:
            return torch.full((200,), torch.nan)
        return torch.nn.functional.one_hot(torch.tensor((token + 1) % 200), 200).float()

    def join(
        self, key: int, prompt: Sequence[int], member: str | None, total: int, most: int | None = None
    ) -> Tensor | None:
        start = self.at.setdefault(key, self.known)
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
        return self.known

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        self.stands.set()
        self.gate.wait(PATIENCE)
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
        assert self.rows.stands.wait(PATIENCE)

    def ended(self, number: int) -> Piece:
        pieces = self.pieces[number]
        assert comes(lambda: pieces and (pieces[-1].reason is not None or pieces[-1].error is not None))
        return pieces[-1]

    def empty(self) -> bool:
        """Whether no sequence keeps its place, which it gives back after its last piece."""
        return comes(lambda: not self.rows.held)

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
    assert bench.empty()


def test_a_stop_token_ends_and_is_not_reported(bench: Bench) -> None:
    bench.scheduler.submit([bench.job(20, count=30, stop=(24,))])
    assert bench.ended(0).reason == "stop"
    assert bench.tokens(0) == [21, 22, 23]


@pytest.mark.parametrize("bench", [{"cache_tokens": 12}], indirect=True)
def test_answers_wait_for_room_in_the_cache(bench: Bench) -> None:
    bench.scheduler.submit([bench.job(20 + i, count=6) for i in range(4)])
    assert [bench.ended(i).reason for i in range(4)] == ["length"] * 4
    assert bench.rows.most == 1


def test_nobody_overtakes_one_that_waits_for_room_in_the_cache(tiny_tokenizer: Any) -> None:
    bench, other = Bench(tiny_tokenizer, cache_tokens=50), Paper()
    bench.scheduler.stop()
    groups = [Group(bench.rows, {"m": None}), Group(other, {"n": None})]
    bench.scheduler = Scheduler(groups, Limits(cache_tokens=50), Metrics())
    begun: list[str] = []
    bench.rows.watch = lambda part: begun.append("m")
    other.watch = lambda part: begun.append("n")
    bench.held_up(20)
    large = bench.job(30, count=40)
    large.model = "n"
    # each of the small ones would fit beside what runs
    bench.scheduler.submit([large, *(bench.job(40 + i, count=20) for i in range(3))])
    bench.rows.gate.set()
    assert [bench.ended(i).reason for i in range(5)] == ["length"] * 5
    assert begun == ["m", "n", "m", "m", "m"]
    bench.scheduler.stop()


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
    assert bench.empty()
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
    assert bench.empty() and bench.scheduler.alive


def test_when_decoding_ends_by_a_fault_nobody_waits_for_ever(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(key: int) -> None:
        raise KeyError(key)

    bench.held_up(3)
    bench.scheduler.submit([bench.job(30 + i, count=9) for i in range(5)])
    monkeypatch.setattr(bench.rows, "leave", broken)
    bench.rows.gate.set()
    # the first has ended, and its place cannot be given back
    assert bench.ended(0).reason == "length"
    assert [bench.ended(i).error for i in range(1, 6)] == [FAILED] * 5
    with pytest.raises(Busy, match="shutting down"):
        bench.scheduler.submit([bench.job(30)])
    bench.scheduler.stop()
    assert not bench.scheduler.alive
    assert sum(piece.error is not None for piece in bench.pieces[1]) == 1


@pytest.mark.parametrize("breaks", ["prompt", "step"])
def test_those_whose_failure_ends_decoding_are_told_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, breaks: str
) -> None:
    def broken(key: int) -> None:
        raise KeyError(key)

    monkeypatch.setattr(bench.rows, "leave", broken)
    # the token after 8 breaks a step, 9 a prompt
    starts = (8, 20) if breaks == "step" else (9,)
    bench.scheduler.submit([bench.job(start, count=30) for start in starts])
    assert [bench.ended(i).error for i in range(len(starts))] == [FAILED] * len(starts)
    bench.scheduler.stop()
    assert all(sum(piece.error is not None for piece in pieces) == 1 for pieces in bench.pieces.values())


def test_a_token_that_ends_an_answer_is_told_after_a_prompt(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval takes what stands before the last token for the prompt."""
    rows = bench.rows
    rows.model = None  # type: ignore[attr-defined]
    monkeypatch.setattr(
        scheduler, "prompt_logits", lambda model, prompt, member: torch.stack([rows._logits(t) for t in prompt])
    )
    plain, echoing = (bench.job(0, stop=(34,), prompt=(31, 32, 33)) for _ in range(2))
    echoing.echo = "text"
    bench.scheduler.submit([plain, echoing])
    assert [bench.ended(i).reason for i in range(2)] == ["stop", "stop"]
    assert (bench.tokens(0), bench.tokens(1)) == ([], [31, 32, 33, 34])
    assert "".join(piece.text for piece in bench.pieces[1]) == "text"


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


@pytest.mark.parametrize("bench", [{"prompt_chunk": 8}], indirect=True)
def test_tokens_that_are_held_already_take_nothing_of_a_chunk(bench: Bench) -> None:
    bench.rows.known = 18
    bench.rows.watch = lambda part: bench.rows.gate.clear()
    # the first sequence is held up in its first step, so that both others wait together
    bench.scheduler.submit([bench.job(0, prompt=range(20, 40), count=3)])
    assert bench.rows.stands.wait(PATIENCE)
    bench.rows.watch = lambda part: None
    bench.scheduler.submit([bench.job(0, prompt=range(n, n + 20), count=2) for n in (50, 80)])
    bench.rows.gate.set()
    assert [bench.ended(i).reason for i in range(3)] == ["length"] * 3
    assert bench.rows.record[:4] == [(38, 39), (), (68, 69), (98, 99)]


@pytest.mark.parametrize("bench", [{"cache_tokens": 14}], indirect=True)
def test_what_fits_exactly_runs_together(bench: Bench) -> None:
    assert bench.scheduler.room("m") == 14
    bench.scheduler.submit([bench.job(20 + 10 * i, count=6) for i in range(4)])
    assert [bench.ended(i).reason for i in range(4)] == ["length"] * 4
    assert bench.rows.most == 2


def test_models_of_several_batches_share_the_cache(tiny_tokenizer: Any) -> None:
    bench = Bench(tiny_tokenizer, cache_tokens=60)
    bench.scheduler.stop()
    other = Paper()
    groups = [Group(bench.rows, {"m": None}), Group(other, {"ant": "ant", "bee": "bee"})]
    bench.scheduler = Scheduler(groups, Limits(cache_tokens=60), Metrics())
    assert bench.scheduler.room("ant") == 50
    beside: list[int] = []
    other.watch = lambda part: beside.append(sum(bench.rows.held.values()))
    bench.held_up(40)
    later, small = bench.job(30, count=25), bench.job(60, count=3)
    later.model, small.model = "ant", "m"
    bench.scheduler.submit([later, small])
    bench.rows.gate.set()
    assert [bench.ended(i).reason for i in range(3)] == ["length"] * 3
    # there was no room for 26 tokens beside 41, in whichever batch, and those of 4 waited their turn
    assert beside == [0] and bench.rows.most == other.most == 1
    assert bench.tokens(1) == list(range(31, 56)) and bench.tokens(2) == [61, 62, 63]
    bench.scheduler.stop()


def test_tokens_are_drawn_one_after_the_other_from_the_seed(bench: Bench) -> None:
    bench.rows._logits = lambda token: torch.zeros(200)  # type: ignore[method-assign]
    jobs = [bench.job(20, count=20) for _ in range(3)]
    for job, seed in zip(jobs, (1, 1, 2)):
        job.how = Sampling(20, temperature=1.0, seed=seed)
    bench.scheduler.submit(jobs)
    assert [bench.ended(i).reason for i in range(3)] == ["length"] * 3
    first, again, other = (bench.tokens(i) for i in range(3))
    assert first == again != other and len(set(first)) > 10


def test_probabilities_are_those_of_the_model_before_temperature(bench: Bench) -> None:
    logits = torch.linspace(-3, 3, 200)
    bench.rows._logits = lambda token: logits  # type: ignore[method-assign]
    job = bench.job(20, count=2)
    job.how, job.logprobs = Sampling(2, temperature=0.5), 3
    bench.scheduler.submit([job])
    bench.ended(0)
    logs = logits.log_softmax(-1)
    for choice in [choice for piece in bench.pieces[0] for choice in piece.choices]:
        assert choice.logprob == pytest.approx(float(logs[choice.token]))
        assert choice.top == tuple((token, pytest.approx(float(logs[token]))) for token in (199, 198, 197))


class Leash:
    """A grammar in which a token is followed by the one two further on, up to an end; one may be lost."""

    def __init__(self, start: int, count: int, lost: int = -1) -> None:
        self._next, self._left, self._lost, self.ended = start + 2, count, lost, False

    def restrict(self, logits: Tensor) -> Tensor:
        if self._next == self._lost:
            raise GrammarError("too complex")
        row = torch.full_like(logits, -torch.inf)
        row[self._next] = logits[self._next]
        return row

    def take(self, token: int) -> None:
        assert token == self._next
        self._next, self._left = token + 2, self._left - 1
        self.ended = self._left == 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_grammar_leads_one_answer_and_its_end_ends_that(bench: Bench, temperature: float) -> None:
    led, free, lost = (bench.job(20, count=9) for _ in range(3))
    led.walk, lost.walk = Leash(20, 4), Leash(20, 9, lost=28)  # type: ignore[assignment]
    led.logprobs = 2
    led.how = Sampling(9, temperature=temperature)
    bench.scheduler.submit([led, free, lost])
    assert (bench.ended(0).reason, bench.ended(1).reason) == ("stop", "length")
    assert bench.tokens(0) == [22, 24, 26, 28] and bench.tokens(1) == list(range(21, 30))
    # told among what the grammar allows; what it does not allow, as a number that JSON has
    for choice in [choice for piece in bench.pieces[0] for choice in piece.choices]:
        assert choice.logprob == 0 and [value for _, value in choice.top] == [0, NEVER]
    assert bench.ended(2).error == UNFOLLOWED and bench.tokens(2) == [22, 24, 26]
    assert bench.empty() and bench.scheduler.alive


def test_penalties_change_what_is_chosen_and_not_what_is_told(bench: Bench) -> None:
    logits = torch.linspace(-3, 3, 200)
    bench.rows._logits = lambda token: logits  # type: ignore[method-assign]
    plain, bound, both = (bench.job(20, count=3) for _ in range(3))
    bound.tally = Tally(Penalties(presence=2.0, bias=((150, 3.0),)), bound.prompt, 200)
    both.tally, both.walk = Tally(Penalties(bias=((150, 9.0),)), both.prompt, 200), Leash(20, 3)  # type: ignore[assignment]
    bench.scheduler.submit([plain, bound, both])
    assert [bench.ended(i).reason for i in range(3)] == ["length", "length", "stop"]
    assert bench.tokens(0) == [199] * 3
    # 150 has 1.52 + 3 before it is written, 2 less after; 199 has 3
    assert bench.tokens(1) == [150, 199, 198] and bench.tokens(2) == [22, 24, 26]
    told = [choice.logprob for piece in bench.pieces[1] for choice in piece.choices]
    assert told == pytest.approx([float(logits.log_softmax(-1)[token]) for token in (150, 199, 198)])


def test_text_that_waits_for_a_stop_string_comes_with_the_end(bench: Bench, tiny_tokenizer: Any) -> None:
    whole = tiny_tokenizer.decode(range(61, 66))
    plain, held, ends = (bench.job(60) for _ in range(3))
    held.stream = TextStream(tiny_tokenizer, [whole[-2:] + "!"])
    # it ends with the very last token
    ends.stream = TextStream(tiny_tokenizer, [whole[-2:]])
    bench.scheduler.submit([plain, held, ends])
    assert [bench.ended(i).reason for i in range(3)] == ["length", "length", "stop"]
    texts = ["".join(piece.text for piece in bench.pieces[i]) for i in range(3)]
    assert texts == [whole, whole, whole[: whole.index(whole[-2:])]]


def test_a_stop_string_in_what_was_held_back_is_the_reason_of_the_end(bench: Bench) -> None:
    class Held:
        """A token that holds a stop string and the beginning of a character waits until no more come."""

        stopped = False

        def put(self, token: int) -> str:
            return ""

        def end(self) -> str:
            self.stopped = True
            return "before it"

    job = bench.job(20, count=3)
    job.stream = Held()  # type: ignore[assignment]
    bench.scheduler.submit([job])
    assert (bench.ended(0).reason, bench.ended(0).text) == ("stop", "before it")


def test_an_answer_whose_reader_is_gone_leaves(bench: Bench) -> None:
    def gone(piece: Piece) -> None:
        raise RuntimeError("Event loop is closed")

    lost, other = bench.job(20, count=40), bench.job(30, count=40)
    lost.sink = gone
    bench.rows.gate.clear()
    bench.scheduler.submit([lost, other])
    bench.rows.gate.set()
    assert bench.ended(1).reason == "length"
    assert lost.written < 40 and bench.empty()


def test_stopping_tells_those_that_wait_too(bench: Bench) -> None:
    told = list[int]()
    bench.scheduler.told = lambda: told.append(sum(bool(bench.pieces.get(i)) for i in range(1, 5)))
    bench.held_up(8)
    bench.scheduler.submit([bench.job(30 + 10 * i) for i in range(4)])
    threading.Thread(target=lambda: comes(lambda: bench.scheduler.draining) and bench.rows.gate.set()).start()
    bench.scheduler.stop()
    assert [bench.ended(i).error for i in range(1, 5)] == [STOPPED] * 4 and told[-1] == 4
    with pytest.raises(Busy, match="shutting down"):
        bench.scheduler.submit([bench.job(90)])


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


def test_the_likeliest_token_is_the_first_of_equals() -> None:
    rows = [*torch.randn(20, 50), torch.tensor([1.0, 3.0, 3.0]), torch.tensor([-torch.inf, -2.0, -torch.inf])]
    assert scheduler.likeliest(rows) == [int(row.argmax()) for row in rows]
    assert scheduler.likeliest(rows[-2:]) == [1, 1]


def test_readers_are_told_once_a_step_and_of_the_end(bench: Bench) -> None:
    told = [0]

    def sent() -> int:
        return sum(map(len, bench.pieces.values()))

    bench.scheduler.told = lambda: told.append(sent())
    bench.scheduler.submit([bench.job(10 * i, 4) for i in range(3)])
    assert [bench.ended(i).reason for i in range(3)] == ["length"] * 3
    assert comes(lambda: told[-1] == sent())
    # of what a step brings all is told together
    assert 3 in {after - before for before, after in pairwise(told)}
    # its steps come to a token that breaks them
    bench.scheduler.submit([bench.job(0, 60000)])
    assert bench.ended(3).error == FAILED and comes(lambda: told[-1] == sent())
