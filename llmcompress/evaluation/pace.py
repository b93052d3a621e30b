"""How far a long measurement is, said now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from llmcompress.events import duration

EVERY = 30.0


class Pace:
    """Turns counts of finished windows into a line every half minute, so that silence always means trouble.

    Args:
        what: What is measured, such as ``dense: heldout``.
        tell: Takes a line.
        every: Seconds between lines; nothing is said of what takes less.
        clock: Seconds that only grow.
    """

    def __init__(
        self,
        what: str,
        tell: Callable[[str], None],
        every: float = EVERY,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._tell, self._every, self._clock = what, tell, every, clock
        self._begun = self._said = clock()

    def __call__(self, done: int, total: int) -> None:
        """Note that ``done`` of ``total`` windows are finished."""
        now = self._clock()
        if now - self._said < self._every or done >= total:
            return
        self._said = now
        left = duration((now - self._begun) / done * (total - done))
        self._tell(f"{self._what}, {done} of {total} windows, about {left} left")
