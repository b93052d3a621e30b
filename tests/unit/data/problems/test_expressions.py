from fractions import Fraction

import pytest

from llmcompress.data.problems.expressions import ExpressionError, number, numbers, parse, steps


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("7", 7),
        ("1+2*3", 7),
        ("(1+2)*3", 9),
        ("10-3-2", 5),
        ("7/2", Fraction(7, 2)),
        ("8/4/2", 1),
        (" ( 1 +\n2 ) ", 3),
        ("1/3*3", 1),
    ],
)
def test_values_are_exact(text, value):
    assert parse(text).value == value


@pytest.mark.parametrize(
    "text",
    [
        "",
        "()",
        "1+",
        "+1",
        "-1",
        "1 2",
        "(1",
        "1)",
        "1/0",
        "1/(2-2)",
        "2**3",
        "a",
        "__import__('os')",
        "1.5",
        "٣+1",
        "(" * 60 + "1" + ")" * 60,
        "1+" * 300 + "1",
        "9" * 30,
    ],
)
def test_anything_else_is_refused_without_running_it(text):
    with pytest.raises(ExpressionError):
        parse(text)


def test_numbers_and_steps_follow_the_order_of_evaluation():
    node = parse("2*(3+4)-10/4")
    assert numbers(node) == [2, 3, 4, 10, 4]
    assert [str(step) for step in steps(node)] == ["3+4=7", "2*7=14", "10/4=5/2", "14-5/2=23/2"]
    assert number(Fraction(-3)) == "-3"
