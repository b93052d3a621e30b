import itertools
from fractions import Fraction

import pytest

from llmcompress.data.problems.base import Problem
from llmcompress.data.problems.countdown import Countdown

TASK = Countdown(count=3, low=1, high=6, limit=50)


def brute_targets(given):
    """Whole values within 0 … 50 of every chain of three numbers, from nested loops."""
    found = set()
    calculate = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
    for a, b, c in itertools.permutations(given):
        for first, second in itertools.product("+-*", repeat=2):
            inner = calculate[first](a, b)
            if 0 <= inner <= 50:
                found |= {calculate[second](inner, c), calculate[second](c, inner)}
    return {value for value in found if 0 <= value <= 50}


@pytest.mark.parametrize("given", [(1, 2, 3), (2, 2, 5), (4, 5, 6), (6, 6, 6)])
def test_table_holds_every_target_that_can_be_reached(given):
    assert set(TASK.table[given]) == brute_targets(given)


def problem(given=(2, 3, 4), target=20):
    key = f"{','.join(map(str, given))}:{target}"
    return TASK._problem(given, target, key)


@pytest.mark.parametrize("answer", ["(2+3)*4", "4*(3+2)", " (3 + 2) * 4 "])
def test_every_right_expression_is_accepted(answer):
    assert TASK.check(problem(), answer)


@pytest.mark.parametrize(
    "answer", ["20", "4*5", "(2+3)*4*1", "2+3*4", "2*3*4", "(2+3)*4+0", "40/2", "(2+3)*4 (2+3)*4", "(4+4)+(4*3)"]
)
def test_other_numbers_values_and_copies_of_the_target_are_not(answer):
    assert not TASK.check(problem(), answer)


def test_an_operator_that_is_not_allowed_is_wrong():
    assert not Countdown(operators="+-").check(problem(), "(2+3)*4")


def test_checking_text_states_facts_only():
    compact = Countdown(compact=True)
    assert compact.check_steps(problem(), "2*3+4") == "2*3=6,6+4=10;20"
    assert compact.check_steps(problem(), "5*4") == "5*4=20#"
    assert compact.check_steps(problem(), "oops") == "?"
    assert "correct" not in TASK.check_steps(problem(), "2*3+4")
    assert parsed_values(TASK.check_steps(problem(), "(2+3)*4")) == [5, 20]


def parsed_values(text):
    return [Fraction(part.split("=")[1].rstrip(".")) for part in text.split(": ")[1].split(". ")[0].split(", ")]


def test_answers_that_the_check_cannot_tell_apart_are_the_same():
    task, problem = Countdown(), Problem("2,3,4:20", "q", data={"numbers": [2, 3, 4], "target": 20})
    assert task.same(problem, "(2+3)*4", "4 * (3+2)")
    assert task.same(problem, "2+3*4", "4*3+2"), "wrong ones too"
    # other numbers, another operator, another value, no expression
    for other in ("5*4", "(2+3)*4/1", "2*3*4", "(2+3)*", ""):
        assert not task.same(problem, "(2+3)*4", other)
    assert not task.same(problem, "?", "?")
