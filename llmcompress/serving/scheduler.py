"""One thread that decodes: sequences join and leave between steps, whoever's they are; long prompts are read in parts.

The thread owns all models and caches. Requests come in over :meth:`Scheduler.submit`, what they cause goes out through
each job's ``sink``, called on that thread: it must not block. After each step :attr:`Scheduler.told` is called once, so
that a reader's thread need not be woken for every piece. A sequence is admitted only when its prompt and its
longest answer fit the cache beside everybody else's, so nothing is ever evicted half-way.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from llmcompress.inference.generate import Sampling, choose
from llmcompress.inference.grammar import GrammarError
from llmcompress.serving.metrics import Metrics
from llmcompress.serving.rows import prompt_logits
from llmcompress.serving.text import TextStream

if TYPE_CHECKING:
    from llmcompress.inference.grammar import Walk
    from llmcompress.inference.penalties import Tally
    from llmcompress.serving.limits import Limits
    from llmcompress.serving.rows import Rows

Reason = Literal["stop", "length"]
# errors of pieces; what failed inside is in the server's log, not in answers
FAILED, STOPPED, UNFOLLOWED = "failed", "stopped", "unfollowed"
# probabilities of tokens that cannot come are told as this, as at OpenAI and vLLM: JSON has no infinity
NEVER = -9999.0

_LOG = logging.getLogger("llmcompress.serving")


class Busy(Exception):
    """The queue is full, or the server is going down.

    Args:
        draining: The latter.
    """

    def __init__(self, draining: bool) -> None:
        super().__init__("the server is shutting down" if draining else "too many requests are waiting")
        self.draining = draining


@dataclass(frozen=True, slots=True)
class TokenChoice:
    """One token with its probability.

    Attributes:
        token: Its id.
        logprob: Natural logarithm of its probability, before penalties, biases and temperature but, as at vLLM, among
            what the answer's grammar allows; None for the first one of a text.
        top: The most likely ids and theirs, in order.
    """

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Piece:
    """Some more of an answer.

    Attributes:
        text: New text, possibly none.
        tokens: New tokens so far.
        choices: Choices of the tokens since the last piece; empty unless asked for.
        reason: Why it ended, None while it goes on.
        error: What went wrong, ends the answer too.
    """

    text: str
    tokens: int
    choices: tuple[TokenChoice, ...] = ()
    reason: Reason | None = None
    error: str | None = None


@dataclass(eq=False)
class Job:
    """One answer.

    Attributes:
        model: Name under which it was asked.
        prompt: Token ids.
        how: Sampling.
        stop: Token ids that end it.
        stream: Its text.
        sink: Takes its pieces.
        logprobs: Number of likely tokens to report with each, None for none at all.
        echo: Text of the prompt where the answer begins with it, with what ``logprobs`` asks for of its tokens too.
        walk: The grammar that it follows.
        tally: Its penalties.
    """

    model: str
    prompt: Sequence[int]
    how: Sampling
    stop: Collection[int]
    stream: TextStream
    sink: Callable[[Piece], None]
    logprobs: int | None = None
    echo: str | None = None
    walk: Walk | None = None
    tally: Tally | None = None
    echoed: bool = False
    cancelled: bool = False
    # first tokens of the prompt that were held already
    reused: int = 0
    written: int = 0
    last: int = -1
    submitted: float = field(default_factory=time.monotonic)
    draws: torch.Generator | None = None
    waiting: list[TokenChoice] = field(default_factory=list)

    @property
    def total(self) -> int:
        """Tokens that it reaches at most."""
        return len(self.prompt) + self.how.max_new_tokens

    def took(self, token: int) -> bool:
        """A token has been chosen; returns whether its grammar has ended."""
        if self.tally is not None:
            self.tally.take(token)
        if self.walk is None:
            return False
        self.walk.take(token)
        return self.walk.ended


@dataclass(eq=False)
class Group:
    """Models whose sequences share a batch.

    Attributes:
        rows: The batch.
        member_of: Model name → member of a family, None for a single model.
        running: Sequence number → job.
        reading: Number and job of the prompt that is being read.
    """

    rows: Rows
    member_of: Mapping[str, str | None]
    running: dict[int, Job] = field(default_factory=dict)
    reading: tuple[int, Job] | None = None

    @property
    def jobs(self) -> list[Job]:
        """Jobs that have a place."""
        return [*self.running.values(), *([] if self.reading is None else [self.reading[1]])]

    @property
    def reserved(self) -> int:
        """Tokens that its sequences may reach together."""
        return sum(job.total for job in self.jobs)


class Scheduler:
    """Starts its thread at once; :meth:`stop` ends it.

    Args:
        groups: Every model is in one.
        limits: Bounds.
        metrics: Where it counts.
    """

    def __init__(self, groups: Sequence[Group], limits: Limits, metrics: Metrics) -> None:
        self._groups, self._limits, self._metrics = list(groups), limits, metrics
        self._group_of = {name: group for group in groups for name in group.member_of}
        self._waiting: deque[Job] = deque()
        self._lock = threading.Condition()
        self._draining = self._stopped = False
        self._next = 0
        self.told: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="decode", daemon=True)
        self._thread.start()

    def room(self, model: str) -> int:
        """Tokens that a sequence of a model may reach at most."""
        return min(self._group_of[model].rows.longest, self._limits.cache_tokens)

    def submit(self, jobs: Sequence[Job]) -> None:
        """Queue the answers of one request, all or none.

        Raises:
            Busy: There is no place.
        """
        with self._lock:
            if self._draining:
                raise Busy(draining=True)
            if len(self._waiting) + len(jobs) > self._limits.queue:
                raise Busy(draining=False)
            self._waiting.extend(jobs)
            self._lock.notify()

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Nobody reads these any more; their places are free before the next step."""
        with self._lock:
            for job in jobs:
                job.cancelled = True
            self._lock.notify()

    def drain(self) -> None:
        """Take nothing new; what has been taken is finished."""
        with self._lock:
            self._draining = True

    @property
    def draining(self) -> bool:
        """Whether nothing new is taken."""
        return self._draining

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def stop(self) -> None:
        """End the thread; unfinished answers end with an error."""
        with self._lock:
            self._draining = self._stopped = True
            self._lock.notify()
        self._thread.join()
        self._end(STOPPED)

    def _run(self) -> None:
        try:
            self._decode()
        except BaseException:
            # a fault of ours, or a panic of Rust, which is no Exception: the server says that it is down, and nobody
            # waits for ever
            _LOG.exception("nothing is decoded any more")
            with self._lock:
                self._draining = True
            self._end(FAILED)

    def _end(self, error: str) -> None:
        """End all answers with an error."""
        jobs = [*self._waiting, *(job for group in self._groups for job in group.jobs)]
        self._waiting.clear()
        for group in self._groups:
            group.reading, group.running = None, {}
        self._fail(jobs, error)
        self.told()

    def _decode(self) -> None:
        while True:
            with self._lock:
                while not self._stopped and not self._waiting and not any(g.jobs for g in self._groups):
                    self._observe()
                    self._lock.wait()
                if self._stopped:
                    return
            self._drop_cancelled()
            for group in self._groups:
                self._read(group)
                self.told()
                self._step(group)
                self.told()
            self._observe()

    def _observe(self) -> None:
        running = sum(len(group.jobs) for group in self._groups)
        held = sum(group.rows.held_bytes() for group in self._groups)
        self._metrics.state(len(self._waiting), running, sum(g.reserved for g in self._groups), held)

    def _drop_cancelled(self) -> None:
        with self._lock:
            if any(job.cancelled for job in self._waiting):
                self._waiting = deque(job for job in self._waiting if not job.cancelled)
        for group in self._groups:
            for key in [key for key, job in group.running.items() if job.cancelled]:
                self._leave(group, key)
            if group.reading is not None and group.reading[1].cancelled:
                group.rows.leave(group.reading[0])
                group.reading = None

    def _leave(self, group: Group, key: int) -> None:
        del group.running[key]
        group.rows.leave(key)

    def _admit(self, group: Group) -> bool:
        """First come, first served: nobody overtakes one that waits for room in the cache, of whichever model, nor one
        of its own batch that waits for a place there.
        """
        room = self._limits.cache_tokens - sum(g.reserved for g in self._groups)
        with self._lock:
            job = next((j for j in self._waiting if not j.cancelled and self._in_front(group, j, room)), None)
            if job is None or self._group_of[job.model] is not group or job.total > room:
                return False
            if len(group.running) >= group.rows.limit:
                return False
            self._waiting.remove(job)
        group.reading = (self._next, job)
        self._next += 1
        return True

    def _in_front(self, group: Group, job: Job, room: int) -> bool:
        """Whether nobody behind a waiting job may enter a batch before it: it is of that batch, or of another one that
        has a place and only lacks room.
        """
        other = self._group_of[job.model]
        free = other.reading is None and len(other.running) < other.rows.limit
        return other is group or (free and job.total > room)

    def _read(self, group: Group) -> None:
        """One chunk of prompts, in one or several: those who decode wait for no more than that between two steps."""
        chunk = left = self._limits.prompt_chunk
        # a small rest would cost as much as a whole step
        while 4 * left >= chunk and (group.reading is not None or self._admit(group)):
            assert group.reading is not None
            key, job = group.reading
            try:
                if job.echo is not None and not job.echoed:
                    self._echo(group, job, job.echo)
                    if job.how.max_new_tokens == 0:
                        # nothing but the prompt's probabilities was wanted
                        group.reading = None
                        self._metrics.first_token(job.model, len(job.prompt), 0, time.monotonic() - job.submitted)
                        return
                logits = group.rows.join(key, job.prompt, group.member_of[job.model], job.total, left)
            except Exception:
                _LOG.exception("a prompt of %d tokens for %s failed", len(job.prompt), job.model)
                group.reading = None
                # told before its place is given back, which may fail too
                self._fail([job], FAILED)
                group.rows.leave(key)
                continue
            if logits is None:
                return
            job.reused, group.reading, group.running[key] = group.rows.reused(key), None, job
            left -= max(1, len(job.prompt) - job.reused)
            self._metrics.first_token(job.model, len(job.prompt), job.reused, time.monotonic() - job.submitted)
            self._take(group, {key: logits})

    def _echo(self, group: Group, job: Job, text: str) -> None:
        """Begin an answer with its prompt."""
        choices = list[TokenChoice]()
        if job.logprobs is not None:
            logits = prompt_logits(group.rows.model, job.prompt, group.member_of[job.model])
            choices = [TokenChoice(job.prompt[0], None, ())]
            choices += [_choice(token, row, job.logprobs) for token, row in zip(job.prompt[1:], logits)]
        job.echoed = True
        self._send(job, Piece(text, 0, tuple(choices), "length" if job.how.max_new_tokens == 0 else None))

    def _step(self, group: Group) -> None:
        if not group.running:
            return
        began = time.monotonic()
        try:
            logits = group.rows.step({key: job.last for key, job in group.running.items()})
        except Exception:
            _LOG.exception("a step of %d sequences failed", len(group.running))
            failed, group.running = group.running, {}
            self._fail(list(failed.values()), FAILED)
            for key in failed:
                group.rows.leave(key)
            return
        self._metrics.step(len(logits), time.monotonic() - began)
        self._take(group, logits)

    def _take(self, group: Group, logits: Mapping[int, Tensor]) -> None:
        """Choose a token for each sequence and pass its text on."""
        told: dict[int, Tensor] = {}
        drawn: dict[int, Tensor] = {}
        for key, row in logits.items():
            job = group.running[key]
            with self._alone(group, key):
                told[key] = row if job.walk is None else job.walk.restrict(row)
                drawn[key] = told[key] if job.tally is None else job.tally.apply(told[key])
        plain = [key for key in drawn if group.running.get(key) is not None and group.running[key].how.temperature == 0]
        best: dict[int, int] = {}
        if plain:
            best = dict(zip(plain, likeliest([drawn[key] for key in plain])))
        for key in [key for key in drawn if key in group.running]:
            job, ended = group.running[key], False
            with self._alone(group, key):
                ended = self._deliver(job, best[key] if key in best else _draw(job, drawn[key]), told[key])
            if ended:
                self._leave(group, key)

    @contextmanager
    def _alone(self, group: Group, key: int) -> Iterator[None]:
        """Logits that are no numbers, say, or a panic of the tokenizer end one sequence: the others decode on."""
        job = group.running[key]
        try:
            yield
        except BaseException as error:
            unfollowed = isinstance(error, GrammarError)
            if unfollowed:
                _LOG.error("token %d for %s: %s", job.written + 1, job.model, error)
            else:
                _LOG.exception("token %d for %s failed", job.written + 1, job.model)
            self._fail([job], UNFOLLOWED if unfollowed else FAILED)
            self._leave(group, key)

    def _deliver(self, job: Job, token: int, logits: Tensor) -> bool:
        """Pass one token on; returns whether it was the last."""
        job.last, job.written = token, job.written + 1
        self._metrics.token(job.model)
        ended = token in job.stop
        complete = job.took(token) and not ended
        # lm-eval takes all but the last token for the prompt, so one that ends the answer is told after a prompt
        if job.logprobs is not None and (not ended or job.echoed):
            job.waiting.append(_choice(token, logits, job.logprobs))
        text = "" if ended and not job.stream.included else job.stream.put(token)
        reason: Reason | None = None
        if ended or complete or job.stream.stopped:
            reason = "stop"
        elif job.written == job.how.max_new_tokens:
            reason = "length"
        if reason is not None and not job.stream.stopped:
            text += job.stream.end()
            # a stop string may have hidden in what was held back
            reason = "stop" if job.stream.stopped else reason
        if text or reason is not None:
            choices, job.waiting = tuple(job.waiting), []
            self._send(job, Piece(text, job.written, choices, reason))
        return reason is not None

    def _fail(self, jobs: Sequence[Job], error: str) -> None:
        for job in jobs:
            self._metrics.failed(job.model)
            self._send(job, Piece("", job.written, error=error))

    @staticmethod
    def _send(job: Job, piece: Piece) -> None:
        try:
            job.sink(piece)
        except RuntimeError:
            # the event loop of the reader has closed
            job.cancelled = True


def likeliest(rows: Sequence[Tensor]) -> list[int]:
    """Where each row of logits, float32 ``[V]`` on the CPU, is largest; of equals the first.

    numpy takes a tenth of the time that torch's argmax does, which is noticed beside a step of a small model.
    """
    return [int(row.numpy().argmax()) for row in rows]


def _draw(job: Job, logits: Tensor) -> int:
    if job.draws is None:
        job.draws = torch.Generator().manual_seed(job.how.seed)
    return int(choose(logits.unsqueeze(0), job.how, job.draws)[0])


def _choice(token: int, logits: Tensor, count: int) -> TokenChoice:
    logs = logits.log_softmax(-1).clamp(min=NEVER)
    top: Any = logs.topk(count) if count else None
    pairs = tuple(zip(top.indices.tolist(), top.values.tolist())) if count else ()
    return TokenChoice(token, float(logs[token]), pairs)
