"""Countdown: write an expression that uses each given number once and equals the target.

Solving is search, checking is evaluation, several answers are right: verification is strictly easier than solution,
    which is what
self-verification needs (S2R; the task is that of Jiayi-Pan/TinyZero, written anew with an exact checker).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

from llmcompress.data.problems.base import BOX, SHARES, Problem, Split, split_of
from llmcompress.data.problems.expressions import ExpressionError, number, numbers, parse, steps

# what the checking text says when the value is not the whole story, in words and compact
WRONG_NUMBERS = ("These are not the given numbers.", "#")
UNREADABLE = ("This is not an expression.", "?")


@dataclass(frozen=True)
class Countdown:
    """All problems with ``count`` numbers from ``low`` to ``high``.

    Every set of numbers and every target that some expression reaches is one problem. Expressions considered are
    chains: an operation on two numbers, then one more number at a time; all values are whole and within 0 … ``limit``.

    Attributes:
        count: Numbers in a problem.
        low, high: Range of the numbers.
        operators: Which of ``+ - *`` may be used.
        limit: Largest target and largest value on the way.
        compact: Question as ``3,5,7:22`` instead of words.
    """

    count: int = 3
    low: int = 1
    high: int = 20
    operators: str = "+-*"
    limit: int = 99
    compact: bool = False

    @cached_property
    def table(self) -> dict[tuple[int, ...], dict[int, tuple[str, ...]]]:
        """Sorted numbers → target → expressions that reach it, each written in one canonical way."""
        found = {}
        for given in itertools.combinations_with_replacement(range(self.low, self.high + 1), self.count):
            reached: dict[int, set[str]] = {}
            for order in sorted(set(itertools.permutations(given))):
                for text, value in self._chains(order):
                    reached.setdefault(value, set()).add(text)
            found[given] = {target: tuple(sorted(reached[target])) for target in sorted(reached)}
        return found

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split, ordered by numbers and target."""
        return self._splits[split]

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        found: dict[Split, list[Problem]] = {split: [] for split in SHARES}
        for given, reached in self.table.items():
            for target in reached:
                key = f"{','.join(map(str, given))}:{target}"
                found[split_of(key)].append(self._problem(given, target, key))
        return found

    def _problem(self, given: tuple[int, ...], target: int, key: str) -> Problem:
        # the order shown is no hint: it is the sorted one
        question = key if self.compact else (
            f"Use the numbers {', '.join(map(str, given))}, each exactly once, with {' '.join(self.operators)} and "
            f"parentheses to make {target}."
        )  # fmt: skip
        return Problem(key, question, data={"numbers": list(given), "target": target})

    def check(self, problem: Problem, answer: str | None) -> bool:
        """Whether an expression has the target's value, uses exactly the given numbers and only allowed operators."""
        wanted = (problem.data["target"], sorted(problem.data["numbers"]), True)
        return self._judged(answer or "") == wanted

    def same(self, problem: Problem, first: str, second: str) -> bool:
        """Whether two expressions have the same value and use the same numbers: all that the check looks at."""
        judged = self._judged(first)
        return judged is not None and judged == self._judged(second)

    def _judged(self, answer: str) -> tuple[Fraction, list[int], bool] | None:
        """Value, numbers in order of size and whether only allowed operators are used; None where it is unreadable."""
        try:
            node = parse(answer)
        except ExpressionError:
            return None
        return node.value, sorted(numbers(node)), {step.operator for step in steps(node)} <= set(self.operators)

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """One of the canonical expressions, in its box."""
        return f"{BOX}{rng.choice(self.table[tuple(problem.data['numbers'])][problem.data['target']])}}}"

    def check_steps(self, problem: Problem, answer: str) -> str:
        """Evaluate the proposed expression step by step; say whether value and numbers are those asked for."""
        try:
            node = parse(answer)
        except ExpressionError:
            return UNREADABLE[self.compact]
        done, target = list(map(str, steps(node))) or [number(node.value)], problem.data["target"]
        own = sorted(numbers(node)) == sorted(problem.data["numbers"])
        if self.compact:
            return f"{','.join(done)};{target}" if own else f"{','.join(done)}{WRONG_NUMBERS[1]}"
        text = f"I evaluate it: {', '.join(done)}."
        return f"{text} The target is {target}." if own else f"{text} {WRONG_NUMBERS[0]}"

    def random_expression(self, rng: random.Random) -> str:
        """A canonical expression of random numbers, for teaching a model to read expressions."""
        while True:
            given = tuple(rng.randint(self.low, self.high) for _ in range(self.count))
            found = list(self._chains(given))
            if found:
                return rng.choice(found)[0]

    def _chains(self, order: tuple[int, ...]) -> Iterator[tuple[str, int]]:
        """Canonical expressions over numbers in this order, with their values."""
        partial = [(str(order[0]), order[0])]
        for position, n in enumerate(order[1:], start=1):
            grown = []
            for text, value in partial:
                inner = text if position == 1 else f"({text})"
                grown += [(t, v) for t, v in self._combine(inner, value, n, position) if 0 <= v <= self.limit]
            partial = grown
        yield from partial

    def _combine(self, inner: str, value: int, n: int, position: int) -> Iterator[tuple[str, int]]:
        # of a+b and b+a one is enough: at the first operation the larger number comes first, later the chain does
        first_smaller = position == 1 and value < n
        for operator in self.operators:
            if operator == "+" and not first_smaller:
                yield f"{inner}+{n}", value + n
            elif operator == "*" and not first_smaller:
                yield f"{inner}*{n}", value * n
            elif operator == "-":
                yield f"{inner}-{n}", value - n
                if position > 1:
                    yield f"{n}-{inner}", n - value
