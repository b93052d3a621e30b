"""Tools over the wire, with the ``openai`` client: a conversation with calls, whole and streamed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llmcompress.serving.limits import Limits  # noqa: E402

LIMITS = Limits(rows=6, queue=32, cache_tokens=6000, prompt_tokens=400, new_tokens=150, choices=8)
# as Qwen's and Hermes', shorter
TEMPLATE = (
    "{% if tools %}tools:{% for tool in tools %} {{ tool | tojson }}{% endfor %}\n{% endif %}"
    "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n{\"name\": \"{{ call.function.name }}\", \"arguments\": "
    "{{ call.function.arguments | tojson }}}\n</tool_call>{% endfor %}\n{% endfor %}assistant:"
)  # fmt: skip
MESSAGES: list[Any] = [{"role": "user", "content": "The cat"}]
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "Of a city",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Rome", "Oslo"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "now", "parameters": {"type": "object", "additionalProperties": False}}},
]
# half a character, which no tokenizer takes
CALL = {"id": "a", "type": "function", "function": {"name": "now", "arguments": '{"a": "\\ud83d"}'}}
HALF: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}
NAMED: dict[str, Any] = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def words(tiny_tokenizer: Any) -> Any:
    from tokenizers import AddedToken

    found = copy.deepcopy(tiny_tokenizer)
    found.add_tokens([AddedToken("<tool_call>", special=False), AddedToken("</tool_call>", special=False)])
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module", params=["native", "modules"])
def server(words: Any, tiny_llama: Any, start_server: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    from llmcompress.serving.served import serve_model

    model = tiny_llama(len(words))
    model.config.max_position_embeddings = 1024
    served = serve_model(model, words, "tiny", LIMITS, native=request.param == "native")
    running = start_server(served, LIMITS)
    yield running
    running.stop()


def chat(server: Any, **asked: Any) -> Any:
    given = {"messages": MESSAGES, "tools": TOOLS, "max_tokens": 150, "temperature": 1.0, "seed": 3, **asked}
    return server.client().chat.completions.create(model="tiny", **given)


@pytest.mark.parametrize(("choice", "reason"), [("required", "tool_calls"), (NAMED, "stop")])
def test_a_call_that_is_asked_for_comes_whole_and_streamed(server: Any, choice: Any, reason: str) -> None:
    asked = {"tool_choice": choice, "parallel_tool_calls": False, "n": 3}
    whole = chat(server, **asked)
    for one in whole.choices:
        (call,) = one.message.tool_calls
        assert one.finish_reason == reason and one.message.content is None and call.id
        wanted = {"city": "Rome"}, {"city": "Oslo"}
        assert json.loads(call.function.arguments) in (wanted if call.function.name == "weather" else ({},))
        assert choice == "required" or call.function.name == "weather"
    texts, names, reasons = ["", "", ""], ["", "", ""], [None, None, None]
    for chunk in chat(server, **asked, stream=True):
        one = chunk.choices[0]
        assert not one.delta.content
        for delta in one.delta.tool_calls or ():
            assert delta.index == 0
            names[one.index] += delta.function.name or ""
            texts[one.index] += delta.function.arguments or ""
        reasons[one.index] = one.finish_reason or reasons[one.index]
    calls = [one.message.tool_calls[0].function for one in whole.choices]
    assert texts == [call.arguments for call in calls] and names == [call.name for call in calls]
    assert reasons == [reason] * 3


@pytest.mark.parametrize("name", ["auto", "required"])
def test_a_tool_may_be_called_like_a_choice(server: Any, name: str) -> None:
    tools = [TOOLS[1], {"type": "function", "function": {**TOOLS[1]["function"], "name": name}}]
    named = {"type": "function", "function": {"name": name}}
    for one in chat(server, tools=tools, tool_choice=named, parallel_tool_calls=False, n=4).choices:
        assert [call.function.name for call in one.message.tool_calls] == [name] and one.finish_reason == "stop"


def test_a_model_may_choose_to_call(server: Any, words: Any) -> None:
    """A call is what it likes best, and then what is the shortest."""
    opener = words.convert_tokens_to_ids("<tool_call>")
    answer = chat(server, logit_bias={str(opener): 100}, response_format={"type": "json_object"}, temperature=0)
    (one,) = answer.choices
    assert one.message.tool_calls[0].function.name in ("weather", "now")
    plain = chat(server, logit_bias={str(opener): -100}, max_tokens=5)
    assert plain.choices[0].message.tool_calls is None and plain.choices[0].message.content


def test_results_go_back_and_none_leaves_the_tools_out(server: Any) -> None:
    first = chat(server, tool_choice=NAMED, parallel_tool_calls=False).choices[0].message
    messages = [*MESSAGES, first, {"role": "tool", "tool_call_id": first.tool_calls[0].id, "content": "42"}]
    second = chat(server, messages=messages, max_tokens=5)
    without = chat(server, messages=messages, max_tokens=5, tool_choice="none")
    plain = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=5)
    assert without.usage.prompt_tokens == plain.usage.prompt_tokens < second.usage.prompt_tokens
    counted = server.client().post("/../tokenize", body={
        "messages": [*MESSAGES, first.model_dump(exclude_none=True), messages[-1]], "tools": TOOLS,
    }, cast_to=object)  # fmt: skip
    assert counted["count"] == second.usage.prompt_tokens


def test_what_the_client_parses_of_strict_tools(server: Any) -> None:
    strict = copy.deepcopy(TOOLS)
    for tool in strict:
        tool["function"]["strict"] = True
        tool["function"]["parameters"].setdefault("properties", {})
    answer = server.client().chat.completions.parse(
        model="tiny", messages=MESSAGES, tools=strict, tool_choice="required", parallel_tool_calls=False, max_tokens=150
    )
    call = answer.choices[0].message.tool_calls[0].function
    assert call.parsed_arguments == json.loads(call.arguments)


@pytest.mark.parametrize(
    ("asked", "words_of_it"),
    [
        ({"tool_choice": {"type": "function", "function": {"name": "no"}}}, "there is no tool 'no'"),
        ({"extra_body": {"guided_regex": "a"}}, "guided_regex: only JSON goes with tools"),
        ({"messages": [*MESSAGES, HALF]}, "arguments of now are not valid JSON: .*surrogates"),
        (
            {"tool_choice": "required", "tools": [{**NAMED, "function": {"name": "f", "parameters": {"not": {}}}}]},
            "tools: .*Unimplemented keys",
        ),
    ],
)  # fmt: skip
def test_tools_that_cannot_be_called_are_refused(server: Any, asked: dict[str, Any], words_of_it: str) -> None:
    with pytest.raises(openai.BadRequestError, match=words_of_it):
        chat(server, **asked)


class Scripted:
    """In the place of what a model writes: a text, seven letters a token."""

    text = ""

    def __init__(self, *_: Any) -> None:
        self.stopped = self.included = False
        self._at = 0

    def put(self, token: int) -> str:
        """Some more."""
        self._at += 7
        self.stopped = self._at >= len(self.text)
        return self.text[self._at - 7 : self._at]

    def end(self) -> str:
        """Nothing is held back."""
        return ""


def test_calls_in_xml_whole_and_streamed(
    words: Any, tiny_llama: Any, start_server: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmcompress.serving import app
    from llmcompress.serving.served import serve_model

    coder = copy.deepcopy(words)
    coder.chat_template = TEMPLATE.replace('{"name": "', "<function=")
    assert "<function=" in coder.chat_template
    model = tiny_llama(len(coder))
    model.config.max_position_embeddings = 1024
    monkeypatch.setattr(app, "TextStream", Scripted)
    one = "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>\n</tool_call>"
    monkeypatch.setattr(Scripted, "text", f"Well.\n{one}\n{one.replace('Rome', 'Oslo')}")
    running = start_server(serve_model(model, coder, "tiny", LIMITS, native=False), LIMITS)
    try:
        asked = {"extra_body": {"ignore_eos": True}}
        (whole,) = chat(running, **asked).choices
        assert (whole.message.content, whole.finish_reason) == ("Well.", "tool_calls")
        calls = [(call.function.name, call.function.arguments) for call in whole.message.tool_calls]
        assert calls == [("weather", '{"city": "Rome"}'), ("weather", '{"city": "Oslo"}')]
        content, found = "", []
        for chunk in chat(running, **asked, stream=True):
            content += chunk.choices[0].delta.content or ""
            found += [(c.index, c.function.arguments) for c in chunk.choices[0].delta.tool_calls or ()]
        assert content == "Well." and found == [(0, '{"city": "Rome"}'), (1, '{"city": "Oslo"}')]
        (single,) = chat(running, **asked, parallel_tool_calls=False).choices
        assert len(single.message.tool_calls) == 1
        with pytest.raises(openai.BadRequestError, match="JSON, which alone is enforced"):
            chat(running, tool_choice="required")
    finally:
        running.stop()
