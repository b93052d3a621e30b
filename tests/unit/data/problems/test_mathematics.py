"""What a model writes into a box must not stop a training: comparisons that do not end, that fill the memory or that
crash.
"""

import time

import pytest

from llmcompress.data.problems import mathematics

# the interface that math_worker.py uses, with answers that do what sympy does with powers of powers
STAND_IN = """
class LatexExtractionConfig:
    def __init__(self, **_): pass

def parse(text, **_):
    return [text.removeprefix("\\\\boxed{").removesuffix("}")]

def verify(gold, answer, timeout_seconds):
    if answer == ["long"]:
        return 9 ** 9 ** 9 == 0
    if answer == ["large"]:
        return bytearray(64 << 30) == b""
    if answer == ["deep"]:
        return verify(gold, answer, timeout_seconds) if (lambda f: f(f))(lambda f: f(f)) else False
    return gold == answer
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    (tmp_path / "math_verify.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(mathematics, "SECONDS", 0.5)
    monkeypatch.setattr(mathematics, "_COMPARER", mathematics._Comparer())
    mathematics.math_equal.cache_clear()
    yield
    mathematics._COMPARER.close()
    mathematics.math_equal.cache_clear()


@pytest.mark.parametrize("answer", ["long", "large", "deep"])
def test_an_answer_that_nothing_can_work_out_is_wrong_and_the_next_one_is_judged(stand_in, answer):
    before = time.monotonic()
    assert not mathematics.math_equal("5", answer)
    assert mathematics.math_equal("5", "5") and not mathematics.math_equal("5", "6\n7")
    assert time.monotonic() - before < 60


def test_one_process_judges_many_and_ends_with_its_caller(stand_in):
    assert mathematics.math_equal("1", "1")
    process = mathematics._COMPARER._process
    assert mathematics.math_equal("2", "2") and mathematics._COMPARER._process is process
    mathematics._COMPARER.close()
    assert process.returncode is not None


def test_a_process_that_was_killed_is_replaced(stand_in):
    assert mathematics.math_equal("1", "1")
    mathematics._COMPARER._process.kill()
    mathematics._COMPARER._process.wait()
    assert mathematics.math_equal("2", "2")


def test_powers_of_powers_end(monkeypatch):
    pytest.importorskip("math_verify")
    monkeypatch.setattr(mathematics, "SECONDS", 1.0)
    monkeypatch.setattr(mathematics, "_COMPARER", mathematics._Comparer())
    assert not mathematics.math_equal("5", "9^{9^{9}}")
    mathematics._COMPARER.close()
