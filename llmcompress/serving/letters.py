"""From the thread that decodes to the event loop of the readers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmcompress.serving.scheduler import Piece


class Letters:
    """Takes pieces of answers from the thread that decodes to the event loop: those of one step together, as waking the
    loop for each of them costs more than the rest of what is done for it.
    """

    def __init__(self) -> None:
        self._written: list[tuple[asyncio.Queue[tuple[int, Piece]], int, Piece]] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def put(
        self, loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue[tuple[int, Piece]], index: int, piece: Piece
    ) -> None:
        """One more, on the thread that decodes.

        Raises:
            RuntimeError: The reader's loop has closed.
        """
        if loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._loop = loop
        self._written.append((pieces, index, piece))

    def post(self) -> None:
        """Let the loop have them, on the same thread."""
        if not self._written or self._loop is None:
            return
        written, self._written = self._written, []
        # a loop that has closed since has no readers
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(_deliver, written)


def _deliver(written: Sequence[tuple[asyncio.Queue[tuple[int, Piece]], int, Piece]]) -> None:
    for pieces, index, piece in written:
        pieces.put_nowait((index, piece))
