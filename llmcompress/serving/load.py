"""Load on an OpenAI server: requests sent at a rate or so many at once, when their tokens came, and what that means.

Words and definitions are those of vLLM's ``vllm bench serve`` (``vllm/benchmarks/serve.py``): TTFT is the time to the
first piece of text, ITL the time between two pieces, TPOT that between tokens after the first (the rest of the answer's
time over the rest of its tokens), E2EL that of the whole request. All count from when a request is sent, connecting
included; one that ``concurrency`` holds back is not sent yet. Only requests that succeed count.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import numpy

from llmcompress.errors import UsageError

KINDS = ("ttft", "tpot", "itl", "e2el")
# of a line of an answer: an event may hold many log-probabilities
LINE_BYTES = 1 << 22
# seconds between two looks at how late the client itself is
LOOK = 0.05


@dataclass(frozen=True, slots=True)
class Target:
    """A server.

    Attributes:
        url: What the paths of its endpoints follow.
        key: Sent as a bearer token, None for none.
    """

    url: str
    key: str | None = None


def target_of(url: str, key: str | None) -> Target:
    """Where a URL such as ``http://127.0.0.1:8000/v1`` leads.

    Raises:
        UsageError: It is none.
    """
    try:
        parts = urlsplit(url)
        # no number raises here
        _ = parts.port
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"{url}: no address of a server", "write it like http://127.0.0.1:8000/v1")
    return Target(url.rstrip("/"), key)


@dataclass(slots=True)
class Outcome:
    """One request.

    Attributes:
        sent, ended: When, in seconds of the client's clock.
        pieces: When pieces of its text came.
        prompt_tokens, tokens: What the server says that it read and wrote; None where it does not say.
        error: Why it failed, None if it did not.
    """

    sent: float = 0.0
    ended: float = 0.0
    pieces: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    tokens: int | None = None
    error: str | None = None

    @property
    def written(self) -> int:
        """Tokens, or pieces where nobody counted tokens."""
        return len(self.pieces) if self.tokens is None else self.tokens

    def milliseconds(self) -> dict[str, float]:
        """``ttft``, ``e2el`` and, with two tokens or more and a text to count from, ``tpot``."""
        first = self.pieces[0] if self.pieces else self.ended
        found = {"ttft": 1e3 * (first - self.sent), "e2el": 1e3 * (self.ended - self.sent)}
        if self.pieces and self.written > 1:
            found["tpot"] = 1e3 * (self.ended - first) / (self.written - 1)
        return found


@dataclass(frozen=True, slots=True)
class Measured:
    """A load that is over.

    Attributes:
        outcomes: One for each request, in order.
        seconds: From the first request to the end of the last.
        most: Requests that ran at once, at most.
        late: Seconds by which the client itself was late at most: without a core of its own its figures are not the
            server's.
    """

    outcomes: list[Outcome]
    seconds: float
    most: int
    late: float


class Refused(Exception):
    """The server did not answer as it should."""


class Load:
    """Sends requests.

    Args:
        target: Where.
        path: Endpoint below its root.
        timeout: Seconds after which a request has failed.
        clock: Seconds.
    """

    def __init__(
        self, target: Target, path: str, timeout: float, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self._target, self._path, self._timeout, self._clock = target, path, timeout, clock
        self._running = self._most = 0
        self._late = 0.0

    async def run(
        self, bodies: Sequence[Mapping[str, Any]], concurrency: int, rate: float | None = None, seed: int = 0
    ) -> Measured:
        """Send all and wait for their ends.

        Args:
            bodies: Requests.
            concurrency: How many may run at once.
            rate: Requests a second on average, at times of a Poisson process; None sends them as soon as they may.
            seed: Of these times.
        """
        draws, at, starts = random.Random(seed), 0.0, []
        for _ in bodies:
            starts.append(at)
            at += 0.0 if rate is None else draws.expovariate(rate)
        places, outcomes = asyncio.Semaphore(concurrency), [Outcome() for _ in bodies]
        began, loop = self._clock(), asyncio.get_running_loop()
        opened = loop.time()

        async def one(index: int) -> None:
            await asyncio.sleep(max(0.0, opened + starts[index] - loop.time()))
            async with places:
                self._running += 1
                self._most = max(self._most, self._running)
                await self.send(bodies[index], outcomes[index])
                self._running -= 1

        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.gather(*map(one, range(len(bodies))))
        finally:
            watch.cancel()
        seconds = max((outcome.ended for outcome in outcomes), default=began) - min(
            (outcome.sent for outcome in outcomes), default=began
        )
        return Measured(outcomes, seconds, self._most, self._late)

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + LOOK
            await asyncio.sleep(LOOK)
            self._late = max(self._late, loop.time() - due)

    async def send(self, body: Mapping[str, Any], outcome: Outcome) -> None:
        """Send one and hear its answer; what fails is in the outcome."""
        outcome.sent = self._clock()
        try:
            async with asyncio.timeout(self._timeout):
                await self._hear(body, outcome)
        except TimeoutError:
            outcome.error = f"no end within {self._timeout:g} s"
        except (aiohttp.ServerDisconnectedError, aiohttp.ClientPayloadError):
            outcome.error = "the connection was closed"
        except aiohttp.ClientResponseError as error:
            outcome.error = f"this is no HTTP server: {' '.join(error.message.split())}"
        except (OSError, Refused, aiohttp.ClientError, ValueError) as error:
            outcome.error = str(error).strip() or type(error).__name__
        except (AttributeError, TypeError) as error:
            outcome.error = f"an event is of another form: {error}"
        # a failed one ends when that is known
        outcome.ended = self._clock() if outcome.error is not None or not outcome.ended else outcome.ended

    async def _hear(self, body: Mapping[str, Any], outcome: Outcome) -> None:
        ended = False
        async for text in events(lines(self._target, "POST", self._path, body)):
            if text == "[DONE]":
                ended = True
                continue
            now, data = self._clock(), _json(text)
            if not isinstance(data, dict):
                raise Refused("an event is no JSON object")
            if data.get("error"):
                raise Refused(_message(data))
            usage = data.get("usage") or {}
            outcome.prompt_tokens = usage.get("prompt_tokens", outcome.prompt_tokens)
            outcome.tokens = usage.get("completion_tokens", outcome.tokens)
            for choice in data.get("choices") or ():
                if _says(choice):
                    outcome.pieces.append(now)
                if choice.get("finish_reason"):
                    ended, outcome.ended = True, now
        if not ended:
            raise Refused("the answer was cut off")


def _says(choice: Mapping[str, Any]) -> bool:
    """Whether a choice of a chunk has any text: of the answer, of thoughts, of calls."""
    delta = choice.get("delta") or {}
    words = ("content", "reasoning_content", "reasoning", "tool_calls")
    return bool(choice.get("text")) or any(delta.get(word) for word in words)


def _message(data: Any) -> str:
    error = data.get("error") if isinstance(data, dict) else None
    found = error.get("message") if isinstance(error, dict) else error
    return str(found or data)[:300]


async def events(given: AsyncIterator[bytes]) -> AsyncIterator[str]:
    """Data of server-sent events."""
    async for line in given:
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


async def lines(target: Target, method: str, path: str, body: Mapping[str, Any] | None = None) -> AsyncIterator[bytes]:
    """Lines of an answer's body as they come, over a connection of its own.

    Raises:
        Refused: Any status but 200, with what the server says.
        OSError, aiohttp.ClientError: There is no connection, or it ended too early.
    """
    head = {} if target.key is None else {"Authorization": f"Bearer {target.key}"}
    # how long an answer may take is Load's to say
    patient, once = aiohttp.ClientTimeout(total=None), aiohttp.TCPConnector(force_close=True)
    async with (
        aiohttp.ClientSession(connector=once, headers=head, timeout=patient, read_bufsize=LINE_BYTES) as session,
        session.request(method, target.url + path, json=body, allow_redirects=False) as answer,
    ):
        if answer.status != 200:
            raise Refused(f"status {answer.status}: {_said(await answer.read())}")
        async for line in answer.content:
            yield line


def _json(text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is too deep") from error


def _said(body: bytes) -> str:
    """What an error answer says."""
    try:
        return _message(_json(body))
    except ValueError:
        return body.decode("utf-8", "replace").strip()[:300] or "no more is said"


async def served_models(target: Target) -> list[str]:
    """Ids of the models that a server lists.

    Raises:
        Refused, OSError, aiohttp.ClientError, ValueError: It does not.
    """
    found = _json(b"".join([line async for line in lines(target, "GET", "/models")]))
    try:
        return [str(model["id"]) for model in found["data"]]
    except (KeyError, TypeError) as error:
        raise Refused("its list of models is none") from error


def summary(
    measured: Measured, percentiles: Sequence[float] = (50, 90, 99), bounds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """What a load shows.

    Args:
        measured: It.
        percentiles: Wanted of each kind of time.
        bounds: Kind of :data:`KINDS` without ``itl`` and milliseconds: requests within all of them are good ones.

    Returns:
        Counts, rates per second, and for each kind milliseconds: mean, percentiles, longest.
    """
    good = [outcome for outcome in measured.outcomes if outcome.error is None]
    times = [outcome.milliseconds() for outcome in good]
    by_kind = {kind: sorted(found[kind] for found in times if kind in found) for kind in KINDS if kind != "itl"}
    by_kind["itl"] = sorted(1e3 * (b - a) for outcome in good for a, b in zip(outcome.pieces, outcome.pieces[1:]))
    written = sum(outcome.written for outcome in good)
    prompts = sum(outcome.prompt_tokens or 0 for outcome in good)
    seconds = max(measured.seconds, 1e-9)
    found: dict[str, Any] = {
        "requests": len(measured.outcomes), "failed": len(measured.outcomes) - len(good),
        "errors": dict(Counter(outcome.error for outcome in measured.outcomes if outcome.error is not None)),
        "seconds": measured.seconds, "most_at_once": measured.most, "client_late_ms": 1e3 * measured.late,
        "prompt_tokens": prompts, "completion_tokens": written,
        "tokens_are_pieces": any(outcome.tokens is None for outcome in good),
        "requests_per_second": len(good) / seconds, "completion_tokens_per_second": written / seconds,
        "total_tokens_per_second": (written + prompts) / seconds,
    }  # fmt: skip
    if bounds is not None:
        kept = sum(all(one.get(kind, 0.0) <= bound for kind, bound in bounds.items()) for one in times)
        found |= {"goodput_bounds_ms": dict(bounds), "good_requests_per_second": kept / seconds}
    for kind in KINDS:
        values = by_kind[kind]
        row = {"mean": sum(values) / len(values), "max": values[-1]} if values else {}
        at = numpy.percentile(values, percentiles).tolist() if values else []
        row |= {f"p{share:g}": value for share, value in zip(percentiles, at)}
        found[f"{kind}_ms"] = row
    return found
