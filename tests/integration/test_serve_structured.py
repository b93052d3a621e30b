"""Structured outputs, penalties and tokens over the wire, with the ``openai`` client."""

from __future__ import annotations

import copy
import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import BaseModel

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llmcompress.serving.limits import Limits  # noqa: E402

LIMITS = Limits(rows=6, queue=32, cache_tokens=2000, prompt_tokens=100, new_tokens=100, choices=8)
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
MESSAGES: list[Any] = [{"role": "user", "content": "The cat"}]
# without blanks: random logits would mostly write those
SPACE = {"guided_whitespace_pattern": " ?"}


class Animal(BaseModel):
    """What answers are parsed into."""

    kind: Literal["cat", "stone"]
    age: int


SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"kind": {"enum": ["cat", "stone"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["kind", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def served_model(tiny_tokenizer: Any, tiny_llama: Any) -> tuple[Any, Any]:
    words = copy.deepcopy(tiny_tokenizer)
    words.chat_template = TEMPLATE
    return tiny_llama(len(words), spread=1.0), words


@pytest.fixture(scope="module", params=["native", "modules"])
def server(served_model: tuple[Any, Any], start_server: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    from llmcompress.serving.served import serve_model

    running = start_server(serve_model(*served_model, "tiny", LIMITS, native=request.param == "native"), LIMITS)
    yield running
    running.stop()


def chat(server: Any, **asked: Any) -> Any:
    return server.client().chat.completions.create(
        model="tiny", messages=MESSAGES, **{"max_tokens": 100, "temperature": 1.0, "seed": 3, **asked}
    )


def schema(**more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "animal", "schema": SCHEMA, **more}}}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_json_keeps_to_its_schema_whole_and_streamed(server: Any, temperature: float) -> None:
    asked = {**schema(strict=True), "n": 3, "temperature": temperature, "extra_body": SPACE}
    whole = chat(server, **asked)
    for choice in whole.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content)
        assert set(found) == {"kind", "age"} and found["kind"] in ("cat", "stone") and 0 <= found["age"] <= 99
    if temperature == 0:
        assert len({choice.message.content for choice in whole.choices}) == 1
    texts = ["", "", ""]
    for chunk in chat(server, **asked, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_what_the_client_parses_into_a_class(server: Any) -> None:
    answer = server.client().chat.completions.parse(
        model="tiny", messages=MESSAGES, response_format=Animal, max_tokens=100, seed=1, extra_body=SPACE
    )
    found = answer.choices[0].message.parsed
    # an integer without a bound may go on until there is no room
    assert isinstance(found, Animal) or answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("field", "value", "pattern"),
    [
        ("regex", "[ab]{3,5}", "[ab]{3,5}"),
        ("choice", ["The cat sat", 'a "quote"', "stone"], 'The cat sat|a "quote"|stone'),
        ("grammar", 'root ::= "x" [0-9]? "."', r"x[0-9]?\."),
        ("grammar", 'start: "x" /[0-9]?/ "."', r"x[0-9]?\."),
    ],
)
def test_other_formats_by_the_new_and_the_old_name(server: Any, field: str, value: Any, pattern: str) -> None:
    for extra in ({"structured_outputs": {field: value}}, {f"guided_{field}": value}):
        answer = server.client().completions.create(
            model="tiny", prompt="The cat", max_tokens=60, temperature=1.5, seed=5, n=4, extra_body=extra
        )
        assert all(re.fullmatch(pattern, choice.text) for choice in answer.choices)
        assert {choice.finish_reason for choice in answer.choices} == {"stop"}


def test_probabilities_are_those_among_what_is_allowed(server: Any) -> None:
    answer = chat(server, logprobs=True, top_logprobs=3, extra_body={"structured_outputs": {"regex": "[ab]{2}"}})
    first = answer.choices[0].logprobs.content[0]
    allowed = [top for top in first.top_logprobs if top.logprob > -9999]
    assert {top.token for top in allowed} <= {"a", "b", "ab", "ba", "aa", "bb"}
    assert len(first.top_logprobs) == 3


def test_formats_of_some_do_not_touch_others(server: Any) -> None:
    """In one batch, some cancelled half-way."""
    alone = server.client().completions.create(model="tiny", prompt="The cat", max_tokens=40, temperature=0)
    got: dict[int, str] = {}

    def ask(number: int) -> None:
        plain = number % 2 == 0
        extra = {} if plain else {"structured_outputs": {"regex": "(ab|c){20}"}}
        answer = server.client().completions.create(
            model="tiny", prompt="The cat", max_tokens=100 if not plain else 40, temperature=0, extra_body=extra,
            stream=number == 1,
        )  # fmt: skip
        if number == 1:
            with answer:
                next(iter(answer))
            return
        got[number] = answer.choices[0].text

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {got[number] for number in (0, 2, 4)} == {alone.choices[0].text}
    assert all(re.fullmatch("(ab|c){20}", got[number]) for number in (3, 5))
    assert server.idle()


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "no"}}}},
         "response_format: Invalid type: no"),
        ({"extra_body": {"guided_regex": "[a"}}, "guided_regex: .*unclosed character class"),
        ({"extra_body": {"guided_grammar": "start: foo"}}, "guided_grammar: .*unknown name"),
        # the latter on a machine that stands still
        ({"extra_body": {"guided_regex": "(a?){3000}a{3000}"}}, "guided_regex: .*(too many expressions|to compile)"),
        ({"extra_body": {"guided_regex": "a", "guided_choice": ["b"]}}, "one format at a time"),
    ],
)  # fmt: skip
def test_formats_that_cannot_be_kept_to_are_refused(server: Any, asked: dict[str, Any], words: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words):
        chat(server, **asked)


def test_without_the_library_it_says_what_to_install(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(openai.InternalServerError, match=r"pip install 'llmcompress\[structured\]'") as caught:
        chat(server, **schema())
    assert caught.value.status_code == 501


class PanicException(BaseException):
    """What pyo3 makes of a panic in Rust, of llguidance's or of a tokenizer's."""


@pytest.mark.parametrize("panics", [False, True])
def test_a_format_that_cannot_be_followed_any_more_ends_its_answer_alone(
    server: Any, monkeypatch: pytest.MonkeyPatch, panics: bool
) -> None:
    from llmcompress.inference.grammar import GrammarError, Walk

    calls = []

    def restrict(self: Any, logits: Any) -> Any:
        calls.append(1)
        if len(calls) > 3:
            raise PanicException("index out of bounds") if panics else GrammarError("too many items")
        return real(self, logits)

    real = Walk.restrict
    monkeypatch.setattr(Walk, "restrict", restrict)
    kind, words = (
        (openai.InternalServerError, "failed to compute") if panics else (openai.BadRequestError, "too complex")
    )
    with pytest.raises(kind, match=words):
        chat(server, extra_body={"guided_regex": "a{50}"})
    monkeypatch.undo()
    assert chat(server, extra_body={"guided_regex": "a{5}"}).choices[0].message.content == "aaaaa"


def test_members_of_a_family_keep_to_formats(family_run: Path, start_server: Any) -> None:
    import torch

    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.serving.served import serve_family

    artifact = FamilyArtifact(family_run / "run" / "artifact")
    running = start_server(serve_family(artifact, LIMITS, torch.float32, "cpu"), LIMITS)
    try:
        for name in artifact.members:
            answer = running.client().completions.create(
                model=name, prompt="The cat", max_tokens=60, temperature=1, seed=2, n=2,
                extra_body={"structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True}},
            )  # fmt: skip
            assert all(json.loads(choice.text)["kind"] in ("cat", "stone") for choice in answer.choices)
        with pytest.raises(openai.BadRequestError, match="model: name one of ant, bee, cat"):
            running.client().post("/../tokenize", body={"prompt": "x"}, cast_to=object)
    finally:
        running.stop()


def test_penalties_and_biases(server: Any) -> None:
    def write(**asked: Any) -> list[int]:
        answer = server.client().completions.create(
            model="tiny", prompt=[60, 61, 62], max_tokens=30, temperature=0, **asked
        )
        text = answer.choices[0].text
        assert answer.usage.completion_tokens == 30 or answer.choices[0].finish_reason == "stop"
        return list(server.client().post("/../tokenize", body={"prompt": text}, cast_to=object)["tokens"])

    assert write(logit_bias={"70": 100}) == [70] * 30
    assert 70 not in write(logit_bias={"70": -100, "71": 100})
    # a token that has been written is far less likely than all that have not
    for extra in (
        {"frequency_penalty": 2.0, "logit_bias": {"70": 4}},
        {"presence_penalty": 2.0, "logit_bias": {"70": 4}},
    ):
        assert write(**extra).count(70) < 30
    assert write(extra_body={"repetition_penalty": 100.0}) != write()


def test_lengths_and_ends_as_vllm_has_them(server: Any, served_model: tuple[Any, Any]) -> None:
    _, words = served_model
    end, comma = 2, words(",", add_special_tokens=False)["input_ids"][0]

    def write(**extra: Any) -> Any:
        given: dict[str, Any] = {"max_tokens": 8, "temperature": 0, "logit_bias": {str(end): 90, str(comma): 80}}
        answer = server.client().completions.create(model="tiny", prompt="The cat", **{**given, "extra_body": extra})
        return answer.choices[0].text, answer.choices[0].finish_reason, answer.usage.completion_tokens

    assert write() == ("", "stop", 1)
    assert write(min_tokens=3) == (",,,", "stop", 4)
    assert write(ignore_eos=True, skip_special_tokens=False) == (words.decode([end] * 8), "length", 8)
    assert write(include_stop_str_in_output=True, skip_special_tokens=False) == (words.decode([end]), "stop", 1)
    assert write(min_tokens=3, stop=[","]) == (",,,", "stop", 4)
    commas: dict[str, Any] = {"min_tokens": 3, "stop": [","], "logit_bias": {str(comma): 90}}
    assert write(**commas) == (",,,", "stop", 4)
    assert write(**commas, include_stop_str_in_output=True) == (",,,,", "stop", 4)
    assert write(min_tokens=8, stop_token_ids=[comma])[1:] == ("length", 8)
    with pytest.raises(openai.BadRequestError, match="min_tokens: 9, of 8 at most"):
        write(min_tokens=9)


def test_a_load_is_measured(server: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from llmcompress.cli.app import invoke

    words = ["-n", "5", "-c", "3", "--input-tokens", "20", "--output-tokens", "9", "--vocabulary", "300"]
    assert invoke(["bench", "serve", f"{server.url}/v1", *words, "--json", "--quiet"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["failed"], found["prompt_tokens"], found["completion_tokens"]) == (0, 100, 45)
    assert not found["tokens_are_pieces"] and 0 < found["ttft_ms"]["max"] <= found["e2el_ms"]["max"]
    assert server.idle()


def test_tokens_of_texts_and_back(server: Any, served_model: tuple[Any, Any]) -> None:
    _, words = served_model

    def post(path: str, **body: Any) -> Any:
        return server.client().post(f"/../{path}", body=body, cast_to=object)

    expected = words("The cat")["input_ids"]
    found = post("tokenize", prompt="The cat", return_token_strs=True)
    room = server.server.scheduler.room("tiny")
    assert found == {
        "count": len(expected), "max_model_len": room, "tokens": expected,
        "token_strs": words.convert_ids_to_tokens(expected),
    }  # fmt: skip
    assert post("detokenize", model="tiny", tokens=expected) == {"prompt": "The cat"}
    # as the endpoint for chats reads it
    told = chat(server, max_tokens=1).usage.prompt_tokens
    assert post("tokenize", messages=MESSAGES)["count"] == told
    assert post("tokenize", messages=MESSAGES, add_generation_prompt=False)["count"] < told


def test_a_stream_may_count_in_every_chunk(server: Any) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [chunk.usage.completion_tokens for chunk in chat(server, stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] > 0
