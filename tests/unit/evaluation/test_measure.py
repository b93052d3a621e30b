from __future__ import annotations

import copy

import pytest

from llmcompress.data.calibration import build
from llmcompress.data.sources import InlineSource
from llmcompress.errors import InputError
from llmcompress.evaluation import measure, results
from llmcompress.evaluation.ledger import Ledger
from llmcompress.evaluation.scores import Score
from llmcompress.evaluation.task_specs import specify
from llmcompress.stages.evaluate import EvaluateConfig

TEXTS = tuple(f"The cat number {i} sat on the warm stone and looked at the sea." for i in range(30))
SOURCE = {"kind": "inline", "texts": TEXTS}


def config(**fields):
    return EvaluateConfig.model_validate({"type": "evaluate", **fields})


def test_ledger_survives_and_separates_keys(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.put("dense.task.a/b", [1])
    ledger.put("dense.task.a%b", [2])
    again = Ledger(tmp_path)
    assert (again.get("dense.task.a/b"), again.get("dense.task.a%b")) == ([1], [2])
    assert not again.has("dense.task.a") and len(list(tmp_path.glob("*.json"))) == 2
    memory = Ledger()
    memory.put("x", 1)
    assert memory.has("x") and not Ledger().has("x")


def test_held_out_text_that_was_calibration_text(tiny_tokenizer):
    calibration = build(InlineSource(kind="inline", texts=TEXTS), tiny_tokenizer, 4, 64, seed=0).tokens
    section = {"h": {"source": SOURCE, "length": 64, "separator": "</s>"}}
    with pytest.raises(InputError, match="was used for calibration"):
        measure.prepare(config(perplexity=section), tiny_tokenizer, calibration, None, print)
    said = []
    measure.prepare(config(perplexity=section, overlap="warn"), tiny_tokenizer, calibration, None, said.append)
    assert len(said) == 1 and "also calibration text" in said[0]
    measure.prepare(config(perplexity=section, overlap="ignore"), tiny_tokenizer, calibration, None, said.append)
    assert len(said) == 1


def test_a_text_of_a_few_tokens_is_told_unless_asked_for(tiny_tokenizer):
    said = []
    few = {"h": {"source": {"kind": "inline", "texts": ["a word or two"]}, "length": 64}}
    measure.prepare(config(perplexity=few), tiny_tokenizer, None, None, said.append)
    assert len(said) == 1 and said[0].startswith("h: this text has only ")
    asked = {"h": {"source": SOURCE, "length": 64, "max_tokens": 64}}
    measure.prepare(config(perplexity=asked), tiny_tokenizer, None, None, said.append)
    assert len(said) == 1


def test_length_beyond_the_model_is_refused(tiny_tokenizer):
    section = {"h": {"source": SOURCE, "length": 256}}
    with pytest.raises(InputError, match=r"perplexity\.h\.length is 256, but the model was built for 128"):
        measure.prepare(config(perplexity=section), tiny_tokenizer, None, 128, print)
    with pytest.raises(InputError, match="no tokenizer"):
        measure.prepare(config(perplexity=section), None, None, 512, print)


def test_finished_parts_are_not_measured_again(tiny, tiny_tokenizer):
    model = tiny.model("mixtral", vocab_size=len(tiny_tokenizer))
    sections = {n: {"source": SOURCE, "length": 32, "max_tokens": 64} for n in ("a", "b")}
    settings = config(perplexity=sections, generation={"prompts": ["The"], "max_new_tokens": 2})
    prepared = measure.prepare(settings, tiny_tokenizer, None, 128, print)
    ledger, told = Ledger(), []
    ledger.put("dense.perplexity.a", {"perplexity": 1.5, "stderr": None, "bits_per_byte": 0.5, "tokens": 3})
    measure.measure_side("dense", model, tiny_tokenizer, settings, prepared, ledger, told.append)
    assert len(told) == 2 and told[0].startswith("dense: b ")
    assert told[1].startswith("dense: samples written by ")
    (row,) = results.decoding_rows(prepared, ledger)
    assert row["side"] == "dense" and row["part"] == "samples" and told[1].endswith(row["written_by"])
    scores = results.side_scores("dense", settings, prepared, ledger)
    assert [(s.task, s.metric) for s in scores][:2] == [("a", "perplexity"), ("a", "bits_per_byte")]
    assert scores[0].value == 1.5 and scores[2].task == "b" and scores[2].n == 62
    assert set(measure.side_keys(settings, prepared, "dense")) == {
        "dense.perplexity.a", "dense.perplexity.b", "dense.generation",
    }  # fmt: skip
    assert all(ledger.has(key) for key in measure.side_keys(settings, prepared, "dense"))


def test_every_part_of_a_side_has_a_key():
    """A part without one would be left out of a resumed run that has all others."""
    settings = config(
        perplexity={"a": {"source": SOURCE}}, tasks=["eval_smoke"], recall={"source": SOURCE},
        generation={"prompts": ["The"]},
    )  # fmt: skip
    prepared = measure.Prepared({}, None, specify(settings.tasks))
    parts = {"perplexity.a", "task.eval_smoke", "recall", "generation"}
    assert set(measure.side_keys(settings, prepared, "compressed")) == {f"compressed.{part}" for part in parts}
    # policies are taken off for perplexity alone
    assert measure.side_keys(settings, prepared, "without_policies") == ["without_policies.perplexity.a"]


def test_who_wrote_answers_in_words():
    assert results.written_by(["native"]) == "the native engine"
    assert results.written_by(["texts are sampled"]) == "transformers: texts are sampled"
    assert results.written_by(["native", "a mask is set"]) == "both engines: a mask is set"


def test_pairing_gives_difference_and_paired_error():
    dense = [Score("t", "acc", 0.5, 0.2, 4, True, (1, 0, 1, 0)), Score("t", "only", 1.0, None, 4, None)]
    compressed = [Score("t", "acc", 0.25, 0.1, 4, True, (1, 0, 0, 0))]
    acc, only = results.pair_scores(dense, compressed)
    assert acc["difference"] == -0.25 and acc["difference_stderr"] == 0.25
    assert (acc["dense"], acc["compressed"], acc["stderr"], acc["dense_stderr"]) == (0.5, 0.25, 0.1, 0.2)
    assert only["compressed"] is None and "difference" not in only
    (alone,) = results.pair_scores(None, compressed)
    assert alone["dense"] is None and alone["compressed"] == 0.25


def test_the_mean_of_tasks_counts_each_task_once_and_pairs_its_error():
    def side(shift):
        return [
            Score("a", "acc", 0.5 + shift, 0.3, 4, True, (1, 0, 1, 0)),
            Score("b", "acc", 0.9, 0.1, 2, True, (1, 1)),
            Score("b", "acc_norm", 0.7 - shift, 0.4, 2, True, (1, 0)),
            Score("c", "exact_match", 0.2, 0.1, 9, True),
        ]

    rows = results.pair_scores(side(0.0), side(0.25))
    assert [row["difference_stderr"] for row in rows[:3]] == [0.0, 0.0, 0.0]
    rows[0]["difference_stderr"], rows[2]["difference_stderr"] = 0.03, 0.04
    (mean,) = results.task_mean(rows, ["a", "b"])
    assert (mean["task"], mean["metric"], mean["n"], mean["higher_is_better"]) == ("tasks", "mean_acc", 6, True)
    assert (mean["dense"], mean["compressed"]) == pytest.approx((0.6, 0.6)) and mean["difference"] == pytest.approx(0)
    assert mean["stderr"] == mean["dense_stderr"] == pytest.approx(0.25)
    assert mean["difference_stderr"] == pytest.approx(0.025)
    # one task is no mean, and one without an accuracy is not left out in silence
    assert results.task_mean(rows, ["a"]) == results.task_mean(rows, ["a", "b", "c"]) == []
    (alone,) = results.task_mean(results.pair_scores(None, side(0.0)), ["b", "a"])
    assert alone["dense"] is None and alone["compressed"] == pytest.approx(0.6) and "difference" not in alone
    assert config(tasks=["piqa", "boolq"], gates={"g": {"metric": "tasks.mean_acc", "max_abs_drop": 0.01}}).task_names()


def skipping(used, skipped, slots, dropped, seconds):
    counters = {
        "slots": slots, "slots_dropped": dropped, "experts_used": used, "experts_skipped": skipped, "tokens": 10,
        "tokens_without_expert": 1,
    }  # fmt: skip
    return {"total": counters, "layers": [{"module": "m.0", **counters}], "seconds": seconds}


def test_skipping_summary_adds_up_texts_and_keeps_figures_apart():
    settings = config(perplexity={n: {"source": SOURCE} for n in ("a", "b")})
    ledger = Ledger()
    for name, stats in {"a": skipping(8, 2, 100, 5, 0.1), "b": skipping(8, 4, 300, 35, 0.1)}.items():
        ledger.put(f"compressed.perplexity.{name}", {"perplexity": 5.0, "seconds": 1.0, "skipping": stats})
    partial = results.skipping_summary(settings, ledger)
    assert partial["experts_skipped"] == 6 / 16 and partial["slots_dropped"] == 40 / 400
    assert "seconds_without" not in partial
    for name in "ab":
        ledger.put(f"without_policies.perplexity.{name}", {"perplexity": 4.0, "seconds": 1.5})
    whole = results.skipping_summary(settings, ledger)
    assert (whole["seconds_with"], whole["seconds_without"]) == (2.0, 3.0)
    assert whole["texts"][0] == {"text": "a", "perplexity_with": 5.0, "perplexity_without": 4.0}
    assert whole["per_layer"] == [{"module": "m.0", "slots": 400, "slots_dropped": 40, "experts_used": 16,
                                   "experts_skipped": 6, "tokens": 20, "tokens_without_expert": 2}]  # fmt: skip
    assert results.skipping_summary(settings, Ledger()) is None


def test_chats_need_a_template_before_anything_is_measured(tiny_tokenizer):
    task = {"task": "eval_smoke", "apply_chat_template": True}
    with pytest.raises(InputError, match="task eval_smoke: apply_chat_template"):
        measure.prepare(config(tasks=[task]), tiny_tokenizer, None, None, print)
    words = copy.deepcopy(tiny_tokenizer)
    words.chat_template = "{{ messages }}"
    assert measure.prepare(config(tasks=[task]), words, None, None, print).tasks
