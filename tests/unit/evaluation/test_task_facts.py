"""What a task's file tells before hours of work: names of figures, room for questions."""

import json

import pytest
from lm_eval.api.registry import DEFAULT_METRIC_REGISTRY
from lm_eval.models.utils import normalize_gen_kwargs

from llmcompress.errors import InputError
from llmcompress.evaluation import harness, task_facts
from llmcompress.evaluation.config import TaskConfig
from llmcompress.evaluation.gates import GateConfig
from llmcompress.evaluation.task_facts import figures, require_rooms, unknown_figures, written_tokens
from llmcompress.evaluation.task_specs import specify

FILTERS = [{"name": name, "filter": [{"function": "take_first"}]} for name in ("strict", "loose")]


def task(folder, **fields):
    """A task of the user's with one row."""
    (folder / "rows.jsonl").write_text(json.dumps({"q": "1", "a": "2"}) + "\n")
    given = {
        "task": "mine", "dataset_path": "json", "output_type": "generate_until", "doc_to_text": "q",
        "doc_to_target": "a", "test_split": "test", "dataset_kwargs": {"data_files": {"test": "rows.jsonl"}},
    }  # fmt: skip
    (folder / "t.yaml").write_text(json.dumps(given | fields))
    return TaskConfig(task="mine", path=str(folder / "t.yaml"))


def test_figures_of_tasks_that_lm_eval_knows():
    assert {name: figures(name) for name in ("piqa", "boolq", "wikitext", "gsm8k", "eval_smoke", "sciq")} == {
        "piqa": {"acc", "acc_norm"},
        "boolq": {"acc"},
        "wikitext": {"word_perplexity", "byte_perplexity", "bits_per_byte"},
        "gsm8k": {"exact_match.strict-match", "exact_match.flexible-extract"},
        "eval_smoke": {"acc", "acc_norm"},
        "sciq": {"acc", "acc_norm"},
    }
    # code decides, or nobody knows the file
    assert figures("humaneval") is None and figures("no_such_task") is None
    assert written_tokens("no_such_task") is None and written_tokens("piqa") == 0


def test_a_file_of_the_users_is_read(tmp_path):
    assert figures(task(tmp_path)) == {"exact_match"}
    assert figures(task(tmp_path, filter_list=FILTERS)) == {"exact_match.strict", "exact_match.loose"}
    assert figures(task(tmp_path, metric_list=[{"metric": "bleu"}])) is None
    assert figures(task(tmp_path, metric_list=[{"metric": "bleu"}], process_results="!")) == {"bleu"}
    assert figures(task(tmp_path, output_type="other")) is None
    # what a run will refuse tells nothing
    for wrong in ({"output_type": ["a"]}, {"metric_list": ["acc"]}, {"metric_list": "acc"}, {"filter_list": ["f"]},
                  {"generation_kwargs": "x"}):  # fmt: skip
        assert figures(task(tmp_path, **wrong)) is None is written_tokens(task(tmp_path, **wrong))
    endless = (tmp_path / "t.yaml").with_name("endless.yaml")
    endless.write_text("output_type: generate_until\ngeneration_kwargs: {max_gen_toks: .inf}")
    assert written_tokens(TaskConfig(task="mine", path=str(endless))) is None
    for damaged in ("a: [", "x: !foo 3", "- 1", ""):
        (tmp_path / "t.yaml").write_text(damaged)
        assert figures(TaskConfig(task="mine", path=str(tmp_path / "t.yaml"))) is None
    (tmp_path / "t.yaml").unlink()
    assert figures(TaskConfig(task="mine", path=str(tmp_path / "t.yaml"))) is None


def test_names_are_those_that_lm_eval_gives(tmp_path):
    """Of its defaults, and of what filters add."""
    assert {kind: tuple(names) for kind, names in DEFAULT_METRIC_REGISTRY.items()} == task_facts._DEFAULTS
    (spec,) = specify([task(tmp_path, filter_list=FILTERS)])
    (built,) = harness.build(spec)["tasks"].values()
    names = {f"{metric}.{each.name}" for metric in built.aggregation() for each in built._filters}
    assert names == figures(spec.settings)


@pytest.mark.parametrize(
    "given", [{}, {"max_new_tokens": 7, "max_tokens": 9}, {"max_gen_toks": 5}, {"max_completion_tokens": 3}]
)
def test_tokens_that_are_written_are_lm_evals(tmp_path, given):
    assert written_tokens(task(tmp_path, generation_kwargs=given)) == normalize_gen_kwargs(given)["max_gen_toks"]


def test_gates_on_figures_that_no_task_gives(tmp_path):
    def asked(metric, *tasks):
        return unknown_figures({"g": GateConfig(metric=metric, max=1)}, tasks)

    assert asked("tasks.mean_acc", "piqa", "boolq") == asked("piqa.acc_norm", "piqa") == asked("held.perplexity") == []
    (line,) = asked("tasks.mean_acc", "piqa", "gsm8k", "wikitext")
    assert "gates.g" in line and "gsm8k, wikitext" in line and "piqa" not in line
    (line,) = asked("gsm8k.acc", "piqa", "gsm8k")
    assert "gsm8k.exact_match.strict-match" in line
    # what is not known passes
    assert asked("tasks.mean_acc", "piqa", "no_such_task") == asked("humaneval.pass@1", "humaneval") == []
    own = task(tmp_path)
    assert asked("mine.exact_match", own) == [] and asked("mine.acc", own) != []


def test_answers_that_leave_no_room_are_refused_before(tmp_path):
    long = task(tmp_path, generation_kwargs={"max_gen_toks": 512})
    require_rooms([long, "piqa", "no_such_task"], 1024)
    require_rooms([long], None)
    for tasks, context in (([long], 512), ([long.model_copy(update={"max_length": 300})], 4096), (["gsm8k"], 256)):
        with pytest.raises(InputError, match="leave no room for a question"):
            require_rooms(tasks, context)
    # a context far beyond what is sensible leaves room for any answer
    require_rooms([task(tmp_path, generation_kwargs={"max_gen_toks": 9000})], 10000)


def test_without_lm_eval_nothing_is_said(monkeypatch):
    def absent(_name):
        return None

    monkeypatch.setattr("importlib.util.find_spec", absent)
    assert figures("piqa") is None and written_tokens("gsm8k") is None
