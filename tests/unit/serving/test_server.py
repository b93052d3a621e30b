from __future__ import annotations

import socket

import pytest

pytest.importorskip("uvicorn")

from llmcompress.errors import InputError, UsageError
from llmcompress.serving.server import bind, check_access, is_loopback


@pytest.mark.parametrize(
    ("host", "expected"),
    [("127.0.0.1", True), ("127.8.8.8", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("::", False),
     ("10.0.0.1", False), ("example.org", False)],
)  # fmt: skip
def test_only_this_machine_is_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_others_need_a_key() -> None:
    check_access("127.0.0.1", None)
    check_access("0.0.0.0", "long-enough")
    for host, key in (("0.0.0.0", None), ("0.0.0.0", "short"), ("127.0.0.1", "ümlaut-in-a-key")):
        with pytest.raises(UsageError):
            check_access(host, key)


def test_a_taken_port_is_said_so() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(InputError, match="address already in use"):
        bind("127.0.0.1", taken.getsockname()[1])
