"""What scripts/diagnose_verifications.py says of verifications, in columns and in the form before them."""

import json
import random
from pathlib import Path

import pytest

from llmcompress.data.actions import CHECK, CORRECT, INCORRECT, response
from llmcompress.data.problems.word_problems import WordProblems

SCRIPTS = Path(__file__).resolve().parents[4] / "scripts"


@pytest.fixture
def diagnosis(monkeypatch):
    monkeypatch.syspath_prepend(SCRIPTS)
    import diagnose_verifications

    return diagnose_verifications


@pytest.mark.parametrize(
    ("steps", "told", "fault"),
    [
        ("8*70=560, 8*9=72, 632; 632+27=659; goal 659.", True, "nothing"),
        ("8*70=560, 8*9=72, 612; 612+27=639; goal 659.", False, "number"),
        ("8*70=560, 8*9=72, 632; 632+27=649; goal 659.", False, "sum"),
        ("8*70=540, 8*9=72, 612; 612+27=639; goal 659.", False, "product"),
        ("8*70=560, 8*9=72, 632; 632+27=659; goal 659.", False, "verdict against its steps"),
        ("8*9=72, 8*7=56, 56+7=63, 632; 632+27: 2+7=9, 3+2=5, 659; goal 659.", True, "nothing"),
        ("8*9=72, 8*7=56, 56+7=62, 622; 622+27: 2+7=9, 2+2=4, 649; goal 659.", False, "sum"),
        ("8*9=72, 8*7=56, 56+7=63, 623; 623+27: 3+7=10, 2+2+1=5, 650; goal 659.", False, "number"),
        ("632; goal 659.", None, "no verdict"),
    ],
)
def test_the_first_false_step_is_named(diagnosis, steps, told, fault):
    assert diagnosis.judge(steps, told) == fault


def test_written_verifications_have_no_fault(diagnosis):
    task, rng = WordProblems(300, sizes=(1, 8, 300), brief=True), random.Random(0)
    for problem in task.problems("train"):
        attempt, steps = task.read_back(problem, rng)
        right = attempt == task.solution(problem, rng)
        assert diagnosis.judge(steps, right) == "nothing", steps
        assert diagnosis.judge(steps, not right) == "verdict against its steps", steps


def test_kept_responses_of_a_run_are_counted(diagnosis, monkeypatch, tmp_path, capsys):
    good, bad = "2+3=5; 5+1=6; goal 6.", "2+3=6; 6+1=7; goal 6."
    text = response([("\\boxed{7}", f"{bad} {INCORRECT}"), ("\\boxed{1}", f"{good} {CORRECT}")])
    assert text.count(CHECK) == 2
    file = tmp_path / "found.json"
    file.write_text(json.dumps({"runs": {"sft": {"texts": [{"response": text}]}}}))
    monkeypatch.setattr("sys.argv", ["diagnose", str(file)])
    diagnosis.main()
    assert capsys.readouterr().out == "runs/sft: 2 verifications: sum 1, nothing 1\n"
