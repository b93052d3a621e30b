"""Recipe sections that name a family of problems."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmcompress.data.problems.base import ProblemSet
from llmcompress.section import Section


class CountdownTask(Section):
    """Reach a target with given numbers."""

    kind: Literal["countdown"]

    numbers: Annotated[int, Field(ge=2, le=5)] = 3
    """How many numbers a problem gives."""

    low: Annotated[int, Field(ge=0)] = 1
    """Smallest number."""

    high: Annotated[int, Field(ge=1)] = 20
    """Largest number."""

    operators: Annotated[str, Field(pattern=r"^[+*-]{1,3}$")] = "+-*"
    """Operators that may be used."""

    limit: Annotated[int, Field(ge=1)] = 99
    """Largest target, and largest value on the way to it."""

    compact: bool = False
    """Questions as ``3,5,7:22``, for models that know no words."""

    @model_validator(mode="after")
    def _ordered(self) -> CountdownTask:
        if self.low > self.high:
            raise ValueError("low is above high")
        return self

    def build(self) -> ProblemSet:
        """The problems."""
        from llmcompress.data.problems.countdown import Countdown

        return Countdown(self.numbers, self.low, self.high, self.operators, self.limit, self.compact)


class ArithmeticTask(Section):
    """Multi-digit sums, differences and products."""

    kind: Literal["arithmetic"]

    count: Annotated[int, Field(ge=10)] = 6000
    """Problems of all splits together."""

    digits: Annotated[int, Field(ge=1, le=12)] = 3
    """Digits of each operand, at most."""

    operators: Annotated[str, Field(pattern=r"^[+*-]{1,3}$")] = "+-*"
    """Operators that occur."""

    exact: bool = False
    """Verify products by division; by default remainders modulo 9 and 11, which miss about one error in a hundred."""

    def build(self) -> ProblemSet:
        """The problems."""
        from llmcompress.data.problems.arithmetic import Arithmetic

        return Arithmetic(self.count, self.digits, self.operators, exact=self.exact)


class WordTask(Section):
    """Templated word problems."""

    kind: Literal["word_problems"]

    count: Annotated[int, Field(ge=10)] = 4000
    """Problems of all splits together."""

    sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=10**6)], ...], Field(min_length=1)] = (1,)
    """How many times as large the numbers are; each problem takes one of these. Larger ones are harder to solve."""

    brief: bool = False
    """Solutions and verifications in formulas alone; verifications work in columns, a digit at a time, attempts do
    not."""

    def build(self) -> ProblemSet:
        """The problems."""
        from llmcompress.data.problems.word_problems import WordProblems

        return WordProblems(self.count, sizes=self.sizes, brief=self.brief)


class FileTask(Section):
    """Problems from JSON lines, such as GSM8K and MATH."""

    kind: Literal["file"]

    path: Annotated[str, Field(min_length=1)]
    """Rows for training and validation; ``.gz`` and ``.xz`` are read as they are."""

    test_path: str | None = None
    """Rows of the test split; by default a share of ``path``."""

    form: Literal["gsm8k", "math"] = "gsm8k"
    """``gsm8k``: the answer stands behind ``####``. ``math``: in the field ``answer``, else in the last box of
    ``solution``."""

    math: bool = False
    """Compare answers with math-verify (extra ``math``)."""

    checker: str | None = None
    """Compare answers with a function of your own: the name of an entry point in the group ``llmcompress.checkers`` of
    an installed package. It gets question, gold answer and answer, and says whether the latter is right."""

    @model_validator(mode="after")
    def _one_way(self) -> FileTask:
        if self.checker is not None and self.math:
            raise ValueError("checker and math are two ways to compare: give one")
        return self

    def build(self) -> ProblemSet:
        """The problems.

        Raises:
            EnvironmentProblem: No installed package has the checker, or it cannot be loaded.
        """
        from llmcompress.data.problems.files import FileProblems, checker

        own = None if self.checker is None else checker(self.checker)
        return FileProblems(self.path, self.test_path, self.form, self.math, own)


Task = Annotated[CountdownTask | ArithmeticTask | WordTask | FileTask, Field(discriminator="kind")]
