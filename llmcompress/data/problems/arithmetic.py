"""Multi-digit arithmetic: sums, differences, products. Verified by the inverse operation or, for products, by
remainders.

Casting out nines and elevens is a fallible verifier: about one wrong product in a hundred passes it. That makes the
difference between a verdict and the truth visible in error recall and correct precision.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from llmcompress.data.problems.base import BOX, SHARES, Problem, Split, split_of

_WHOLE = re.compile(r"-? ?(?:[0-9]{1,3}(?:, ?[0-9]{3})+|[0-9]{1,3}(?: [0-9]{3})+|[0-9]+)")


@dataclass(frozen=True)
class Arithmetic:
    """``count`` problems ``a ∘ b`` with up to ``digits`` digits, drawn once from ``seed``.

    Attributes:
        count: Problems of all splits together.
        digits: Digits of each operand, at most.
        operators: Which of ``+ - *``.
        seed: Seed of the problems themselves; the run's seed does not change them.
        exact: Verify products by division instead of remainders, which leaves no wrong product undetected.
    """

    count: int = 6000
    digits: int = 3
    operators: str = "+-*"
    seed: int = 0
    exact: bool = False

    @cached_property
    def _splits(self) -> dict[Split, list[Problem]]:
        rng = random.Random(f"arithmetic:{self.seed}:{self.digits}:{self.operators}")
        found: dict[Split, list[Problem]] = {split: [] for split in SHARES}
        seen: set[str] = set()
        # small settings have fewer problems than asked for
        for _ in range(20 * self.count):
            if len(seen) == self.count:
                break
            operator = rng.choice(self.operators)
            a, b = (rng.randrange(10 ** (rng.randint(1, self.digits) - 1), 10**self.digits) for _ in range(2))
            a, b = (max(a, b), min(a, b))
            key = f"{a}{operator}{b}"
            if key in seen:
                continue
            seen.add(key)
            value = a + b if operator == "+" else a - b if operator == "-" else a * b
            problem = Problem(key, f"What is {a} {operator} {b}?", str(value), {"a": a, "b": b, "operator": operator})
            found[split_of(key)].append(problem)
        return found

    def problems(self, split: Split) -> Sequence[Problem]:
        """Problems of a split."""
        return self._splits[split]

    def check(self, problem: Problem, answer: str | None) -> bool:
        """Whether a whole number, with spaces or thousands commas, is the value."""
        return whole_number(answer) == int(problem.answer)

    def same(self, problem: Problem, first: str, second: str) -> bool:
        """Whether both are the same whole number."""
        value = whole_number(first)
        return value is not None and value == whole_number(second)

    def solution(self, problem: Problem, rng: random.Random) -> str:
        """The value in its box."""
        return f"{BOX}{problem.answer}}}"

    def check_steps(self, problem: Problem, answer: str) -> str:
        """Undo the operation, or compare remainders; the original operation is not done again."""
        value, a, b = whole_number(answer), problem.data["a"], problem.data["b"]
        operator = problem.data["operator"]
        if value is None:
            return "This is not a whole number."
        if operator == "+":
            return f"Subtract {b} from the answer: {value} - {b} = {value - b}. The first number is {a}."
        if operator == "-":
            return f"Add {b} to the answer: {value} + {b} = {value + b}. The first number is {a}."
        if self.exact:
            quotient, rest = divmod(value, b) if b else (0, value)
            return f"Divide by {b}: {value} = {b} * {quotient} + {rest}. The first number is {a}."
        parts = []
        for modulus in (9, 11):
            left, right, got = a % modulus, b % modulus, value % modulus
            parts.append(f"Modulo {modulus}: {left} * {right} gives {left * right % modulus}, the answer {got}.")
        return " ".join(parts)

    def accepts(self, problem: Problem, answer: str) -> bool:
        """The verdict that the steps lead to, which for products by remainders may be wrong."""
        value, a, b = whole_number(answer), problem.data["a"], problem.data["b"]
        if problem.data["operator"] != "*" or self.exact or value is None:
            return self.check(problem, answer)
        return all(a * b % m == value % m for m in (9, 11))


def whole_number(text: str | None) -> int | None:
    """A whole number of at most 40 characters, with or without thousands set apart; None if the text is anything else:
    ``12, 5`` is two numbers and not 125.
    """
    cleaned = (text or "").strip().replace("−", "-")
    if len(cleaned) > 40 or not _WHOLE.fullmatch(cleaned):
        return None
    return int(cleaned.replace(",", "").replace(" ", ""))
