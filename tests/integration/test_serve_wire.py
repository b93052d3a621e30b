"""What comes over a socket and is no proper request: senders that are slow, or stop in the middle."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llmcompress.serving.limits import Limits
from llmcompress.serving.protocol import ChatAsk, CompletionAsk, DetokenizeAsk, TokenizeAsk

PATIENCE = 120.0
LIMITS = Limits(rows=4, cache_tokens=256, prompt_tokens=64, new_tokens=32, read_seconds=PATIENCE)
BODY = json.dumps({"model": "tiny", "prompt": "The cat", "max_tokens": 2}).encode()
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()


@pytest.fixture(scope="module")
def served(tiny_tokenizer: Any, tiny_llama: Any) -> Any:
    from llmcompress.serving.served import serve_model

    words = copy.deepcopy(tiny_tokenizer)
    words.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return serve_model(tiny_llama(len(words)), words, "tiny", LIMITS, native=False)


@pytest.fixture
def server(served: Any, start_server: Any) -> Iterator[Any]:
    """One that waits."""
    running = start_server(served, LIMITS)
    yield running
    running.stop()


@pytest.fixture
def hasty(served: Any, start_server: Any) -> Iterator[Any]:
    """One that does not. A client of a busy machine may be slower than it means to be: what it gets in time, it gets at
    some try."""
    running = start_server(served, replace(LIMITS, read_seconds=0.5))
    yield running
    running.stop()


# values that some field takes, written as JSON, and some that none does
VALUES = [
    "null", "true", "0", "-1", "3", "1e999", "NaN", "1" + "0" * 400, '"x"', '"\\ud83d"', '""', "[]", "[5]",
    "[[5], [6]]",
    "{}", '{"5": 100}', '{"type": "json_object"}', '{"regex": "[ab]{3}"}', '{"json": {"type": "nothing"}}', "[" * 900,
    '[{"role": "user", "content": [{"type": "text", "text": "x"}]}]', '{"include_usage": true}', "0.5", '"required"',
]  # fmt: skip


@pytest.mark.parametrize("kind", [CompletionAsk, ChatAsk, TokenizeAsk, DetokenizeAsk])
def test_whatever_a_field_holds_the_answer_has_a_status_and_the_server_lives(server: Any, kind: Any) -> None:
    path, good = {
        CompletionAsk: ("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 2}),
        ChatAsk: ("/v1/chat/completions", {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}),
        TokenizeAsk: ("/tokenize", {"prompt": "x"}),
        DetokenizeAsk: ("/detokenize", {"tokens": [5]}),
    }[kind]
    draws, statuses = random.Random(0), set()
    for field in kind.model_fields:
        for value in (VALUES[0], *draws.sample(VALUES, 4)):
            fields = {name: json.dumps(given) for name, given in good.items()} | {field: value}
            body = "{" + ", ".join(f'"{name}": {given}' for name, given in fields.items()) + "}"
            status, answer = server.raw(path, body.encode())
            # 501 where the library of structured outputs is missing
            assert status in (200, 400, 404, 501), (body, answer)
            assert status == 200 or answer["error"]["message"], body
            statuses.add(status)
    assert {200, 400} <= statuses and server.raw("/healthz")[0] == 200 and server.idle()


def exchange(server: Any, *parts: bytes) -> bytes:
    """All that the server says until it closes the connection."""
    said = b""
    # it may have been left before it has sent all
    with (
        contextlib.suppress(ConnectionError),
        socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as wire,
    ):
        for part in parts:
            wire.sendall(part)
        while piece := wire.recv(1 << 16):
            said += piece
    return said


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ((HEAD[:40],), "the head of the request took longer than 0.5 seconds"),
        ((HEAD, BODY[:10]), "the body took longer than 0.5 seconds"),
        ((HEAD,), "the body took longer than 0.5 seconds"),
        (
            (b'POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n5\r\n{"mod',),
            "the body took",
        ),
    ],
)
def test_who_stops_in_the_middle_gets_408_and_is_left(hasty: Any, parts: tuple[bytes, ...], words: str) -> None:
    said = b""

    def late() -> bool:
        nonlocal said
        said = exchange(hasty, *parts)
        return words.encode() in said

    assert hasty.comes(late), said
    head, _, body = said.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head.lower()
    assert json.loads(body)["error"]["code"] == "request_timeout"


def test_who_says_nothing_or_stops_between_two_requests_is_left_without_a_word(hasty: Any) -> None:
    assert exchange(hasty) == b""

    def two() -> bool:
        said = exchange(hasty, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /he")
        return said.count(b"HTTP/1.1 ") == 1 and said.startswith(b"HTTP/1.1 200 ")

    assert hasty.comes(two)


def test_who_has_sent_all_may_wait_longer(hasty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hasty.server.metrics, "step", lambda rows, seconds: time.sleep(1.2))
    request = HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close") + BODY
    assert hasty.comes(lambda: exchange(hasty, request).startswith(b"HTTP/1.1 200 "))


def test_requests_that_come_in_one_piece_are_answered_in_order(server: Any) -> None:
    health = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    said = exchange(server, HEAD + BODY + health + last)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", said) == [b"200", b"200", b"404"]
    assert server.raw("/healthz")[0] == 200
