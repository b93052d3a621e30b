"""Around the application: the key, sizes of bodies, slow senders, readers that take nothing, counting. Plain ASGI."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import time
from typing import TYPE_CHECKING, Any

from starlette.responses import JSONResponse

from llmcompress.serving.protocol import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from llmcompress.serving.limits import Limits
    from llmcompress.serving.metrics import Metrics

# says nothing unless a server is asked to
ACCESS = logging.getLogger("llmcompress.access")
ACCESS.setLevel(logging.WARNING)
# how many times the limit is read of a body before its sender is cut off
PATIENCE = 8
# the second name is that of other servers
HEALTH = ("/healthz", "/health")
ENDPOINTS = (*HEALTH, "/metrics", "/v1/models", "/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize")


class Unread(ApiError):
    """The rest of the body will not be read: it goes on beyond the limit, or takes too long."""


class Guard:
    """Wraps an application.

    Args:
        app: Inside.
        limits: ``body_bytes``, ``read_seconds`` and ``write_seconds``.
        metrics: Counts requests.
        api_key: Needed everywhere but at :data:`HEALTH`; None for no key.
    """

    def __init__(self, app: ASGIApp, limits: Limits, metrics: Metrics, api_key: str | None) -> None:
        self._app, self._limits, self._metrics, self._key = app, limits, metrics, api_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            try:
                await asyncio.wait_for(send(message), self._limits.write_seconds)
            except TimeoutError as error:
                raise OSError("the reader takes nothing") from error

        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._discard(receive), self._limits.read_seconds)
                await _answer(refusal)(scope, receive, watched)
            else:
                await self._inside(scope, receive, watched)
        except OSError:
            # the connection is closed by the server when its application ends early
            pass
        finally:
            path = scope["path"]
            known = path if path in ENDPOINTS else "/v1/models" if path.startswith("/v1/models/") else "other"
            seconds = time.monotonic() - began
            self._metrics.request(known, status, seconds)
            # paths that are not ours may hold anything, line ends too
            ACCESS.info("%s %s %d %.3f s", scope["method"], known, status, seconds)

    async def _discard(self, receive: Receive) -> None:
        """Read some of a body that nobody wants: a connection closed on unread bytes may lose the answer."""
        left = PATIENCE * self._limits.body_bytes
        while left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body"):
                return

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(scope["headers"])
        if self._key is not None and scope["path"] not in HEALTH:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self._key.encode()):
                text = "incorrect API key" if given else "no API key: send Authorization: Bearer KEY"
                return ApiError(401, text, "invalid_api_key", kind="authentication_error")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self._limits.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> Unread:
        return Unread(413, f"the body exceeds {self._limits.body_bytes} bytes", "request_too_large")

    async def _inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken, more, started = 0, True, False
        deadline = time.monotonic() + self._limits.read_seconds

        async def counted() -> Message:
            nonlocal taken, more
            try:
                # after the body the application waits for the client to go, which may be never
                message = await asyncio.wait_for(receive(), deadline - time.monotonic() if more else None)
            except TimeoutError as error:
                text = f"the body took longer than {self._limits.read_seconds:g} seconds"
                raise Unread(408, text, "request_timeout") from error
            more = bool(message.get("more_body"))
            taken += len(message.get("body", b""))
            if taken > self._limits.body_bytes:
                raise self._too_large()
            return message

        async def noticed(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, counted, noticed)
        except Unread as error:
            if not started:
                await _answer(error)(scope, receive, send)


def _answer(error: ApiError) -> Any:
    extra = {"WWW-Authenticate": "Bearer"} if error.status == 401 else {"Connection": "close"}
    return JSONResponse(error.body(), error.status, headers=extra)
