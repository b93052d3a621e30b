from __future__ import annotations

from llmcompress.evaluation.pace import Pace


def test_a_line_now_and_then_with_the_time_that_is_left() -> None:
    lines: list[str] = []
    now = [100.0]
    pace = Pace("dense: heldout", lines.append, every=30, clock=lambda: now[0])
    for done in range(1, 11):
        now[0] += 12
        pace(done, 10)
    # after 36, 72 and 108 seconds; the end speaks for itself
    assert lines == [
        "dense: heldout, 3 of 10 windows, about 1 min 24 s left",
        "dense: heldout, 6 of 10 windows, about 48 s left",
        "dense: heldout, 9 of 10 windows, about 12 s left",
    ]


def test_what_is_over_soon_says_nothing() -> None:
    lines: list[str] = []
    pace = Pace("x", lines.append, every=30, clock=lambda: 0.0)
    pace(1, 2)
    pace(2, 2)
    assert lines == []
