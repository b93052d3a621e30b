"""Problems from JSON lines: GSM8K, MATH and files of the same shape. Answers in LaTeX are compared by math-verify, if
installed.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from llmcompress.data.problems.base import Problem, Split, boxed, split_of
from llmcompress.data.problems.mathematics import math_equal
from llmcompress.errors import EnvironmentProblem, InputError

# characters of an answer that is worth comparing
LONGEST = 400
_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d+)?|\.\d+)(?:/\d+)?")


Checker = Callable[[str, str, str], bool]
"""Question, gold answer and the content of a box → whether that is a right answer. Called for every answer that is not
the gold one to the letter, also for nonsense."""


def checker(name: str) -> Checker:
    """The checker that an installed package brings.

    Raises:
        EnvironmentProblem: There is none of that name, or it cannot be loaded or called.
    """
    from llmcompress.plugins import CHECKERS, discover, names

    if name not in names(CHECKERS):
        known = ", ".join(names(CHECKERS)) or "none is installed"
        raise EnvironmentProblem(
            f"no checker {name!r} ({known})",
            f'a package brings one by [project.entry-points."{CHECKERS}"] in its pyproject.toml',
        )
    found = discover(CHECKERS)[name]
    if not callable(found):
        raise EnvironmentProblem(f"checker {name!r} is a {type(found).__name__}, not a function", "correct its package")
    own: Checker = found
    return own


@dataclass(frozen=True)
class FileProblems:
    """Rows of a file.

    Attributes:
        path: JSON lines, ``.gz`` and ``.xz`` too. Its rows are training and validation problems, by hash of the
            question.
        test_path: File of the test split, whose questions are left out of ``path``; without it the test split comes
            out of ``path`` too.
        form: ``gsm8k`` takes the text behind ``####`` as the answer, ``math`` the field ``answer`` or the last box of
            ``solution``.
        math: Compare with math-verify (fractions, sets, units in LaTeX); otherwise as exact numbers or equal text.
        own: Compare with this function instead.
    """

    path: str
    test_path: str | None = None
    form: Literal["gsm8k", "math"] = "gsm8k"
    math: bool = False
    own: Checker | None = None

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        learned: tuple[Split, ...] = ("train", "validation")
        found: dict[Split, list[Problem]] = {"pretrain": [], "train": [], "validation": [], "test": []}
        for problem in self._read(self.path):
            split = split_of(problem.key)
            # a model from elsewhere needs no pretraining problems, and a test file leaves these rows free for training
            split = "train" if split == "pretrain" or (split == "test" and self.test_path) else split
            found[split].append(problem)
        if self.test_path:
            found["test"] = self._read(self.test_path)
            # a question of both files is a test question: nothing may learn it
            asked = {problem.key for problem in found["test"]}
            for split in learned:
                found[split] = [problem for problem in found[split] if problem.key not in asked]
        return found

    def _read(self, path: str) -> list[Problem]:
        from llmcompress.data.documents import read_objects

        return [self._problem(row, where) for where, row in read_objects(path)]

    def _problem(self, row: dict[str, Any], where: str) -> Problem:
        question = str(row.get("question") or row.get("problem") or "").strip()
        if self.form == "gsm8k":
            _, mark, behind = str(row.get("answer", "")).rpartition("####")
            answer = behind.strip().replace(",", "") if mark else ""
        else:
            answer = str(row.get("answer") or _solved(str(row.get("solution", ""))) or "").strip()
        if not question or not answer:
            raise InputError(f"{where}: no question or no answer", f"set form to what the file holds, not {self.form}")
        return Problem(question, question, answer)

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split."""
        return self._splits[split]

    def check(self, problem: Problem, answer: str | None) -> bool:
        """Whether the content of a box equals the gold answer.

        Raises:
            EnvironmentProblem: ``math`` is set and math-verify is missing, or the checker of a package fails.
        """
        if answer is None or len(answer) > LONGEST:
            return False
        if self.own is None or same_text(problem.answer, answer):
            return self.same(problem, problem.answer, answer)
        try:
            return bool(self.own(problem.question, problem.answer, answer))
        except Exception as error:  # somebody else's function may raise anything
            raise EnvironmentProblem(
                f"the checker fails on the answer {answer!r}: {type(error).__name__}: {error}",
                "let it return False for what it cannot read",
            ) from error

    def same(self, problem: Problem, first: str, second: str) -> bool:
        """Whether two answers are equal as numbers or text, or by math-verify where ``math`` is set and neither is
        longer than :data:`LONGEST`.

        Raises:
            EnvironmentProblem: ``math`` is set and math-verify is missing.
        """
        if same_text(first, second):
            return True
        return self.math and max(len(first), len(second)) <= LONGEST and math_equal(first, second)

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """No program can write one: raises ``NotImplementedError``."""
        raise NotImplementedError("solutions of problems from a file come from the model")

    def check_steps(self, problem: Problem, answer: str) -> str:
        """No program can test one: raises ``NotImplementedError``."""
        raise NotImplementedError("problems from a file need verifier.kind: openai")


def _solved(solution: str) -> str | None:
    r"""Answer of a solution of MATH: some have ``\fbox{…}``, and some ``\boxed 5`` without braces."""
    found = boxed(solution.replace("\\fbox{", "\\boxed{"))
    bare = re.findall(r"\\boxed +([^ $]+)", solution)
    return found if found is not None or not bare else str(bare[-1])


def same_text(gold: str, answer: str) -> bool:
    """Equal as exact numbers (``1,000`` = ``1000.0`` = ``2000/2``), or as text without spaces, dollar and percent
    signs.
    """
    shown = (text.replace("−", "-") for text in (gold, answer))
    a, b = (re.sub(r"\\?[$%]|\\[ ,!]|\s|,(?=\d{3}(?!\d))", "", text).rstrip(".") for text in shown)
    if _NUMBER.fullmatch(a) and _NUMBER.fullmatch(b):
        try:
            return _value(a) == _value(b)
        except ZeroDivisionError:
            return False
    return bool(a) and a == b


def _value(text: str) -> Fraction:
    # of ``1.5/2`` Fraction takes either the point or the line
    over, _, under = text.partition("/")
    return Fraction(over) / int(under or "1")
