import json
import sys
from pathlib import Path

import pytest

from llmcompress.data.problems.base import Problem
from llmcompress.data.problems.files import FileProblems, same_text
from llmcompress.data.problems.mathematics import math_equal
from llmcompress.errors import EnvironmentProblem, InputError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def gsm(tmp_path):
    rows = [{"question": f"What is {i} + {i}?", "answer": f"Add.\n#### {2 * i:,}"} for i in range(500, 700)]
    return write(tmp_path / "gsm.jsonl", rows)


def test_gsm8k_rows_split_by_question_and_answers_lose_their_commas(gsm):
    task = FileProblems(gsm)
    parts = {split: task.problems(split) for split in ("pretrain", "train", "validation", "test")}
    assert parts["pretrain"] == []
    assert len(parts["train"]) > len(parts["test"]) > 0 < len(parts["validation"])
    problem = next(p for p in parts["train"] if int(p.answer) >= 1000)
    assert task.check(problem, f"{int(problem.answer):,}")
    assert not task.check(problem, str(int(problem.answer) + 1))
    assert not task.check(problem, None)


def test_a_test_file_leaves_all_other_rows_for_training(gsm, tmp_path):
    test = write(tmp_path / "t.jsonl", [{"question": "q", "answer": "#### 1"}])
    task = FileProblems(gsm, test)
    assert len(task.problems("test")) == 1
    assert len(task.problems("train")) + len(task.problems("validation")) == 200


def test_a_question_of_both_files_is_a_test_question(gsm, tmp_path):
    lines = Path(gsm).read_text().splitlines()[:50]
    test = write(tmp_path / "t.jsonl", [json.loads(line) for line in lines])
    task = FileProblems(gsm, test)
    learned = {p.key for split in ("train", "validation") for p in task.problems(split)}
    assert len(learned) == 150 and not learned & {p.key for p in task.problems("test")}


def test_math_rows_take_the_field_or_the_last_box(tmp_path):
    rows = [{"problem": "p", "solution": "so \\boxed{\\frac{1}{2}}"}, {"problem": "r", "answer": "3", "solution": ""}]
    task = FileProblems(write(tmp_path / "m.jsonl", rows), form="math")
    answers = {p.answer for split in ("train", "validation", "test") for p in task.problems(split)}
    assert answers == {"\\frac{1}{2}", "3"}


@pytest.mark.parametrize("solution", ["it is $\\boxed 5$.", "it is \\fbox{5}", "\\boxed{4}, no, \\fbox{5}"])
def test_solutions_of_math_have_other_boxes(tmp_path, solution):
    path = write(tmp_path / "m.jsonl", [{"problem": "p", "solution": solution}])
    assert FileProblems(path, path, "math").problems("test")[0].answer == "5"


def test_rows_without_an_answer_name_their_line(tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"question": "q", "answer": "#### 1"}, {"question": "q2", "answer": "none"}])
    with pytest.raises(InputError, match=r"bad\.jsonl:2"):
        FileProblems(path).problems("train")


@pytest.mark.parametrize(
    ("gold", "answer", "same"),
    [
        ("1000", "1,000", True),
        ("0.5", "1/2", True),
        ("7", "\\$7", True),
        ("7", "7.0", True),
        ("7", "70", False),
        ("x+1", "x + 1", True),
        ("7", "", False),
        ("1/0", "1/0", False),
        ("0.5", ".5", True),
        ("-5", "−5", True),
        ("5", "+5", True),
        ("3/4", "1.5/2", True),
        ("1.5/2", "1.5/2", True),
    ],
)
def test_numbers_compare_exactly(gold, answer, same):
    assert same_text(gold, answer) is same


def test_math_verify_reads_latex():
    pytest.importorskip("math_verify")
    assert math_equal("\\frac{1}{2}", "0.5")
    assert not math_equal("\\frac{1}{2}", "0.6")


def test_math_rows_are_checked_as_mathematics_only_where_the_recipe_says_so(tmp_path):
    pytest.importorskip("math_verify")
    path = write(tmp_path / "m.jsonl", [{"problem": "p", "solution": "so \\boxed{\\frac{\\sqrt{8}}{2}}"}])
    plain, checked = FileProblems(path, path, "math"), FileProblems(path, path, "math", math=True)
    problem = checked.problems("test")[0]
    assert checked.check(problem, "\\sqrt{2}") and not plain.check(problem, "\\sqrt{2}")
    assert not checked.check(problem, "\\sqrt{3}")
    assert not checked.check(problem, "")


def test_without_math_verify_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(EnvironmentProblem, match="math-verify is not installed") as caught:
        math_equal("\\frac{1}{2}", "a text that no other test compares")
    assert "llmcompress[math]" in f"{caught.value} {caught.value.__dict__}"


def test_equal_values_are_one_answer_whatever_is_right():
    problem, task = Problem("q", "q", "7"), FileProblems("unread.jsonl")
    assert task.same(problem, "1/2", "0.5") and task.same(problem, "1,000", "1000.0")
    assert not task.same(problem, "\\frac{1}{2}", "0.5"), "that takes math-verify"


def by_length(question: str, gold: str, answer: str) -> bool:
    return bool(question) and len(answer) == len(gold)


def test_a_checker_of_another_package_judges_what_is_not_the_gold_answer(tmp_path, monkeypatch):
    from importlib.metadata import EntryPoint

    from pydantic import ValidationError

    from llmcompress import plugins
    from llmcompress.data.problems.config import FileTask

    points = {
        "by_length": EntryPoint("by_length", f"{__name__}:by_length", plugins.CHECKERS),
        "text": EntryPoint("text", f"{__name__}:__doc__", plugins.CHECKERS),
    }
    monkeypatch.setattr(plugins, "entry_points", lambda group: list(points.values()) * (group == plugins.CHECKERS))
    plugins.names.cache_clear()
    plugins.discover.cache_clear()
    path = write(tmp_path / "own.jsonl", [{"question": "q", "answer": "abc"}])
    try:
        task = FileTask(kind="file", path=path, form="math", checker="by_length").build()
        (problem,) = [p for split in ("train", "validation", "test") for p in task.problems(split)]
        assert [task.check(problem, answer) for answer in ("abc", "xyz", "xy", None, "x" * 500)] == [
            True, True, False, False, False,
        ]  # fmt: skip
        assert not task.same(problem, "xyz", "uvw")
        with pytest.raises(EnvironmentProblem, match=r"no checker 'mine' \(by_length, text\)"):
            FileTask(kind="file", path=path, checker="mine").build()
        with pytest.raises(EnvironmentProblem, match="not a function"):
            FileTask(kind="file", path=path, checker="text").build()
        with pytest.raises(ValidationError, match="give one"):
            FileTask(kind="file", path=path, checker="by_length", math=True)
    finally:
        plugins.names.cache_clear()
        plugins.discover.cache_clear()


def test_a_checker_that_fails_is_named_with_the_answer(tmp_path):
    def broken(question, gold, answer):
        return int(answer) == 3

    task = FileProblems(write(tmp_path / "own.jsonl", [{"question": "q", "answer": "abc"}]), form="math", own=broken)
    with pytest.raises(EnvironmentProblem, match=r"fails on the answer 'nonsense': ValueError"):
        task.check(Problem("q", "q", "abc"), "nonsense")
