"""What every family of problems offers: problems by split, an exact check, solutions and verifications by program."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Split = Literal["pretrain", "train", "validation", "test"]

# by hash of the key, so that no seed and no order of generation can leak a problem. A base model trained from scratch
# on the problems that S2R learns from would know them by heart and make no mistakes to learn from: it gets its own.
SHARES: dict[Split, float] = {"test": 0.12, "validation": 0.06, "train": 0.37, "pretrain": 0.45}
BOX = "\\boxed{"


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem.

    Attributes:
        key: What identifies it independently of its wording (numbers and target); splits go by it.
        question: Text shown to the model.
        answer: Gold answer in text, empty where only a checker knows (many answers are right).
        data: Facts for the checker and the verifier.
    """

    key: str
    question: str
    answer: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class ProblemSet(Protocol):
    """A family of problems with an exact checker."""

    def problems(self, split: Split) -> Sequence[Problem]:
        """All problems of a split, in a fixed order."""

    def check(self, problem: Problem, answer: str | None) -> bool:
        """Whether the content of a box is a right answer; None and unreadable text are wrong."""

    def same(self, problem: Problem, first: str, second: str) -> bool:
        """Whether the checker takes two answers, right or wrong, for one written in two ways."""

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """Text of a right solution that ends in its box.

        Raises:
            NotImplementedError: The family has problems only (files).
        """

    def check_steps(self, problem: Problem, answer: str) -> str:
        """Text that tests an answer without solving the problem again; it states facts and no verdict.

        Raises:
            NotImplementedError: No program can do it; another verifier is needed.
        """


class ReadBack(ProblemSet, Protocol):
    """A family whose program also writes the arithmetic of verifications by itself."""

    def read_back(self, problem: Problem, rng: random.Random) -> tuple[str, str]:
        """An attempt, right or wrong, and the steps that test its answer, without a verdict."""


def split_of(key: str) -> Split:
    """Split of a problem, from the SHA-256 of its key alone."""
    place = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) / 2**64
    for split, share in SHARES.items():
        if place < share:
            return split
        place -= share
    return "pretrain"


def boxed(text: str) -> str | None:
    r"""Content of the complete ``\boxed{…}`` that closes last, None if there is none.

    One that was never closed hides none of those behind it.

    Args:
        text: Text of one attempt. Boxes in other actions are not its answer; the caller cuts the text.
    """
    found, opened = None, []
    for brace in re.finditer(r"(\\boxed)?\{|\}", text):
        if brace[0] != "}":
            opened.append(brace.end() if brace[1] else None)
        elif opened:
            begin = opened.pop()
            found = text[begin : brace.start()] if begin is not None else found
    return found
