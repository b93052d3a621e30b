"""The load generator against a server with a clock that is made up: its figures are exact."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from llmcompress.errors import UsageError
from llmcompress.serving.load import (
    Load,
    Measured,
    Outcome,
    Refused,
    Target,
    served_models,
    summary,
    target_of,
)

Answer = Callable[["Fake", asyncio.StreamWriter, dict[str, Any]], Awaitable[None]]


class Clock:
    """Seconds that pass when the server says so; it waits until the client has looked at them."""

    def __init__(self) -> None:
        self.now = 0.0
        self.looked = asyncio.Event()

    def __call__(self) -> float:
        self.looked.set()
        return self.now

    async def passes(self, seconds: float, writer: asyncio.StreamWriter, data: bytes) -> None:
        """Let time pass, send something, and wait for the client to have seen it."""
        self.now += seconds
        self.looked.clear()
        writer.write(data)
        await self.looked.wait()


class Fake:
    """A server whose answers are given."""

    def __init__(self, answer: Answer) -> None:
        self.clock, self.heads, self._answer = Clock(), list[str](), answer
        self.running = self.most = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        self.heads.append(head)
        size = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("Content-Length:")), 0)
        body = json.loads(await reader.readexactly(size)) if size else {}
        self.running += 1
        self.most = max(self.most, self.running)
        await self._answer(self, writer, body)
        self.running -= 1
        writer.close()

    def run(self, act: Callable[[Target], Awaitable[Any]]) -> Any:
        """What ``act`` finds at this server."""

        async def both() -> Any:
            server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
            async with server:
                return await act(target_of(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1", "secret"))

        return asyncio.run(both())


def event(text: str | None = None, usage: int | None = None, reason: str | None = None) -> bytes:
    choices = [] if text is None else [{"text": text, "finish_reason": reason}]
    data: dict[str, Any] = {"choices": choices}
    if usage is not None:
        data["usage"] = {"prompt_tokens": 7, "completion_tokens": usage}
    return chunk(f"data: {json.dumps(data)}\n\n".encode())


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


OK = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nContent-Type: text/event-stream\r\n\r\n"
END = chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n"


async def streamed(fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
    """0.5 s to the first piece, 0.1 and 0.3 s to the next; two tokens in the last, which brings the end."""
    writer.write(OK)
    await fake.clock.passes(0.5, writer, event("a"))
    await fake.clock.passes(0.1, writer, event("b"))
    await fake.clock.passes(0.3, writer, event("cd", reason="length"))
    await fake.clock.passes(0.2, writer, event(usage=4))
    writer.write(END)


def test_times_are_those_of_the_server() -> None:
    fake = Fake(streamed)
    measured = fake.run(
        lambda target: Load(target, "/completions", 60, fake.clock).run([{"prompt": "x", "max_tokens": 4}] * 3, 1)
    )
    found = summary(measured, (50,), {"ttft": 500.1, "tpot": 140})
    assert found["requests"] == 3 and found["failed"] == 0 and found["most_at_once"] == 1
    assert found["prompt_tokens"] == 21 and found["completion_tokens"] == 12 and not found["tokens_are_pieces"]
    # the time of the counts is no time of the answer, but of the load
    assert found["seconds"] == pytest.approx(3 * 1.1 - 0.2)
    assert found["ttft_ms"] == pytest.approx({"mean": 500, "max": 500, "p50": 500})
    assert found["itl_ms"] == pytest.approx({"mean": 200, "max": 300, "p50": 200})
    assert found["tpot_ms"] == pytest.approx({"mean": 400 / 3, "max": 400 / 3, "p50": 400 / 3})
    assert found["e2el_ms"] == pytest.approx({"mean": 900, "max": 900, "p50": 900})
    assert found["completion_tokens_per_second"] == pytest.approx(12 / 3.1)
    assert found["total_tokens_per_second"] == pytest.approx(33 / 3.1)
    assert found["good_requests_per_second"] == pytest.approx(3 / 3.1)
    assert summary(measured, (50,), {"ttft": 499})["good_requests_per_second"] == 0
    assert fake.heads[0].startswith("POST /v1/completions HTTP/1.1\r\n") and "Bearer secret" in fake.heads[0]


def test_so_many_run_at_once_and_no_more() -> None:
    async def answer(fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        # nobody is answered before three are there: with fewer all would wait for ever
        await barrier.wait()
        writer.write(OK + event("a", usage=1, reason="stop") + END)

    barrier = asyncio.Barrier(3)
    fake = Fake(answer)
    bodies = [{"index": index} for index in range(9)]
    measured = fake.run(lambda target: Load(target, "/completions", 60).run(bodies, 3))
    assert fake.most == 3 and measured.most == 3 and all(one.error is None for one in measured.outcomes)


@pytest.mark.parametrize(
    ("sent", "error"),
    [
        ([b'HTTP/1.1 429 Too Many Requests\r\nContent-Length: 40\r\n\r\n{"error":{"message":"too many", "a": 1}}'],
         "status 429: too many"),
        ([b"HTTP/1.1 502 Bad Gateway\r\n\r\nno server\n"], "status 502: no server"),
        ([b"HTTP/1.1 502 Bad Gateway\r\n\r\n" + b"[" * 200_000], "status 502: [["),
        ([OK, event("a"), chunk(b'data: {"error": {"message": "it broke"}}\n\n'), END], "it broke"),
        ([OK, event("a"), b"0\r\n\r\n"], "the answer was cut off"),
        ([OK, event("a"), b"10\r\nda"], "the connection was closed"),
        ([OK, chunk(b"data: {\n\n")], "Expecting property name"),
        ([OK, chunk(b'data: {"choices": ["a"]}\n\n'), END], "an event is of another form"),
        ([OK, chunk(b"data: " + b"[" * 200_000 + b"\n\n")], "JSON that is too deep"),
        ([OK, chunk(b"data: [1]\n\n"), END], "an event is no JSON object"),
        ([b"SSH-2.0-OpenSSH\r\n\r\n"], "this is no HTTP server"),
        ([b""], "the connection was closed"),
    ],
)  # fmt: skip
def test_what_fails_is_told_and_counts_for_no_time(sent: Sequence[bytes], error: str) -> None:
    async def answer(fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"".join(sent) if body["fails"] else OK + event("a", reason="stop") + END)
        await writer.drain()

    bodies = [{"fails": True}, {"fails": False}]
    measured = Fake(answer).run(lambda target: Load(target, "/completions", 60).run(bodies, 1))
    assert measured.outcomes[0].error.startswith(error)
    found = summary(measured)
    assert found["failed"] == 1 and sum(found["errors"].values()) == 1
    # without counts of the server pieces are told
    assert found["completion_tokens"] == 1 and found["tokens_are_pieces"] and found["tpot_ms"] == {}


def test_a_server_that_says_nothing_has_failed() -> None:
    async def answer(fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        while not writer.is_closing():
            await asyncio.sleep(0.01)

    measured = Fake(answer).run(lambda target: Load(target, "/completions", 0.2).run([{}], 1))
    assert measured.outcomes[0].error == "no end within 0.2 s"


def test_nobody_there() -> None:
    target = target_of("http://127.0.0.1:1/v1", None)
    measured = asyncio.run(Load(target, "/completions", 5).run([{}], 1))
    assert "1" in measured.outcomes[0].error


def test_models_of_a_server() -> None:
    async def answer(fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        data = json.dumps({"data": [{"id": "a"}, {"id": "b"}]}, indent=1).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(data) + data)

    assert Fake(answer).run(served_models) == ["a", "b"]

    async def other(fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\n\r\n{"no": "models"}')

    with pytest.raises(Refused, match="list of models"):
        Fake(other).run(served_models)

    async def deep(fake: Fake, writer: asyncio.StreamWriter, body: dict[str, Any]) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 200_000)

    with pytest.raises(ValueError, match="too deep"):
        Fake(deep).run(served_models)


def test_percentiles_are_those_of_the_requests_that_succeeded() -> None:
    outcomes = [Outcome(0.0, seconds) for seconds in (3.0, 1.0, 4.0, 1.5, 9.0, 2.6)]
    found = summary(Measured([*outcomes, Outcome(0.0, 100.0, error="no")], 9.0, 1, 0.0), (0, 10, 50, 90, 100))
    wanted = {"p0": 1000, "p10": 1250, "p50": 2800, "p90": 6500, "p100": 9000, "max": 9000, "mean": 21100 / 6}
    assert found["e2el_ms"] == pytest.approx(wanted)
    assert summary(Measured([Outcome(0.0, 2.0)], 2.0, 1, 0.0), (99,))["e2el_ms"]["p99"] == pytest.approx(2000)


def test_a_load_of_which_nothing_came() -> None:
    found = summary(Measured([Outcome(error="no")], 0.0, 1, 0.0))
    assert found["completion_tokens"] == 0 and all(found[f"{kind}_ms"] == {} for kind in ("ttft", "itl", "e2el"))


def test_tokens_without_a_text_have_no_times_between_them() -> None:
    # special tokens alone, say: all of the time is that to the first text
    found = summary(Measured([Outcome(sent=1.0, ended=3.0, tokens=4)], 2.0, 1, 0.0), (50,), {"tpot": 1})
    assert found["completion_tokens"] == 4 and found["tpot_ms"] == {} == found["itl_ms"]
    assert found["ttft_ms"]["mean"] == found["e2el_ms"]["mean"] == 2000 and found["good_requests_per_second"] == 0.5


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://x/v1", "http://", "http://x:port/v1", "http://x/v1?a=1"])
def test_what_is_no_address(url: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        target_of(url, None)


def test_addresses() -> None:
    assert target_of("https://api.example.com/v1/", "k") == Target("https://api.example.com/v1", "k")
    assert target_of("http://[::1]:9/", None) == Target("http://[::1]:9", None)
