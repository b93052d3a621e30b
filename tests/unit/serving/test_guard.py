"""What stands around the application, asked by hand: keys, sizes of bodies, readers that take nothing, counts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("starlette")

from llmcompress.serving.guard import PATIENCE, Guard
from llmcompress.serving.limits import Limits

LIMITS = Limits(body_bytes=10, write_seconds=0.05)
# for senders that are late on purpose: a machine that stands still makes others late too
HASTY = replace(LIMITS, read_seconds=0.2)
START = {"type": "http.response.start", "status": 200, "headers": []}
END = {"type": "http.response.body", "body": b"ok"}


class Counted:
    """In the place of the metrics."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def request(self, path: str, status: int, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append((path, status))


class Exchange:
    """One request by hand; ``took`` is what the application read, ``asked`` how often the client was asked for more."""

    def __init__(
        self, *parts: bytes, path: str = "/v1/completions", key: str | None = None, begins_early: bool = False,
        length: int | None = None, stalls: bool = False, endless: bool = False, drips: float = 0.0,
        limits: Limits = LIMITS, **headers: str,
    ) -> None:  # fmt: skip
        self.sent: list[dict[str, Any]] = []
        self.took, self.asked, self.metrics, self._drips = b"", 0, Counted(), drips
        self._parts, self._early, self._stalls, self._endless = list(parts), begins_early, stalls, endless
        lines = [(name.encode(), value.encode()) for name, value in headers.items()]
        lines += [] if length is None else [(b"content-length", str(length).encode())]
        scope = {"type": "http", "path": path, "method": "POST", "headers": lines}
        asyncio.run(Guard(self._app, limits, self.metrics, key)(scope, self._receive, self._send))  # type: ignore[arg-type]

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        if self._early:
            await send(START)
        more = True
        while more:
            message = await receive()
            self.took += message.get("body", b"")
            more = message.get("more_body", False)
        for message in [END] if self._early else [START, END]:
            await send(message)

    async def _receive(self) -> dict[str, Any]:
        self.asked += 1
        await asyncio.sleep(self._drips)
        part = b"x" * 10 if self._endless else self._parts.pop(0) if self._parts else b""
        return {"type": "http.request", "body": part, "more_body": self._endless or bool(self._parts)}

    async def _send(self, message: dict[str, Any]) -> None:
        if self._stalls and message["type"] == "http.response.body":
            await asyncio.sleep(60)
        self.sent.append(message)

    @property
    def statuses(self) -> list[int]:
        return [message["status"] for message in self.sent if message["type"] == "http.response.start"]


@pytest.mark.parametrize(
    ("given", "status"),
    [("Bearer secret", 200), ("Bearer secrets", 401), ("Bearer secre", 401), ("Bearer ", 401), ("secret", 401),
     ("", 401)],
)  # fmt: skip
def test_only_the_whole_key_opens(given: str, status: int) -> None:
    assert Exchange(b"{}", key="secret", authorization=given).statuses == [status]
    assert Exchange(b"{}", key="secret", path="/healthz", authorization=given).statuses == [200]
    assert Exchange(b"{}", key="secret", path="/healthz/x", authorization=given).statuses == [status]


def test_without_a_key_nobody_is_asked_and_with_one_all_are() -> None:
    assert Exchange(b"{}").statuses == [200]
    for path in ("/metrics", "/v1/models", "/nothing"):
        assert Exchange(b"{}", path=path, key="secret").statuses == [401]


@pytest.mark.parametrize(
    ("parts", "fits"), [((b"x" * 10,), True), ((b"x" * 6, b"x" * 4), True), ((b"x" * 6, b"x" * 5), False)]
)
def test_a_body_may_have_as_many_bytes_as_the_limit_in_all(parts: Sequence[bytes], fits: bool) -> None:
    assert Exchange(*parts).statuses == [200 if fits else 413]
    told = Exchange(*parts, length=sum(map(len, parts)))
    assert told.statuses == [200 if fits else 413]
    # what says its length is refused before the application sees any of it
    assert told.took == (b"x" * 10 if fits else b"")


def test_an_answer_that_has_begun_gets_no_second_beginning() -> None:
    found = Exchange(b"x" * 6, b"x" * 6, begins_early=True)
    assert found.statuses == [200] and found.metrics.seen == [("/v1/completions", 200)]


def test_of_a_body_that_nobody_wants_some_is_read() -> None:
    found = Exchange(endless=True, length=1 << 40)
    assert found.statuses == [413] and found.took == b""
    assert found.asked == PATIENCE


def test_a_body_that_comes_in_drops_is_not_waited_for() -> None:
    """However many of its drops come in time."""
    found = Exchange(*[b"x"] * 8, drips=0.06, limits=HASTY)
    assert found.statuses == [408] and len(found.took) < 8
    assert found.metrics.seen == [("/v1/completions", 408)]
    # nor is one that nobody wants
    assert Exchange(b"x", b"x", drips=60.0, limits=HASTY, key="secret").statuses == [401]
    assert Exchange(b"x", b"x", drips=60.0, limits=HASTY, length=11).statuses == [413]


def test_after_the_body_the_client_may_be_waited_for() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        await send(START)
        await send(END)

    def ask() -> int:
        messages, sent = [{"type": "http.request", "body": b"x"}], list[Any]()

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await asyncio.sleep(2 * HASTY.read_seconds)
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
        asyncio.run(Guard(app, HASTY, Counted(), None)(scope, receive, send))  # type: ignore[arg-type]
        return int(sent[0]["status"])

    # a machine that stands still for so long is late with the body itself
    assert 200 in (ask() for _ in range(20))


def test_a_reader_that_takes_nothing_is_left() -> None:
    found = Exchange(b"{}", stalls=True)
    assert found.statuses == [200] and len(found.sent) == 1


def test_requests_are_counted_by_paths_that_are_known() -> None:
    for path, known in (("/v1/models/a/b", "/v1/models"), ("/v1/completions", "/v1/completions"), ("/a\nb", "other")):
        assert Exchange(b"{}", path=path).metrics.seen == [(known, 200)]
    assert Exchange(b"{}", key="secret").metrics.seen == [("/v1/completions", 401)]


def test_a_client_that_goes_before_its_answer_is_counted_as_gone() -> None:
    async def silent(scope: Any, receive: Any, send: Any) -> None:
        pass

    metrics = Counted()
    scope = {"type": "http", "path": "/v1/completions", "method": "POST", "headers": []}
    asyncio.run(Guard(silent, LIMITS, metrics, None)(scope, None, None))  # type: ignore[arg-type]
    assert metrics.seen == [("/v1/completions", 499)]
