"""Tasks through the real lm-evaluation-harness on a tiny model, without a network."""

from __future__ import annotations

import contextlib
import copy
import http.server
import json
import socket
import threading

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.evaluation import harness
from llmcompress.evaluation.config import TaskConfig
from llmcompress.evaluation.task_specs import TASKS, specify
from llmcompress.inference.greedy import GreedyWriter


@pytest.fixture(scope="module")
def model(tiny, tiny_tokenizer):
    return tiny.model("mixtral", vocab_size=len(tiny_tokenizer))


@torch.inference_mode()
def log_likelihood(model, tokenizer, context, continuation):
    head = tokenizer(context)["input_ids"]
    ids = tokenizer(context + continuation)["input_ids"]
    logits = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(logits[i - 1, ids[i]]) for i in range(len(head), len(ids)))


def test_eval_smoke_equals_scoring_by_hand(model, tiny_tokenizer, capfd):
    (spec,) = specify(["eval_smoke"])
    with harness.offline(True):
        scores = {s.metric: s for s in harness.evaluate(model, tiny_tokenizer, spec, batch=3)}
    rows = [json.loads(line) for line in (TASKS / "eval_smoke.jsonl").read_text().splitlines()]
    expected = []
    for row in rows:
        # lm-eval puts its own blank between question and choice
        found = [log_likelihood(model, tiny_tokenizer, row["question"], " " + choice) for choice in row["choices"]]
        expected.append(float(max(range(len(found)), key=found.__getitem__) == row["answer"]))
    assert scores["acc"].rows == tuple(expected)
    assert scores["acc"].value == pytest.approx(sum(expected) / len(rows)) and scores["acc"].n == 8
    out, err = capfd.readouterr()
    assert out == "" and "Running" not in err, "results only belong on stdout, and progress is ours"


def test_limit_and_repeatability(model, tiny_tokenizer):
    (spec,) = specify([TaskConfig(task="eval_smoke", limit=3)])
    first, again = (harness.evaluate(model, tiny_tokenizer, spec) for _ in range(2))
    assert first == again and first[0].n == 3
    # what was asked is known, and it is not what more rows ask
    (whole,) = specify(["eval_smoke"])
    assert first[0].asked and first[0].asked != harness.evaluate(model, tiny_tokenizer, whole)[0].asked


def test_requests_that_lose_their_beginning_are_told(model, tiny_tokenizer):
    said = []
    (whole,) = specify(["eval_smoke"])
    harness.evaluate(model, tiny_tokenizer, whole, listener=harness.Listener(said.append))
    assert said == []
    lengths = []
    for row in map(json.loads, (TASKS / "eval_smoke.jsonl").read_text().splitlines()):
        # lm-eval puts its own blank between question and choice
        lengths += [len(tiny_tokenizer(f"{row['question']} {choice}")["input_ids"]) for choice in row["choices"]]
    limit = sorted(lengths)[len(lengths) // 2]
    (short,) = specify([TaskConfig(task="eval_smoke", max_length=limit)])
    harness.evaluate(model, tiny_tokenizer, short, listener=harness.Listener(said.append))
    # the last token of a request is only predicted
    cut = sum(length > limit + 1 for length in lengths)
    assert 0 < cut < len(lengths) and len(said) == 1
    assert said[0].startswith(f"eval_smoke: {cut} of {len(lengths)} requests lost their beginning")
    assert f"longer than {limit} tokens" in said[0]


def test_questions_are_cut_to_leave_room_for_answers(tiny_tokenizer, tmp_path, tiny):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"What is {i}? {'The sea. ' * i}", "answer": f"It is {i}. #### {i}"} for i in range(4)]
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    model = tiny.model("mixtral", vocab_size=len(tiny_tokenizer))

    def asked(tokens, **settings):
        said = []
        overrides = {"generation_kwargs": {"until": ["\n"], "max_gen_toks": tokens, "do_sample": False}}
        task = TaskConfig(task="gsm8k", num_fewshot=0, overrides=overrides, **settings)
        harness.evaluate(model, tiny_tokenizer, specify([task], tmp_path)[0], listener=harness.Listener(said.append))
        return said

    assert asked(4) == []
    (line,) = asked(4, max_length=40)
    cut = sum(len(tiny_tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"]) > 36 for row in rows)
    assert 0 < cut < 4 and line.startswith(f"gsm8k: {cut} of 4 requests lost their beginning")
    # 128 positions, all of them for the answer
    with pytest.raises(InputError, match="task gsm8k: answers of up to 128 tokens leave no room for a question in 128"):
        asked(128)


def test_local_folder_with_subjects_and_fewshot(model, tiny_tokenizer, tmp_path):
    rows = [
        {"question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": i % 4, "subject": subject}
        for subject in ("astronomy", "anatomy", "virology")
        for i in range(4)
    ]
    (tmp_path / "mmlu").mkdir()
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TaskConfig(task="mmlu", subjects=("astronomy", "anatomy"), num_fewshot=1)
    (spec,) = specify([task], tmp_path)
    with harness.offline(True):
        scores = harness.evaluate(model, tiny_tokenizer, spec)
    assert [(s.task, s.n) for s in scores] == [("mmlu", 8), ("mmlu_astronomy", 4), ("mmlu_anatomy", 4)]


CHAT = (
    "{% for m in messages %}<{{ m.role }}> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def test_tasks_are_asked_through_the_chat_template(model, tiny_tokenizer, tmp_path, monkeypatch):
    """One example and a system's message, as turns and as one message; what each request begins with."""
    from llmcompress.evaluation.lm_eval_model import LMEvalModel

    rows = [
        {"question": f"What is {i}?", "choices": ["a", "b", "c", "d"], "answer": i, "subject": "anatomy"}
        for i in range(4)
    ]
    (tmp_path / "mmlu").mkdir()
    for split in ("dev", "test"):
        (tmp_path / "mmlu" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words, asked, digests = copy.deepcopy(tiny_tokenizer), [], set()
    original = LMEvalModel.loglikelihood

    def noted(self, requests, *args, **kwargs):
        asked.extend(request.args[0] for request in requests)
        return original(self, requests, *args, **kwargs)

    monkeypatch.setattr(LMEvalModel, "loglikelihood", noted)

    def contexts(**settings):
        asked.clear()
        task = TaskConfig(task="mmlu", subjects=("anatomy",), num_fewshot=1, system_instruction="Be brief.", **settings)
        with harness.offline(True):
            scores = harness.evaluate(model, words, specify([task], tmp_path, limit=1)[0])
        digests.add(scores[0].asked)
        return set(asked)

    (plain,) = contexts()
    assert plain.startswith("Be brief.") and "<user>" not in plain
    with pytest.raises(InputError, match="no chat template"):
        contexts(apply_chat_template=True)
    words.chat_template = CHAT
    (turns,) = contexts(apply_chat_template=True)
    assert turns.startswith("<system> Be brief.") and turns.endswith("<assistant> ")
    assert [turns.count(f"<{role}>") for role in ("system", "user", "assistant")] == [1, 2, 2]
    (whole,) = contexts(apply_chat_template=True, fewshot_as_multiturn=False)
    assert [whole.count(f"<{role}>") for role in ("system", "user", "assistant")] == [1, 1, 1]
    assert whole.count("What is") == turns.count("What is") == 2
    # the row is the same; runs that were asked it in other words do not pair up
    assert len(digests) == 3 and all(digests)


def test_the_seed_chooses_examples(model, tiny_tokenizer, tmp_path):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"What is {i}?", "answer": f"It is {i}. #### {i}"} for i in range(40)]
    for split in ("train", "test"):
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def examples(**settings):
        task = TaskConfig(task="gsm8k", num_fewshot=2, overrides={"fewshot_config": {"sampler": "default"}}, **settings)
        built = harness.build(specify([task], tmp_path)[0])["tasks"]
        return next(iter(built.values())).fewshot_context(rows[0], 2)

    assert examples() == examples() == examples(fewshot_seed=1234)
    assert examples() != examples(fewshot_seed=1)


def test_written_answers_are_the_same_natively(model, tiny_tokenizer, tmp_path):
    from lm_eval.api.instance import Instance

    from llmcompress.evaluation.lm_eval_model import LMEvalModel

    texts = ("The cat", "Nobody saw the warm sea", "It was", "sea", "the the the")
    settings = {"until": [" the", "\n"], "max_gen_toks": 24, "do_sample": False}

    def answers(writer, **more):
        adapter = LMEvalModel(
            writer=writer, pretrained=model, tokenizer=tiny_tokenizer, batch_size=3, device="cpu", max_length=256
        )
        requests = [Instance("generate_until", {}, (text, {**settings, **more}), i) for i, text in enumerate(texts)]
        return adapter.generate_until(requests, disable_tqdm=True), adapter.wrote

    plainly, nothing = answers(None)
    assert nothing == set() and len(set(plainly)) > 1
    assert answers(GreedyWriter(model)) == (plainly, {"native"})
    assert answers(GreedyWriter(model), num_beams=2)[1] == {"the task sets num_beams"}
    assert answers(GreedyWriter(model), do_sample=True, temperature=1.0)[1] == {"answers are sampled"}


def test_a_model_whose_output_is_not_finite_has_no_scores(tiny, tiny_tokenizer):
    from lm_eval.api.instance import Instance

    from llmcompress.evaluation.lm_eval_model import LMEvalModel

    model = tiny.model("mixtral", vocab_size=len(tiny_tokenizer))
    model.get_output_embeddings().weight.data[3] = float("nan")
    adapter = LMEvalModel(pretrained=model, tokenizer=tiny_tokenizer, batch_size=1, device="cpu", max_length=128)
    with pytest.raises(InputError, match="not finite"):
        adapter.loglikelihood([Instance("loglikelihood", {}, ("the warm", " sea"), 0)], disable_tqdm=True)


def test_skipped_experts_do_not_depend_on_the_batch(tiny, tiny_tokenizer):
    from lm_eval.api.instance import Instance

    from llmcompress.evaluation.lm_eval_model import LMEvalModel
    from llmcompress.models.registry import layout_from_config
    from llmcompress.nn.skipping import attach

    model = tiny.model("mixtral", vocab_size=len(tiny_tokenizer))
    attach(model, layout_from_config(model.config.to_dict()), {"alpha": 0.9})
    texts = ["the warm sea " * count for count in (4, 9, 14, 20)]

    def scores(batch):
        adapter = LMEvalModel(
            pretrained=model, tokenizer=tiny_tokenizer, batch_size=batch, device="cpu", max_length=128
        )
        requests = [Instance("loglikelihood", {}, (text, " cat"), i) for i, text in enumerate(texts)]
        return torch.tensor([value for value, _ in adapter.loglikelihood(requests, disable_tqdm=True)])

    assert torch.allclose(scores(1), scores(4), atol=1e-4)
    assert model.llmcompress_skipping.statistics()["total"]["slots_dropped"] > 0


def test_where_states_are_rounded_does_not_depend_on_the_batch(tiny, tiny_tokenizer):
    from lm_eval.api.instance import Instance

    from llmcompress.evaluation.lm_eval_model import LMEvalModel
    from llmcompress.models.registry import layout_from_config
    from llmcompress.nn.mixers import attach

    # in float64 no state lies so near the border of two codes that the order of a sum decides
    model = tiny.model("mamba2", vocab_size=len(tiny_tokenizer)).double()
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 4})
    texts = ["the warm sea " * count for count in (4, 9, 14)]

    def scores(mode, batch):
        adapter = LMEvalModel(
            state_mode=mode, pretrained=model, tokenizer=tiny_tokenizer, batch_size=batch, device="cpu", max_length=128
        )
        requests = [Instance("loglikelihood", {}, (text, " cat and dog"), i) for i, text in enumerate(texts)]
        return torch.tensor([value for value, _ in adapter.loglikelihood(requests, disable_tqdm=True)])

    alone = {mode: scores(mode, 1) for mode in ("per_token", "decode_only")}
    assert not torch.allclose(alone["per_token"], alone["decode_only"])
    for mode, expected in alone.items():
        assert torch.allclose(scores(mode, 3), expected, atol=1e-4)


def test_missing_hub_data_is_an_input_error():
    (spec,) = specify(["piqa"])
    with harness.offline(True), pytest.raises(InputError, match=r"task piqa: .* not in the cache") as caught:
        harness.build(spec)
    assert caught.value.exit_code == 4 and "tasks_dir" in str(caught.value.hint)


def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch):
    import huggingface_hub.constants as hub

    (spec,) = specify(["piqa"])
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as deaf:

        def hang_up():
            # ends when the socket does
            with contextlib.suppress(OSError):
                while True:
                    deaf.accept()[0].close()
                    asked.append(1)

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{deaf.getsockname()[1]}")
            monkeypatch.setenv("no_proxy", "127.0.0.1")
            with pytest.raises(InputError, match="does not answer") as caught:
                harness.build(spec)
        finally:
            deaf.shutdown(socket.SHUT_RDWR)
            thread.join()
    # its own client tries five times, with growing pauses
    assert len(asked) == 1
    assert "TASKS/piqa/validation.jsonl" in str(caught.value.hint)


def test_any_answer_of_the_hub_counts(monkeypatch):
    import huggingface_hub.constants as hub

    class Silent(http.server.BaseHTTPRequestHandler):
        """Knows no method, so it answers 501."""

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Silent)
    monkeypatch.setattr(hub, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    assert harness.hub_silence() is None
    thread.join()
    server.server_close()


@pytest.mark.parametrize(
    ("text", "said"),
    [('{"question": "a"}\n', "'choices' is undefined"), ('{"question":\n', "JSON parse error"), ("", "no rows")],
)
def test_local_rows_that_the_task_cannot_read_are_named(tmp_path, capfd, text, said):
    file = tmp_path / "arc_easy" / "test.jsonl"
    file.parent.mkdir()
    file.write_text(text)
    (spec,) = specify(["arc_easy"], tmp_path)
    with pytest.raises(InputError, match=said) as caught:
        harness.build(spec)
    assert str(file) in caught.value.message and capfd.readouterr() == ("", "")


GOOD = {"id": "a", "question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"answerKey": "E"}, "'E' is not in list"),
        ({"answerKey": None}, "no 'answerKey'"),
        ({"question": None}, "no 'question'"),
        ({"choices": None}, "no 'choices'"),
        ({"choices": {"text": [], "label": ["A", "B"]}}, r"choices are \[\]"),
        ({"choices": {"text": ["one"], "label": ["A", "B"]}}, "the answer 1 is none of its 1 choices"),
        ({"choices": {"text": ["one", None], "label": ["A", "B"]}}, r"choices are \['one', None\]"),
    ],
)
def test_a_later_row_that_the_task_cannot_read_is_named(tmp_path, capfd, change, said):
    file = tmp_path / "arc_easy" / "test.jsonl"
    file.parent.mkdir()
    file.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, GOOD, {**GOOD, **change}, GOOD)))
    (spec,) = specify(["arc_easy"], tmp_path)
    with pytest.raises(InputError, match=f"row 3: .*{said}") as caught:
        harness.build(spec)
    assert str(file) in caught.value.message and capfd.readouterr() == ("", "")
    # rows beyond the limit are not asked
    assert harness.build(specify(["arc_easy"], tmp_path, limit=2)[0])


def test_a_label_beyond_the_choices_and_a_broken_example_are_named(tmp_path):
    rows = [{"goal": "g", "sol1": "a", "sol2": "b", "label": label} for label in (0, 1, 2)]
    questions = [{"question": "1 + 1?", "answer": "#### 2"}] * 2
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match="row 3: the answer 2 is none of its 2 choices"):
        harness.build(specify(["piqa"], tmp_path)[0])
    (tmp_path / "gsm8k").mkdir()
    for split, last in (("test", {}), ("train", {"answer": None})):
        lines = [*questions, {**questions[0], **last}]
        (tmp_path / "gsm8k" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    with pytest.raises(InputError, match=r"train\.jsonl: row 3: no 'answer'"):
        harness.build(specify(["gsm8k"], tmp_path)[0])
    assert harness.build(specify([TaskConfig(task="gsm8k", num_fewshot=0)], tmp_path)[0])
