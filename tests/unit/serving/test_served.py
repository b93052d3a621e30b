"""How many sequences a cache has places for."""

from __future__ import annotations

import pytest

from llmcompress.serving.limits import Limits
from llmcompress.serving.served import _places


@pytest.mark.parametrize(
    ("rows", "tokens", "longest", "expected"),
    [
        # one step's sequences at least, shorter ones if need be
        (64, 65536, 100_000, (8192, 8)),
        (64, 8, 100, (1, 8)),
        (3, 65536, 4096, (4096, 3)),
        (64, 65536, 1024, (1024, 64)),
        # a second pass for one to three sequences is not worth its time
        (64, 9 * 7000, 7000, (7000, 8)),
        (64, 11 * 500, 500, (500, 8)),
        (64, 12 * 500, 500, (500, 12)),
        (18, 65536, 500, (500, 16)),
    ],
)
def test_places_of_a_cache(rows: int, tokens: int, longest: int, expected: tuple[int, int]) -> None:
    assert _places(Limits(rows=rows, cache_tokens=tokens), longest, 8) == expected
