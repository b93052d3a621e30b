from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest

from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation import harness
from llmcompress.evaluation.config import TaskConfig


def test_every_catalogue_entry_has_a_base_in_the_installed_lm_eval(tmp_path):
    for name, entry in harness.catalogue().items():
        for stem in entry["files"].values():
            path = tmp_path / f"{stem}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
        task = TaskConfig(task=name, subjects=("astronomy",) if "subject" in entry else None)
        (spec,) = harness.specify([task], tmp_path, limit=7)
        (config,) = spec.configs
        assert spec.local and spec.limit == 7
        assert config["dataset_path"] == "json" and config["dataset_name"] is None
        assert set(config["dataset_kwargs"]["data_files"]) == set(entry["files"])
        used = {config[f"{kind}_split"] for kind in ("training", "validation", "test")} - {None}
        assert used <= set(entry["files"])


def test_missing_local_data_is_named(tmp_path):
    with pytest.raises(InputError, match=r"task piqa: no .*piqa/validation\.jsonl\.gz"):
        harness.specify(["piqa"], tmp_path)


def test_settings_reach_the_task(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("{}\n")
    entry = TaskConfig(task="gsm8k", num_fewshot=2, limit=3, overrides={"target_delimiter": "|"})
    (spec,) = harness.specify([entry], tmp_path, limit=9)
    assert spec.limit == 3
    assert spec.configs[0]["num_fewshot"] == 2 and spec.configs[0]["fewshot_split"] == "train"
    assert spec.configs[0]["target_delimiter"] == "|"


def test_subjects_are_checked(tmp_path):
    with pytest.raises(RecipeError, match="has no subjects"):
        harness.specify([TaskConfig(task="piqa", subjects=("x",))])
    (tmp_path / "mmlu").mkdir()
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / f"{split}.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match="no subject 'alchemy'"):
        harness.specify([TaskConfig(task="mmlu", subjects=("alchemy",))], tmp_path)


def test_without_a_folder_catalogue_tasks_need_no_index():
    (spec,) = harness.specify(["piqa"])
    assert not spec.local and isinstance(spec.configs[0], dict)


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
    acc, ppl = harness.normalise("mine", {"t": FakeTask()}, raw)
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
    found = {s.metric: s for s in harness.normalise("t", {"t": FakeTask()}, raw)}
    assert found["acc.strict"].rows == (0.0, 1.0) and found["acc.loose"].value == 1.0
    assert found["acc.strict"].n == 2


def test_subjects_are_pooled_by_rows():
    raw = results(
        {"a": {"acc,none": 1.0}, "b": {"acc,none": 0.25}},
        {"a": [{"filter": "none", "acc": 1}], "b": [{"filter": "none", "acc": v} for v in (0, 0, 1, 0)]},
    )
    found = harness.normalise("mmlu", {"a": FakeTask(), "b": FakeTask()}, raw)
    assert [s.task for s in found] == ["mmlu", "a", "b"]
    assert found[0].value == pytest.approx(2 / 5) and found[0].n == 5


def test_a_figure_knows_what_its_rows_ask():
    def asked(*docs, hashes=True, prompt="p"):
        known = [{"doc_hash": doc, "prompt_hash": f"{prompt}{doc}"} if hashes else {} for doc in docs]
        rows = [{"filter": "none", "acc": 1, **one} for one in known]
        raw = results({"a": {"acc,none": 1.0}, "b": {"acc,none": 1.0}}, {"a": rows, "b": rows[:1]})
        return [score.asked for score in harness.normalise("all", {"a": FakeTask(), "b": FakeTask()}, raw)]

    pooled, one, two = asked("x", "y")
    assert len({pooled, one, two}) == 3 and asked("x", "y") == [pooled, one, two]
    # other rows, and the same ones in another order
    assert not {pooled, one} & {*asked("x", "z"), *asked("y", "x")}
    # the same rows behind other examples or in a chat
    assert not {pooled, one, two} & {*asked("x", "y", prompt="q")}
    assert asked("x", "y", hashes=False) == ["", "", ""]


def test_paired_stderr_is_that_of_the_differences():
    assert harness.paired_stderr((1, 0, 1), (1, 0, 1)) == 0
    assert harness.paired_stderr((1, 0, 1, 0), (0, 0, 1, 1)) == pytest.approx(math.sqrt((2 / 3) / 4))
    assert harness.paired_stderr((1, 0), (0, 0)) == pytest.approx(0.5)
    assert harness.paired_stderr((1, 0), (1,)) is harness.paired_stderr((1,), (0,)) is None


def test_offline_restores_the_switches():
    import datasets
    import huggingface_hub.constants as constants

    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    with harness.offline(True):
        assert datasets.config.HF_HUB_OFFLINE and constants.HF_HUB_OFFLINE
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def test_smoke_rows_are_well_formed():
    rows = [json.loads(line) for line in (harness.TASKS / "eval_smoke.jsonl").read_text().splitlines()]
    assert all(0 <= row["answer"] < len(row["choices"]) for row in rows)
    assert len({row["answer"] for row in rows}) == 3, "an answer position alone must not solve the task"


OWN = {"dataset_path": "json", "output_type": "multiple_choice"}


def test_a_task_of_ones_own_finds_its_rows_beside_its_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps({**OWN, "task": "x", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}))
    (spec,) = harness.specify([TaskConfig(task="mine", path=str(path), num_fewshot=2)])
    assert spec.local and spec.name == "mine"
    config = spec.configs[0]
    assert config["task"] == "mine" and config["num_fewshot"] == 2
    assert config["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "rows.jsonl")}
    # rows of the hub, and lists of files, are lm-eval's business
    for files in ({"test": "https://x.y/rows.jsonl"}, {"test": ["rows.jsonl"]}, None):
        path.write_text(json.dumps({**OWN, "dataset_kwargs": {"data_files": files}}))
        (spec,) = harness.specify([TaskConfig(task="mine", path=str(path))])
        assert not spec.local and spec.configs[0]["dataset_kwargs"] == {"data_files": files}


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "t.yaml"), ("task: x", "no dataset_path or no output_type"), (None, "no such file")]
)
def test_a_file_that_is_no_task_is_named(tmp_path, text, words):
    path = tmp_path / "t.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        harness.specify([TaskConfig(task="mine", path=str(path))])


def test_a_task_that_runs_code_is_refused_until_that_is_allowed(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "1", "a": "2"}) + "\n")
    path = tmp_path / "t.yaml"
    fields = {
        "dataset_path": "json", "output_type": "generate_until", "doc_to_text": "q", "doc_to_target": "a",
        "test_split": "test", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "unsafe_code": True,
    }  # fmt: skip
    path.write_text(json.dumps(fields))
    (spec,) = harness.specify([TaskConfig(task="mine", path=str(path))])
    with pytest.raises(InputError, match="task mine runs code that the model writes") as caught:
        harness.build(spec)
    assert "run_code: true" in caught.value.hint
    (spec,) = harness.specify([TaskConfig(task="mine", path=str(path), run_code=True)])
    assert list(harness.build(spec)["tasks"]) == ["mine"]


def test_turns_need_a_chat():
    with pytest.raises(ValueError, match="needs apply_chat_template"):
        TaskConfig(task="gsm8k", fewshot_as_multiturn=True)
