"""What a request may say, and what it means."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmcompress.inference.generate import Recommended
from llmcompress.inference.penalties import Penalties
from llmcompress.serving.protocol import ApiError, Ask, ChatAsk, CompletionAsk, TokenizeAsk, parse
from llmcompress.serving.structured import Form, ObjectFormat, form_of

PLAIN = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def test_prompts_are_texts_or_tokens_one_or_several() -> None:
    for prompt, expected in (
        ("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
    ):  # fmt: skip
        assert parse(CompletionAsk, {**PLAIN, "prompt": prompt}).prompts() == expected


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("temperature", (0, 2), (-0.01, 2.01)),
        ("top_p", (0, 1), (-0.01, 1.01)),
        ("n", (1,), (0,)),
        ("seed", (-(2**63), 2**63 - 1), (-(2**63) - 1, 2**63)),
        ("top_k", (-1,), (-2,)),
        ("max_tokens", (1,), (0,)),
        ("stop", ("a", "a" * 256, ["a"] * 64), ("", "a" * 257, ["a"] * 65, ["a", ""])),
        ("best_of", (1,), (2,)),
        ("presence_penalty", (-2, 2, None), (-2.01, 2.01, float("nan"))),
        ("frequency_penalty", (-2, 2, None), (-2.01, 2.01)),
        ("repetition_penalty", (0.01, 1, 100), (0, -1, 101, float("inf"))),
        (
            "logit_bias",
            ({}, None, {"5": -100, "6": 100}),
            ({"5": 101}, {"x": 1}, {"-1": 1}, {"5": None}, {"5": float("nan")}),
        ),
        ("logprobs", (0, 5), (-1, 6)),
    ],
)
def test_bounds_of_fields(field: str, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    for value in inside:
        parse(CompletionAsk, {**PLAIN, field: value})
    for value in outside:
        with pytest.raises(ApiError) as caught:
            parse(CompletionAsk, {**PLAIN, field: value})
        assert caught.value.status == 400 and field in str(caught.value)


@pytest.mark.parametrize(("kind", "asked"), [(CompletionAsk, PLAIN), (ChatAsk, CHAT)])
def test_null_is_as_good_as_absent(kind: type[Any], asked: dict[str, Any]) -> None:
    nulls = dict.fromkeys(set(kind.model_fields) - set(asked)) | {"audio": None, "web_search_options": None}
    assert parse(kind, {**nulls, **asked}) == parse(kind, asked)
    assert parse(TokenizeAsk, {"prompt": "x", "messages": None}).prompt == "x"


@pytest.mark.parametrize(
    ("field", "nulls", "bare"),
    [
        ("response_format", {"type": "text", "json_schema": None}, {"type": "text"}),
        ("structured_outputs", {"regex": "a", "json": None, "disable_any_whitespace": None}, {"regex": "a"}),
        (
            "tools",
            [{"type": "function", "function": {"name": "f", "parameters": None, "examples": None}}],
            [{"type": "function", "function": {"name": "f"}}],
        ),
    ],
)
def test_null_in_an_object_of_a_body_is_as_good_as_absent(field: str, nulls: Any, bare: Any) -> None:
    assert parse(ChatAsk, {**CHAT, field: nulls}) == parse(ChatAsk, {**CHAT, field: bare})


def test_null_in_a_schema_stays() -> None:
    schema = {"enum": [None], "default": None}
    found = parse(ChatAsk, {**CHAT, "response_format": {"type": "json_object", "schema": schema}}).response_format
    assert isinstance(found, ObjectFormat) and found.described == schema


@pytest.mark.parametrize(
    ("asked", "param"),
    [({"stop": ["a"] * 65}, "stop"), ({"stream_options": {}}, "stream_options"), ({"prompt": [[1], "a"]}, "prompt")],
)
def test_an_error_names_its_field(asked: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(CompletionAsk, {**PLAIN, **asked})
    assert caught.value.param == param and caught.value.message.startswith(f"{param}:")


def test_hints_for_other_servers_caches_say_nothing() -> None:
    hint = {"cache_control": {"type": "ephemeral"}}
    part = {"type": "text", "text": "x", **hint}
    (found,) = parse(ChatAsk, {"messages": [{"role": "user", "content": [part], **hint}]}).messages
    assert found.plain() == {"role": "user", "content": "x"}


def test_penalties_of_a_request() -> None:
    silent = {**PLAIN, "presence_penalty": 0}
    made = Recommended(repetition_penalty=1.3)
    assert parse(CompletionAsk, silent).penalties(Recommended(), (2,)).idle
    assert parse(CompletionAsk, silent).penalties(made, (2,)).repetition == 1.3
    assert parse(CompletionAsk, {**silent, "repetition_penalty": 1}).penalties(made, (2,)).idle
    asked = {
        "presence_penalty": 1,
        "frequency_penalty": -0.5,
        "repetition_penalty": 1.2,
        "logit_bias": {"7": 3, "5": -1},
    }
    expected = Penalties(1.0, -0.5, 1.2, ((5, -1.0), (7, 3.0)), 4, (2, 9))
    assert parse(CompletionAsk, {**PLAIN, **asked, "min_tokens": 4}).penalties(made, {9, 2}) == expected


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


@pytest.mark.parametrize(
    ("asked", "form"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}}, None),
        ({"response_format": {"type": "json_object"}}, Form("schema", {"type": "object"}, "response_format")),
        ({"response_format": {"type": "json_object", "schema": SCHEMA}}, Form("schema", SCHEMA, "response_format")),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": True}},
             "guided_whitespace_pattern": " ?"},
            Form("schema", SCHEMA, "response_format", " ?"),
        ),
        ({"structured_outputs": {"json": SCHEMA}}, Form("schema", SCHEMA, "structured_outputs")),
        ({"structured_outputs": {"json": json.dumps(SCHEMA)}}, Form("schema", SCHEMA, "structured_outputs")),
        (
            {"structured_outputs": {"json_object": True, "disable_any_whitespace": True}},
            Form("schema", {"type": "object"}, "structured_outputs", ""),
        ),
        ({"structured_outputs": {"regex": "a+"}}, Form("regex", "a+", "structured_outputs")),
        ({"structured_outputs": {"choice": ["a"]}}, Form("choice", ["a"], "structured_outputs")),
        ({"structured_outputs": {"grammar": "start: A"}}, Form("grammar", "start: A", "structured_outputs")),
        ({"guided_json": SCHEMA}, Form("schema", SCHEMA, "guided_json")),
        ({"guided_regex": "a"}, Form("regex", "a", "guided_regex")),
        ({"guided_choice": ["a", "b"]}, Form("choice", ["a", "b"], "guided_choice")),
        ({"guided_grammar": "x"}, Form("grammar", "x", "guided_grammar")),
    ],
)  # fmt: skip
def test_formats_in_all_names(asked: dict[str, Any], form: Form | None) -> None:
    assert form_of(parse(CompletionAsk, {**PLAIN, **asked})) == form_of(parse(ChatAsk, {**CHAT, **asked})) == form


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_regex and guided_choice: one format at a time"),
        ({"response_format": {"type": "json_object"}, "guided_regex": "a"}, "response_format and guided_regex"),
        ({"structured_outputs": {}}, "give one of json"),
        ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "give one of json"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structural_tag"),
        ({"guided_json": "{"}, "guided_json: the schema is not valid JSON"),
        ({"guided_json": "3"}, "guided_json: a schema is a JSON object"),
        ({"guided_choice": []}, "guided_choice"),
        ({"response_format": {"type": "xml"}}, "'json_schema'"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "name: Field required"),
    ],
)
def test_formats_that_are_none(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words) as caught:
        parse(ChatAsk, {**CHAT, **asked})
    assert caught.value.status == 400


def test_what_is_counted_is_a_text_or_a_conversation() -> None:
    for asked in ({"prompt": "x"}, {"messages": CHAT["messages"]}):
        parse(TokenizeAsk, asked)
    for wrong in ({}, {"prompt": "x", "messages": CHAT["messages"]}):
        with pytest.raises(ApiError, match="give one of prompt and messages"):
            parse(TokenizeAsk, wrong)


TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
CALL = {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}


def test_calls_and_their_results_go_to_the_template() -> None:
    messages = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": None, "tool_calls": [{**CALL, "index": 0}]},
        {"role": "tool", "content": [{"type": "text", "text": "42"}], "tool_call_id": "x", "name": "f"},
        {"role": "developer", "content": "x", "name": "me"},
        {"role": "assistant", "content": "x", "reasoning": "hm", "reasoning_content": None},
    ]
    assert [message.plain() for message in parse(ChatAsk, {**CHAT, "messages": messages}).messages] == [
        {"role": "user", "content": "x"},
        # templates write arguments as JSON themselves
        {"role": "assistant", "content": "", "tool_calls": [
            {"id": "x", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
        ]},
        {"role": "tool", "content": "42", "tool_call_id": "x", "name": "f"},
        {"role": "system", "content": "x"},
        {"role": "assistant", "content": "x", "reasoning_content": "hm", "reasoning": "hm"},
    ]  # fmt: skip


def test_tools_go_to_the_template() -> None:
    (tool,) = (
        parse(ChatAsk, {**CHAT, "tools": [{**TOOL, "function": {**TOOL["function"], "strict": True}}]}).tools or ()
    )
    assert tool.plain() == TOOL


def message(**fields: Any) -> dict[str, Any]:
    return {**CHAT, "messages": [{"role": "assistant", "content": "x", **fields}]}


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"tools": [TOOL, TOOL]}, "two have one name"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "there is no tool 'g'"),
        ({"tool_choice": "required"}, "there are no tools"),
        ({"tools": [TOOL], "tool_choice": "any"}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
        ({"tools": [{"type": "web_search"}]}, "'web_search' is not supported"),
        (message(role="user", tool_calls=[CALL]), "only of the assistant"),
        (message(tool_call_id="x"), "only with role tool"),
        (message(content=None), "needs content"),
        (message(role="tool", content=None), "needs content"),
        (
            message(tool_calls=[{**CALL, "function": {"name": "f", "arguments": "{"}}]),
            "arguments of f are not valid JSON",
        ),
        (message(tool_calls=[{**CALL, "function": {"name": "f", "arguments": "3"}}]), "f are not a JSON object"),
    ],
)
def test_tools_and_calls_that_are_none(asked: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words):
        parse(ChatAsk, {**CHAT, **asked})


def test_likely_tokens_are_told_only_with_probabilities() -> None:
    for value in (0, 20):
        assert parse(ChatAsk, {**CHAT, "logprobs": True, "top_logprobs": value}).top_logprobs == value
    assert parse(ChatAsk, {**CHAT, "logprobs": False, "top_logprobs": 0}).top_logprobs == 0
    for wrong in ({"top_logprobs": 2}, {"logprobs": False, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}):
        with pytest.raises(ApiError, match="top_logprobs"):
            parse(ChatAsk, {**CHAT, **wrong})


def test_a_chat_asks_for_so_many_new_tokens_by_the_newer_name_first() -> None:
    assert parse(ChatAsk, CHAT).wanted is None
    assert parse(ChatAsk, {**CHAT, "max_tokens": 3}).wanted == 3
    assert parse(ChatAsk, {**CHAT, "max_tokens": 3, "max_completion_tokens": 5}).wanted == 5


def test_a_stream_tells_its_usage_where_that_is_asked_for() -> None:
    def asked(**options: Any) -> Ask:
        return parse(CompletionAsk, {**PLAIN, "stream": True, **options})

    assert not asked().wants_usage and not asked(stream_options={"include_obfuscation": False}).wants_usage
    assert asked(stream_options={"include_usage": True}).wants_usage
    assert not asked(stream_options={"include_usage": True}).counts_always
    assert not asked(stream_options={"continuous_usage_stats": True}).counts_always
    assert asked(stream_options={"include_usage": True, "continuous_usage_stats": True}).counts_always
