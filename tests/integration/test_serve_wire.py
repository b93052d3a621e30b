"""What comes over a socket and is no proper request: senders that are slow, or stop in the middle."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llmcompress.serving.limits import Limits

PATIENCE = 120.0
BODY = json.dumps({"model": "tiny", "prompt": "The cat", "max_tokens": 2}).encode()
HEAD = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n\r\n".encode()


@pytest.fixture(scope="module")
def server(tiny_tokenizer: Any, tiny_llama: Any, start_server: Any) -> Iterator[Any]:
    from llmcompress.serving.served import serve_model

    limits = Limits(rows=4, cache_tokens=256, prompt_tokens=64, new_tokens=32, read_seconds=0.5)
    served = serve_model(tiny_llama(len(tiny_tokenizer)), tiny_tokenizer, "tiny", limits, native=False)
    running = start_server(served, limits)
    yield running
    running.stop()


def exchange(server: Any, *parts: bytes) -> bytes:
    """All that the server says until it closes the connection."""
    said = b""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as wire:
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
def test_who_stops_in_the_middle_gets_408_and_is_left(server: Any, parts: tuple[bytes, ...], words: str) -> None:
    head, _, body = exchange(server, *parts).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and b"connection: close" in head.lower()
    error = json.loads(body)["error"]
    assert words in error["message"] and error["code"] == "request_timeout"


def test_who_says_nothing_or_stops_between_two_requests_is_left_without_a_word(server: Any) -> None:
    assert exchange(server) == b""
    said = exchange(server, b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n", b"GET /he")
    assert said.count(b"HTTP/1.1 ") == 1 and said.startswith(b"HTTP/1.1 200 ")


def test_who_has_sent_all_may_wait_longer(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.server.metrics, "step", lambda rows, seconds: time.sleep(1.2))
    said = exchange(server, HEAD.replace(b"Host: x", b"Host: x\r\nConnection: close") + BODY)
    assert said.startswith(b"HTTP/1.1 200 ")


def test_requests_that_come_in_one_piece_are_answered_in_order(server: Any) -> None:
    health = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
    last = b"GET /v1/nothing HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    said = exchange(server, HEAD + BODY + health + last)
    assert re.findall(rb"HTTP/1\.1 (\d+) ", said) == [b"200", b"200", b"404"]
    assert server.raw("/healthz")[0] == 200
