"""Sums and products on paper, a digit at a time, as school teaches them.

Every step is a fact about digits or the carry of the one before, so that a model that knows those facts makes no
mistake however long the numbers are. In one step ``227+136=363`` asks for a carry before the digit it comes from is
written.
"""

from __future__ import annotations

from itertools import zip_longest


def _from_the_right(number: int) -> list[int]:
    return [int(digit) for digit in reversed(str(number))]


def column_sum(a: int, b: int) -> str:
    """``a + b`` from the right, carries last, then the sum: ``227+136: 7+6=13, 2+3+1=6, 2+1=3, 363``.

    The numbers stand in front because they come from far apart: a model finds a digit in the number it has just copied
    sooner than in the story. Every column is told, ``95+204: 5+4=9, 9+0=9, 0+2=2, 299``: a digit that is not is
    forgotten in the sum. At once where both are digits or one is negative.
    """
    if min(a, b) < 0 or max(a, b) < 10:
        return f"{a}+{b}={a + b}"
    told, carry = [], 0
    for digits in zip_longest(_from_the_right(a), _from_the_right(b), fillvalue=0):
        terms = [*digits, *([carry] if carry else [])]
        told.append(f"{'+'.join(map(str, terms))}={sum(terms)}")
        carry = sum(terms) // 10
    return f"{a}+{b}: {', '.join(told)}, {a + b}"


def column_product(a: int, b: int) -> str:
    """``a · b`` from the right digit of ``b``, then the product: ``8*9=72, 8*7=56, 56+7=63, 632`` for 8 · 79.

    ``a`` is the factor with fewer digits. At once where ``b`` is a digit too or one is negative.
    """
    a, b = sorted((a, b), key=lambda factor: len(str(abs(factor))))
    if min(a, b) < 0 or b < 10:
        return f"{a}*{b}={a * b}"
    told, carry = [], 0
    for digit in _from_the_right(b):
        value = a * digit
        told.append(f"{a}*{digit}={value}")
        if carry:
            told.append(f"{value}+{carry}={value + carry}")
        carry = (value + carry) // 10
    return f"{', '.join(told)}, {a * b}"
