import random
import re

import pytest

from llmcompress.data.problems.word_problems import TEMPLATES, WordProblems, product


@pytest.mark.parametrize(
    ("a", "b", "text"),
    [
        (7, 8, "7*8=56"),
        (7, 45, "7*40=280, 7*5=35, 315"),
        (3, 1207, "3*1000=3000, 3*200=600, 3600, 3*7=21, 3621"),
        (6, 40, "6*40=240"),
        (6, -12, "6*-12=-72"),
        (2, 10**9, "2*1000000000=2000000000"),
    ],
)
def test_products_are_told_digit_by_digit(a, b, text):
    assert product(a, b) == text


def equations(text):
    return re.findall(r"(-?\d+)([*/+-])(-?\d+)=(-?\d+)", text)


@pytest.mark.parametrize("size", [1, 10, 300])
def test_every_brief_equation_is_true_and_checks_tell_right_from_wrong(size):
    problems = WordProblems(300, sizes=(size,), brief=True)
    apply = {"*": int.__mul__, "+": int.__add__, "-": int.__sub__, "/": int.__floordiv__}
    seen = set()
    for problem in problems.problems("train"):
        seen.add(problem.data["template"])
        right = int(problem.answer)
        for answer in (right, right + 1, right - 10):
            text = problems.check_steps(problem, str(answer))
            told = text if answer != right else f"{text} {problems.solution(problem, random.Random(0))}"
            assert equations(told)
            assert all(apply[op](int(a), int(b)) == int(c) for a, op, b, c in equations(told)), told
            # the last value of the steps is the one that must agree with the story, and does so for the answer alone
            reached, wanted = re.search(r"(-?\d+); \w+ (\d+)\.$", text).groups()
            assert (reached == wanted) == (answer == right), text
    assert seen == {template.name for template in TEMPLATES}


def test_sizes_change_the_numbers_and_nothing_else():
    plain, same = WordProblems(200), WordProblems(200, sizes=(1,), brief=True)
    assert [p.question for p in plain.problems("train")] == [p.question for p in same.problems("train")]
    large = WordProblems(400, sizes=(100,)).problems("train")
    longest = max(int(p.answer) for p in large)
    assert longest > 10 * max(int(p.answer) for p in plain.problems("train"))
    # one factor stays a digit
    assert all(v["friends"] < 10 for v in (p.data["values"] for p in large) if "friends" in v)
    mixed = {len(p.answer) for p in WordProblems(400, sizes=(1, 100)).problems("train")}
    assert {1, 3} < mixed


def test_a_value_in_two_writings_is_one_answer():
    task = WordProblems(count=40)
    problem = task.problems("train")[0]
    assert task.same(problem, "\\$1,200", "1200") and not task.same(problem, "12", "13")
    assert not task.same(problem, "none", "none")
