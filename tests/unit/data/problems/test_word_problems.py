import random
import re

import pytest

from llmcompress.algorithms.self_verify import verdict_of
from llmcompress.data.problems.base import boxed
from llmcompress.data.problems.word_problems import TEMPLATES, WordProblems


def equations(text):
    """Left sides as sums of products (and one difference or quotient) with their values."""
    return re.findall(r"(-?\d+(?:[*/+-]-?\d+)*)=(-?\d+)", text)


def value(left):
    # digits and operators alone: what the pattern lets through
    return eval(left.replace("/", "//"))


@pytest.mark.parametrize("size", [1, 10, 300])
def test_every_brief_equation_is_true_and_checks_tell_right_from_wrong(size):
    problems = WordProblems(300, sizes=(size,), brief=True)
    seen = set()
    for problem in problems.problems("train"):
        seen.add(problem.data["template"])
        right = int(problem.answer)
        for answer in (right, right + 1, right - 10):
            text = problems.check_steps(problem, str(answer))
            told = text if answer != right else f"{text} {problems.solution(problem, random.Random(0))}"
            assert equations(told)
            assert all(value(left) == int(found) for left, found in equations(told)), told
            # the last value of the steps is the one that must agree with the story, and does so for the answer alone
            reached, wanted = re.search(r"(-?\d+); \w+ (\d+)\.$", text).groups()
            assert (reached == wanted) == (answer == right), text
    assert seen == {template.name for template in TEMPLATES}


@pytest.mark.parametrize("brief", [True, False])
def test_answers_are_put_back_right_and_wrong_and_without_a_verdict(brief):
    problems, rng = WordProblems(600, sizes=(1, 20), brief=brief), random.Random(0)
    right = 0
    for problem in problems.problems("pretrain"):
        attempt, steps = problems.read_back(problem, rng)
        given = boxed(attempt)
        assert int(given) >= 0 and steps == problems.check_steps(problem, given)
        # the steps before the box reach what is in the box
        assert attempt.endswith(f"{given}. \\boxed{{{given}}}") and verdict_of(steps) is None
        right += problems.check(problem, given)
        assert problems.check(problem, given) == (attempt == problems.solution(problem, rng))
    assert 0.4 < right / len(problems.problems("pretrain")) < 0.6


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
