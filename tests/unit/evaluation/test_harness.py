from __future__ import annotations

import json

import pytest

from llmcompress.errors import InputError, RecipeError
from llmcompress.evaluation import harness
from llmcompress.evaluation.config import TaskConfig
from llmcompress.evaluation.task_specs import TASKS, catalogue, require_code, specify
from llmcompress.stages.evaluate import Evaluate, EvaluateConfig


def test_every_catalogue_entry_has_a_base_in_the_installed_lm_eval(tmp_path):
    for name, entry in catalogue().items():
        for stem in entry["files"].values():
            path = tmp_path / f"{stem}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("{}\n")
        task = TaskConfig(task=name, subjects=("astronomy",) if "subject" in entry else None)
        (spec,) = specify([task], tmp_path, limit=7)
        (config,) = spec.configs
        assert spec.local and spec.limit == 7
        assert config["dataset_path"] == "json" and config["dataset_name"] is None
        assert set(config["dataset_kwargs"]["data_files"]) == set(entry["files"])
        used = {config[f"{kind}_split"] for kind in ("training", "validation", "test")} - {None}
        assert used <= set(entry["files"])


def test_missing_local_data_is_named(tmp_path):
    with pytest.raises(InputError, match=r"task piqa: no .*piqa/validation\.jsonl\.gz"):
        specify(["piqa"], tmp_path)


def test_settings_reach_the_task(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("{}\n")
    entry = TaskConfig(task="gsm8k", num_fewshot=2, limit=3, overrides={"target_delimiter": "|"})
    (spec,) = specify([entry], tmp_path, limit=9)
    assert spec.limit == 3
    assert spec.configs[0]["num_fewshot"] == 2 and spec.configs[0]["fewshot_split"] == "train"
    assert spec.configs[0]["target_delimiter"] == "|"


def test_subjects_are_checked(tmp_path):
    with pytest.raises(RecipeError, match="has no subjects"):
        specify([TaskConfig(task="piqa", subjects=("x",))])
    (tmp_path / "mmlu").mkdir()
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / f"{split}.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match="no subject 'alchemy'"):
        specify([TaskConfig(task="mmlu", subjects=("alchemy",))], tmp_path)


def test_without_a_folder_catalogue_tasks_need_no_index():
    (spec,) = specify(["piqa"])
    assert not spec.local and isinstance(spec.configs[0], dict)


def test_offline_restores_the_switches():
    import datasets
    import huggingface_hub.constants as constants

    before = (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)
    with harness.offline(True):
        assert datasets.config.HF_HUB_OFFLINE and constants.HF_HUB_OFFLINE
    assert before == (datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE)


def test_smoke_rows_are_well_formed():
    rows = [json.loads(line) for line in (TASKS / "eval_smoke.jsonl").read_text().splitlines()]
    assert all(0 <= row["answer"] < len(row["choices"]) for row in rows)
    assert len({row["answer"] for row in rows}) == 3, "an answer position alone must not solve the task"


OWN = {"dataset_path": "json", "output_type": "multiple_choice"}


def test_a_task_of_ones_own_finds_its_rows_beside_its_file(tmp_path):
    (tmp_path / "rows.jsonl").write_text("{}\n")
    path = tmp_path / "t.yaml"
    path.write_text(json.dumps({**OWN, "task": "x", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}}))
    (spec,) = specify([TaskConfig(task="mine", path=str(path), num_fewshot=2)])
    assert spec.local and spec.name == "mine"
    config = spec.configs[0]
    assert config["task"] == "mine" and config["num_fewshot"] == 2
    assert config["dataset_kwargs"]["data_files"] == {"test": str(tmp_path / "rows.jsonl")}
    # rows of the hub, and lists of files, are lm-eval's business
    for files in ({"test": "https://x.y/rows.jsonl"}, {"test": ["rows.jsonl"]}, None):
        path.write_text(json.dumps({**OWN, "dataset_kwargs": {"data_files": files}}))
        (spec,) = specify([TaskConfig(task="mine", path=str(path))])
        assert not spec.local and spec.configs[0]["dataset_kwargs"] == {"data_files": files}


@pytest.mark.parametrize(
    ("text", "words"), [("a: [", "t.yaml"), ("task: x", "no dataset_path or no output_type"), (None, "no such file")]
)
def test_a_file_that_is_no_task_is_named(tmp_path, text, words):
    path = tmp_path / "t.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=words):
        specify([TaskConfig(task="mine", path=str(path))])


def test_a_task_that_runs_code_is_refused_until_that_is_allowed(tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"q": "1", "a": "2"}) + "\n")
    path = tmp_path / "t.yaml"
    fields = {
        "dataset_path": "json", "output_type": "generate_until", "doc_to_text": "q", "doc_to_target": "a",
        "test_split": "test", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}}, "unsafe_code": True,
    }  # fmt: skip
    path.write_text(json.dumps(fields))
    (spec,) = specify([TaskConfig(task="mine", path=str(path))])
    for refuses in (harness.build, lambda spec: require_code([spec])):
        with pytest.raises(InputError, match="task mine runs code that the model writes") as caught:
            refuses(spec)
        assert "run_code: true" in caught.value.hint
    (spec,) = specify([TaskConfig(task="mine", path=str(path), run_code=True)])
    require_code([spec])
    assert list(harness.build(spec)["tasks"]) == ["mine"]


def test_code_is_refused_before_a_run_without_the_index_of_all_tasks(monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", None)
    stage = Evaluate("evaluate", EvaluateConfig(type="evaluate", tasks=["humaneval"]))
    with pytest.raises(InputError, match="task humaneval runs code"):
        stage.lacks()
    allowed = Evaluate("evaluate", EvaluateConfig(type="evaluate", tasks=[{"task": "humaneval", "run_code": True}]))
    # what lm-eval judges code with asks again
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    with pytest.raises(InputError, match="HF_ALLOW_CODE_EVAL=1"):
        allowed.lacks()
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    assert allowed.lacks() == []
    # one without code, and one that nobody knows
    require_code(specify(["triviaqa", "no_such_task"]))


def test_turns_need_a_chat():
    with pytest.raises(ValueError, match="needs apply_chat_template"):
        TaskConfig(task="gsm8k", fewshot_as_multiturn=True)


def test_a_misspelt_task_is_told_the_nearest():
    with pytest.raises(InputError, match=r"hellaswagg: lm-eval does not know it \(did you mean hellaswag\?\)"):
        harness.build(specify(["hellaswagg"])[0])
