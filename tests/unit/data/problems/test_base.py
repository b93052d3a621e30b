import pytest

from llmcompress.data.problems.base import SHARES, boxed, split_of
from llmcompress.data.problems.config import ArithmeticTask, CountdownTask, WordTask

TASKS = [
    CountdownTask(kind="countdown", high=8),
    CountdownTask(kind="countdown", high=8, compact=True),
    ArithmeticTask(kind="arithmetic", count=400),
    ArithmeticTask(kind="arithmetic", count=400, exact=True),
    WordTask(kind="word_problems", count=400),
    WordTask(kind="word_problems", count=400, sizes=(1, 30, 1000), brief=True),
]


@pytest.mark.parametrize(
    ("text", "content"),
    [
        ("so \\boxed{7}", "7"),
        ("\\boxed{\\frac{1}{2}} then", "\\frac{1}{2}"),
        ("\\boxed{1} no, \\boxed{2}", "2"),
        ("\\boxed{1} and \\boxed{2", "1"),
        ("\\boxed{}", ""),
        ("no box", None),
        ("\\boxed{open", None),
        ("\\boxed{(2+3, no, \\boxed{5}", "5"),
        ("} \\boxed{\\boxed{5}} }", "\\boxed{5}"),
        ("\\boxed{\\{1, 2\\}} {", "\\{1, 2\\}"),
    ],
)
def test_the_last_complete_box_counts(text, content):
    assert boxed(text) == content


def test_splits_have_their_shares():
    found = [split_of(f"key {i}") for i in range(4000)]
    for split, share in SHARES.items():
        assert found.count(split) / 4000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("task", TASKS, ids=lambda t: f"{t.kind} {t.model_dump(exclude_defaults=True)}")
def test_own_solutions_are_right_and_splits_share_no_problem(task):
    import random

    problems, rng = task.build(), random.Random(0)
    keys = [p.key for split in SHARES for p in problems.problems(split)]
    assert len(keys) == len(set(keys)) > 100
    for problem in problems.problems("train")[:60]:
        answer = boxed(problems.solution(problem, rng))
        assert problems.check(problem, answer)
        assert problems.check_steps(problem, answer)
        # hedging, copying the target, emptiness and nonsense are wrong
        for other in (None, "", "?", f"{answer}+0", f"{answer} {answer}", str(problem.data.get("target", "x"))):
            assert not problems.check(problem, other)
            assert problems.check_steps(problem, other or "")


def test_the_same_settings_give_the_same_problems():
    one, two = (WordTask(kind="word_problems", count=100).build() for _ in range(2))
    assert [p.question for p in one.problems("train")] == [p.question for p in two.problems("train")]
