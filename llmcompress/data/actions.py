"""The texts by which a response is cut into actions, and whole responses put together from them."""

from __future__ import annotations

from collections.abc import Sequence

CHECK = "\n\nWait, let me recheck my solution.\n\n"
RETRY = "\n\nLet me try again.\n\n"
CORRECT = "Therefore, the answer is correct."
INCORRECT = "Therefore, the answer is incorrect."


def verdict(correct: bool) -> str:
    """The sentence a verification ends with."""
    return CORRECT if correct else INCORRECT


def response(trials: Sequence[tuple[str, str]]) -> str:
    """Text of a response from (attempt, verification) pairs, without the end token."""
    return RETRY.join(f"{solve}{CHECK}{verification}" for solve, verification in trials)
