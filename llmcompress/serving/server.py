"""Runs the application: binds, tells, drains on SIGTERM."""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import signal
import socket
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from llmcompress.errors import InputError, UsageError
from llmcompress.serving.app import Service, application
from llmcompress.serving.guard import ACCESS
from llmcompress.serving.limits import Limits
from llmcompress.serving.metrics import Metrics
from llmcompress.serving.protocol import ApiError
from llmcompress.serving.scheduler import Scheduler
from llmcompress.serving.served import Served

# connections that the kernel may hold for us
BACKLOG = 512


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address; names other than ``localhost`` count as others."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_access(host: str, api_key: str | None) -> None:
    """Refuse to be open to others without a key.

    Raises:
        UsageError: The address is not loopback and there is no key, or the key cannot be a header.
    """
    if api_key is None and not is_loopback(host):
        raise UsageError(
            f"--host {host}: others could use this server, which needs an API key",
            "set LLMCOMPRESS_API_KEY, or use --host 127.0.0.1",
        )
    if api_key is not None and (len(api_key) < 8 or not all(33 <= ord(c) < 127 for c in api_key)):
        raise UsageError("the API key needs at least 8 visible ASCII characters")


def bind(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        InputError: The address does not exist or is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind((host, port))
            bound.listen(BACKLOG)
        except OSError:
            bound.close()
            raise
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{host}:{port}: {reason.lower()}", "choose another --host or --port") from error
    return bound


class Server:
    """A server that has not begun to listen to requests yet.

    Args:
        served: Models and their batches.
        limits: Bounds.
        api_key: Asked of every request, None for no key.
        access_log: Whether each request gets a line on stderr.
        parser: How thoughts are told from answers; see :func:`~llmcompress.serving.thoughts.thinking_of`.
        origins: Of pages whose scripts may read answers.
    """

    def __init__(
        self, served: Served, limits: Limits, api_key: str | None, access_log: bool = False, parser: str = "auto",
        origins: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._access_log = access_log
        self.metrics = Metrics()
        self.scheduler = Scheduler(served.groups, limits, self.metrics)
        service = Service(served.models, self.scheduler, limits, self.metrics, parser)
        config = uvicorn.Config(
            application(service, api_key, origins), http=patient(limits.read_seconds),
            log_config=None, access_log=False,
            lifespan="off", server_header=False, limit_concurrency=limits.connections, backlog=BACKLOG,
            timeout_keep_alive=30, timeout_graceful_shutdown=max(1, round(limits.drain_seconds)),
            h11_max_incomplete_event_size=1 << 16,
        )  # fmt: skip
        self._uvicorn = _Draining(config, self.scheduler.drain)

    def run(self, bound: socket.socket) -> None:
        """Serve until :meth:`shut` or a signal; returns when running answers have ended or their time is over."""
        # tracebacks of what fails inside; clients get a status only
        for name in ("uvicorn.error", "llmcompress.serving"):
            _to_stderr(logging.getLogger(name), logging.ERROR)
        if self._access_log:
            _to_stderr(ACCESS, logging.INFO, "%(asctime)s %(message)s")
        # uvicorn raises the signal again when it is done, which would end the process before we have cleaned up
        before = _quiet_signals()
        try:
            self._uvicorn.run(sockets=[bound])
        finally:
            self.scheduler.stop()
            for number, handler in before.items():
                signal.signal(number, handler)

    def shut(self) -> None:
        """Begin to drain, from any thread."""
        self.scheduler.drain()
        self._uvicorn.should_exit = True

    @property
    def started(self) -> bool:
        """Whether requests are taken."""
        return bool(self._uvicorn.started)


class _Draining(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, drain: Callable[[], None]) -> None:
        super().__init__(config)
        self._drain = drain

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """First signal: take nothing new, finish what runs. Second Ctrl-C: stop at once."""
        self._drain()
        super().handle_exit(sig, frame)


def patient(seconds: float) -> type[asyncio.Protocol]:
    """A connection whose client has this many seconds to send the head of a request: uvicorn itself waits for ever.

    Who has begun one gets status 408, who has said nothing is left without a word.
    """

    class Patient(AutoHTTPProtocol):  # type: ignore[misc, valid-type]
        _late: asyncio.TimerHandle | None = None
        _heard = False

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self._watch()

        def data_received(self, data: bytes) -> None:
            self._heard = True
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._stop()

        def _watch(self) -> None:
            """The clock runs while no request is read or answered."""
            if self.cycle is not None and not self.cycle.response_complete:
                self._stop()
            elif self._late is None:
                self._late = self.loop.call_later(seconds, self._leave)

        def _stop(self) -> None:
            if self._late is not None:
                self._late.cancel()
                self._late = None

        def _leave(self) -> None:
            if self.transport.is_closing():
                return
            # between two requests nobody waits for an answer
            if self._heard and self.cycle is None:
                text = f"the head of the request took longer than {seconds:g} seconds"
                body = json.dumps(ApiError(408, text, "request_timeout").body())
                head = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\nConnection: close"
                self.transport.write(f"HTTP/1.1 408 Request Timeout\r\n{head}\r\n\r\n{body}".encode())
            self.transport.close()

    return Patient


def _to_stderr(logger: logging.Logger, level: int, form: str = "%(message)s") -> None:
    """Have a logger write to stderr from a level on, unless somebody has seen to where it writes."""
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(form))
        logger.addHandler(handler)


def _quiet_signals() -> dict[int, Any]:
    import threading

    if threading.current_thread() is not threading.main_thread():
        return {}
    numbers = (signal.SIGTERM, signal.SIGINT)
    return {number: signal.signal(number, lambda *_: None) for number in numbers}
