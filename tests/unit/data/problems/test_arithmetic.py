import random

import pytest

from llmcompress.data.problems.arithmetic import Arithmetic, whole_number


@pytest.mark.parametrize(("text", "value"), [("7", 7), ("1,000", 1000), ("-12", -12), ("1 000", 1000), ("−3", -3)])
def test_whole_numbers(text, value):
    assert whole_number(text) == value


@pytest.mark.parametrize(
    "text", [None, "", "-", "1.5", "1e9", "0x10", "12a", "٣", "9" * 50, "--1", "12, 5", "1,2", "1 2", "1,0000"]
)
def test_other_texts_are_no_numbers(text):
    assert whole_number(text) is None


def test_remainders_miss_about_one_wrong_product_in_a_hundred():
    """Errors that are multiples of 99 pass both remainders; the exact verifier has none of that."""
    task, exact = Arithmetic(count=600, operators="*"), Arithmetic(count=600, operators="*", exact=True)
    rng, passed, tried = random.Random(0), 0, 0
    for problem in task.problems("train"):
        for _ in range(20):
            wrong = str(int(problem.answer) + rng.randint(1, 990))
            passed += task.accepts(problem, wrong)
            tried += 1
            assert not exact.accepts(problem, wrong)
        assert task.accepts(problem, problem.answer)
    assert passed / tried == pytest.approx(1 / 99, rel=0.4)


def test_sums_are_checked_by_the_inverse():
    task = Arithmetic(count=300, operators="+")
    problem = task.problems("train")[0]
    a, b = problem.data["a"], problem.data["b"]
    assert f"{a + b + 1} - {b} = {a + 1}. The first number is {a}." in task.check_steps(problem, str(a + b + 1))


def test_a_number_in_two_writings_is_one_answer():
    task = Arithmetic()
    problem = task.problems("train")[0]
    assert task.same(problem, "1,200", "1200") and not task.same(problem, "12", "13")
    assert not task.same(problem, "12, 5", "12, 5"), "no number"
