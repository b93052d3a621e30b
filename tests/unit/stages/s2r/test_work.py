"""Arithmetic that ``plan`` tells of the S2R stages, against products by hand."""

import pytest

from llmcompress.data.problems.config import CountdownTask, FileTask, WordTask
from llmcompress.models.handle import ModelHandle
from llmcompress.models.sizes import forward_flops
from llmcompress.stages.base import PlanInputs
from llmcompress.stages.s2r.init import S2RInit, S2RInitConfig
from llmcompress.stages.s2r.rl import S2RRl, S2RRlConfig
from llmcompress.stages.s2r.work import GATE_PROBLEMS, PROMPT_TOKENS, problem_count

TASK = {"kind": "word_problems", "count": 1000}
SAMPLING = {"max_new_tokens": 44}
LONG = PROMPT_TOKENS + 44


@pytest.fixture(scope="module")
def inputs():
    return PlanInputs(ModelHandle.open("asset:reference_reasoner").layout, 4, 4, 0, 0, {}, "cpu")


def once(inputs, rows, length):
    """A forward pass with its head."""
    head = 2.0 * rows * length * inputs.layout.vocab * inputs.layout.hidden
    return forward_flops(inputs.layout, rows * length, length) + head


def init(inputs, **fields):
    fields = {"task": TASK, "sampling": SAMPLING, "measure": None, "max_length": 100, "kl": 0.0} | fields
    return S2RInit("s", S2RInitConfig(type="s2r_init", **fields)).estimate(inputs)


def rl(inputs, **fields):
    fields = {"task": TASK, "sampling": SAMPLING, "measure": None, "level": "outcome"} | fields
    return S2RRl("s", S2RRlConfig(type="s2r_rl", **fields)).estimate(inputs).flops


def test_supervised_training(inputs):
    # 80 problems with 5 samples each, 3 epochs, forward and two passes backward
    plain = once(inputs, 80 * 5, LONG) + 3 * once(inputs, 3 * 80, 100)
    assert init(inputs, problems=80).flops == pytest.approx(plain)
    assert init(inputs, problems=80, kl=0.1).flops == pytest.approx(plain + once(inputs, 240, 100))
    again = init(inputs, problems=80, recompute=True).flops - plain
    assert again == pytest.approx(once(inputs, 240, 100))
    adapters = init(inputs, problems=80, adapter={"rank": 4}).flops
    assert adapters == pytest.approx(plain - once(inputs, 240, 100))
    # rows are no longer than four trials with their verifications, or one solution
    assert init(inputs, problems=80, max_length=8000).flops == pytest.approx(
        plain + 3 * (once(inputs, 240, PROMPT_TOKENS + 8 * 44) - once(inputs, 240, 100))
    )
    assert init(inputs, problems=80, max_length=8000, data="solutions").flops == pytest.approx(
        plain + 3 * (once(inputs, 240, LONG) - once(inputs, 240, 100))
    )
    # 7.5 steps: the rows of 8 problems after each of 3 epochs, or after every two steps
    for every, times in ((None, 3), (2, 3.75)):
        aside = init(inputs, problems=80, validation={"share": 0.1, "every": every}).flops - plain
        assert aside == pytest.approx(once(inputs, round(8 * times), 100))
    measured = init(inputs, problems=80, measure={"problems": 30, "max_new_tokens": 44}).flops
    assert measured == pytest.approx(plain + 2 * once(inputs, 30, LONG))


def test_written_rows_are_not_sampled_and_all_of_a_split_is_a_share(inputs):
    written = init(inputs, data="program", epochs=1)
    assert written.flops == pytest.approx(3 * once(inputs, 450, 100))
    assert init(inputs, epochs=1).flops == pytest.approx(once(inputs, 370 * 5, LONG) + 3 * once(inputs, 370, 100))
    assert any("as if every row" in note for note in written.notes)


def test_reinforcement(inputs):
    step = {"steps": 2, "prompts": 3, "samples": 4, "updates": 2}
    # written once, scored by policy and reference, trained once
    plain = 6 * once(inputs, 24, LONG)
    assert rl(inputs, **step) == pytest.approx(plain)
    assert rl(inputs, min_verdict_recall=0.8, **step) == pytest.approx(plain + once(inputs, GATE_PROBLEMS, LONG))
    assert rl(inputs, problems=10, screen={"samples": 3}, **step) == pytest.approx(plain + once(inputs, 30, LONG))
    offline = rl(inputs, mode="offline", problems=10, samples=8, offline={"epochs": 2})
    assert offline == pytest.approx(once(inputs, 80, LONG) * (1 + 1 + 2 * 3))


def test_problems_are_counted_where_that_is_quick(tmp_path):
    words, file = WordTask(kind="word_problems", count=1000), tmp_path / "p.jsonl"
    assert problem_count(words, None, "train") == 370 and problem_count(words, 50, "train") == 50
    assert problem_count(words, 9999, "test") == 120
    small = CountdownTask(kind="countdown", high=9, limit=30)
    assert problem_count(small, None, "train") == len(small.build().problems("train"))
    assert problem_count(CountdownTask(kind="countdown", numbers=5), None, "train") is None
    assert problem_count(CountdownTask(kind="countdown", numbers=5), 7, "train") == 7
    task = FileTask(kind="file", path=str(file))
    assert problem_count(task, None, "train") is None and problem_count(task, 12, "train") == 12
    file.write_text('{"a": 1}\n\n' * 100)
    assert problem_count(task, None, "train") == 82 and problem_count(task, None, "test") == 12
    own = FileTask(kind="file", path=str(file), test_path=str(file))
    assert problem_count(own, None, "train") == 94 and problem_count(own, None, "test") == 100


def test_what_cannot_be_counted_is_said(inputs):
    found = init(inputs, task={"kind": "file", "path": "absent.jsonl"})
    assert found.flops == 0 and any("not counted" in note for note in found.notes)
