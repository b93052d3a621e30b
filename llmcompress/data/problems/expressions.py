"""Arithmetic expressions, read by a parser of our own: exact values, the numbers used, the steps of evaluation.

Nothing is ever passed to ``eval``. Values are :class:`fractions.Fraction`, so no check depends on rounding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

# longer or deeper texts are no honest answer, and a parser must not be made to overflow its stack
MAX_LENGTH, MAX_DEPTH = 400, 40
MAX_DIGITS = 18
_TOKEN = re.compile(r"\s*(?:(\d+)|(.))", re.DOTALL)


class ExpressionError(ValueError):
    """The text is not an expression, or has no value."""


@dataclass(frozen=True, slots=True)
class Node:
    """A number (no operator) or an operation on two nodes.

    Attributes:
        value: Exact value.
        operator: One of ``+ - * /``, empty for a number.
        left, right: Operands, None for a number.
    """

    value: Fraction
    operator: str = ""
    left: Node | None = None
    right: Node | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """One operation in the order of evaluation: ``left operator right = value``."""

    left: Fraction
    operator: str
    right: Fraction
    value: Fraction

    def __str__(self) -> str:
        return f"{number(self.left)}{self.operator}{number(self.right)}={number(self.value)}"


def number(value: Fraction) -> str:
    """Text of an exact number: ``7``, ``-7`` or ``7/2``."""
    return str(value.numerator) if value.denominator == 1 else f"{value.numerator}/{value.denominator}"


def parse(text: str) -> Node:
    """Read an expression of whole numbers, ``+ - * /`` and parentheses, with the usual precedence.

    Raises:
        ExpressionError: It is empty, malformed, too long, or divides by zero.
    """
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"longer than {MAX_LENGTH} characters")
    return _Parser(text).whole()


def numbers(node: Node) -> list[int]:
    """The numbers written in an expression, from left to right."""
    if node.left is None or node.right is None:
        return [int(node.value)]
    return numbers(node.left) + numbers(node.right)


def steps(node: Node) -> Iterator[Step]:
    """The operations in the order in which they are evaluated: operands first, left before right."""
    if node.left is None or node.right is None:
        return
    yield from steps(node.left)
    yield from steps(node.right)
    yield Step(node.left.value, node.operator, node.right.value, node.value)


class _Parser:
    """Recursive descent over ``sum → product → atom``."""

    def __init__(self, text: str) -> None:
        # whitespace alone matches no token, so trailing spaces end the list
        self._tokens = [m[1] or m[2] for m in _TOKEN.finditer(text.strip())]
        self._at = 0

    def whole(self) -> Node:
        node = self._sum(0)
        if self._at != len(self._tokens):
            raise ExpressionError(f"unexpected {self._tokens[self._at]!r}")
        return node

    def _peek(self) -> str:
        return self._tokens[self._at] if self._at < len(self._tokens) else ""

    def _sum(self, depth: int) -> Node:
        node = self._product(depth)
        while self._peek() in ("+", "-"):
            node = self._operation(self._take(), node, self._product(depth))
        return node

    def _product(self, depth: int) -> Node:
        node = self._atom(depth)
        while self._peek() in ("*", "/"):
            node = self._operation(self._take(), node, self._atom(depth))
        return node

    def _atom(self, depth: int) -> Node:
        if depth > MAX_DEPTH:
            raise ExpressionError("nested too deeply")
        token = self._take()
        if token == "(":
            node = self._sum(depth + 1)
            if self._take() != ")":
                raise ExpressionError("missing )")
            return node
        if not token.isascii() or not token.isdigit():
            raise ExpressionError(f"expected a number, found {token!r}")
        if len(token) > MAX_DIGITS:
            raise ExpressionError(f"a number of more than {MAX_DIGITS} digits")
        return Node(Fraction(int(token)))

    def _take(self) -> str:
        token = self._peek()
        self._at += 1
        return token

    @staticmethod
    def _operation(operator: str, left: Node, right: Node) -> Node:
        a, b = left.value, right.value
        if operator == "/":
            if b == 0:
                raise ExpressionError("division by zero")
            return Node(a / b, operator, left, right)
        value = a + b if operator == "+" else a - b if operator == "-" else a * b
        return Node(value, operator, left, right)
