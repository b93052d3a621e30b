from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from llmcompress.evaluation.scores import normalise, paired_stderr


class FakeTask(SimpleNamespace):
    def higher_is_better(self):
        return {"acc": True, "perplexity": False}


def results(values, samples):
    return {"results": values, "samples": samples}


def test_normalise_computes_standard_errors_from_rows():
    rows = [{"filter": "none", "acc": v, "perplexity": ll} for v, ll in [(1, -1.0), (0, -2.0), (1, -3.0), (1, -2.5)]]
    logs = [row["perplexity"] for row in rows]
    value = math.exp(-sum(logs) / 4)
    raw = results(
        {"t": {"alias": "t", "acc,none": 0.75, "acc_stderr,none": "N/A", "perplexity,none": value}}, {"t": rows}
    )
    acc, ppl = normalise("mine", {"t": FakeTask()}, raw)
    assert (acc.task, acc.metric, acc.value, acc.n, acc.higher_is_better) == ("mine", "acc", 0.75, 4, True)
    assert acc.stderr == pytest.approx(math.sqrt(0.25 / 4))
    assert acc.rows == (1.0, 0.0, 1.0, 1.0)
    mean = sum(logs) / 4
    spread = math.sqrt(sum((x - mean) ** 2 for x in logs) / 3 / 4)
    assert ppl.stderr == pytest.approx(value * spread) and ppl.higher_is_better is False
    assert sum(ppl.rows) / 4 == pytest.approx(-value * mean)


def test_normalise_keeps_filters_apart():
    rows = [{"filter": f, "acc": v} for f, v in [("strict", 0), ("strict", 1), ("loose", 1), ("loose", 1)]]
    raw = results({"t": {"acc,strict": 0.5, "acc,loose": 1.0}}, {"t": rows})
    found = {s.metric: s for s in normalise("t", {"t": FakeTask()}, raw)}
    assert found["acc.strict"].rows == (0.0, 1.0) and found["acc.loose"].value == 1.0
    assert found["acc.strict"].n == 2


def test_subjects_are_pooled_by_rows():
    raw = results(
        {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.25}},
        {"a": [{"filter": "none", "acc": 1}], "b": [{"filter": "none", "acc": v} for v in (0, 0, 1, 0)]},
    )
    found = normalise("mmlu", {"a": FakeTask(), "b": FakeTask()}, raw)
    assert [s.task for s in found] == ["mmlu", "a", "b"]
    assert found[0].value == pytest.approx(2 / 5) and found[0].n == 5


def test_a_figure_knows_what_its_rows_ask():
    def asked(*docs, hashes=True, prompt="p"):
        known = [{"doc_hash": doc, "prompt_hash": f"{prompt}{doc}"} if hashes else {} for doc in docs]
        rows = [{"filter": "none", "acc": 1, **one} for one in known]
        raw = results({"a": {"acc,none": 1.0}, "b": {"acc,none": 1.0}}, {"a": rows, "b": rows[:1]})
        return [score.asked for score in normalise("all", {"a": FakeTask(), "b": FakeTask()}, raw)]

    pooled, one, two = asked("x", "y")
    assert len({pooled, one, two}) == 3 and asked("x", "y") == [pooled, one, two]
    # other rows, and the same ones in another order
    assert not {pooled, one} & {*asked("x", "z"), *asked("y", "x")}
    # the same rows behind other examples or in a chat
    assert not {pooled, one, two} & {*asked("x", "y", prompt="q")}
    assert asked("x", "y", hashes=False) == ["", "", ""]


def test_paired_stderr_is_that_of_the_differences():
    assert paired_stderr((1, 0, 1), (1, 0, 1)) == 0
    assert paired_stderr((1, 0, 1, 0), (0, 0, 1, 1)) == pytest.approx(math.sqrt((2 / 3) / 4))
    assert paired_stderr((1, 0), (0, 0)) == pytest.approx(0.5)
    assert paired_stderr((1, 0), (1,)) is paired_stderr((1,), (0,)) is None
