"""Calls in what models write: the same however the text is cut into pieces."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from llmcompress.serving.tool_calls import CallStream, Style

F, G = ["f", '{"a": 1}'], ["g", "{}"]
CASES: list[tuple[Style, str, str, list[list[str]]]] = [
    ("hermes", "Hi", "Hi", []),
    ("hermes", " \n", " \n", []),
    ("hermes", "a\n\n", "a\n\n", []),
    ("hermes", "a <tool b </tool_call> c", "a <tool b </tool_call> c", []),
    ("hermes", '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>', "", [F]),
    ("hermes", 'Hi.\n\n<tool_call>{"name":"f","arguments":{"a": 1}}</tool_call>', "Hi.", [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>\n and', "and", [F]),
    (
        "hermes",
        '<tool_call>\n{"arguments": {"a": 1}, "name": "f"}\n</tool_call>\n<tool_call>\n{"name": "g"}\n</tool_call>',
        "", [F, G],
    ),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": "}\\"{", "b": [{}, 2]}}</tool_call>', "",
     [["f", '{"a": "}\\"{", "b": [{}, 2]}']]),
    ("hermes", '<tool_call>{"name": "f", "id": 3, "arguments": "{\\"a\\": 1}"}</tool_call>', "", [F]),
    ("hermes", '<tool_call>{"name": "f", "arguments": null}</tool_call>', "", [["f", "null"]]),
    # cut short
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": ', "", [["f", '{"a": ']]),
    ("hermes", '<tool_call>{"name": "f', '<tool_call>{"name": "f', []),
    ("hermes", "x <tool_", "x <tool_", []),
    # no calls
    ("hermes", "<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", []),
    ("hermes", '<tool_call>{"a": 1}</tool_call> b', '<tool_call>{"a": 1}</tool_call> b', []),
    ("hermes", '<tool_call>{"name": }</tool_call>', '<tool_call>{"name": }</tool_call>', []),
    # what breaks after its name and the beginning of its arguments has been told
    ("hermes", '<tool_call>{"name": "f", "arguments": "\\q"}</tool_call>', "}</tool_call>", [["f", ""]]),
    ("hermes", '<tool_call>{"name": "f", "arguments": {"a": 1} x, }</tool_call>', ", }</tool_call>", [F]),
    ("llama3", '{"name": "no", "name": "f", "parameters": {}}', '{"name": "no", "name": "f", "parameters": {}}', []),
    # half a character is no text that an answer can be sent as
    ("hermes", '<tool_call>{"name": "\\ud83d"}</tool_call>', '<tool_call>{"name": "\\ud83d"}</tool_call>', []),
    ("hermes", '<tool_call>{"name": "f", "arguments": "\\ud83d"}</tool_call>', "}</tool_call>", [["f", ""]]),
    ("llama3", '{"name": "f", "parameters": {"a": 1}}', "", [F]),
    ("llama3", ' <|python_tag|>{"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}', "", [F, G]),
    ("llama3", '{"name": "Bob", "parameters": 3}', '{"name": "Bob", "parameters": 3}', []),
    ("llama3", '{"answer": 42}\nYes', '{"answer": 42}\nYes', []),
    ("llama3", 'Say {"name": "f", "parameters": {}}', 'Say {"name": "f", "parameters": {}}', []),
    ("llama3", "<|python_tag|>print(1)", "print(1)", []),
    ("llama3", "\n", "\n", []),
    ("mistral", '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": {}}]', "", [F, G]),
    ("mistral", 'So[TOOL_CALLS][{"name": "f", "arguments": {"a": 1}, "id": "x"}]', "So", [F]),
    ("mistral", "[TOOL_CALLS]", "[TOOL_CALLS]", []),
    ("mistral_named", '[TOOL_CALLS]f[ARGS]{"a": 1}[TOOL_CALLS]g[CALL_ID]abc[ARGS]{}', "", [F, G]),
    ("mistral_named", '[TOOL_CALLS]f{"a": 1}', "", [F]),
    ("mistral_named", "[TOOL_CALLS]f", "[TOOL_CALLS]f", []),
]  # fmt: skip


def read(style: Style, pieces: list[str], several: bool = True) -> tuple[str, list[list[str]], list[str]]:
    """Text, calls and ids as a client puts them together."""
    stream, content, calls, ids = CallStream(style, ("f", "g"), several), "", dict[int, list[str]](), list[str]()
    for said in [*(stream.put(piece) for piece in pieces), stream.end()]:
        content += said.content
        assert len({call["index"] for call in said.calls}) == len(said.calls)
        for call in said.calls:
            held = calls.setdefault(call["index"], ["", ""])
            # the first of a call, and no other, has its name
            assert ("name" in call["function"]) == ("id" in call) == (held == ["", ""])
            ids += [call["id"]] if "id" in call else []
            held[0] += call["function"].get("name", "")
            held[1] += call["function"]["arguments"]
    assert list(calls) == list(range(len(calls)))
    return content, list(calls.values()), ids


@pytest.mark.parametrize(("style", "text", "content", "calls"), CASES)
def test_calls_are_told_from_text_however_it_comes(style: Style, text: str, content: str, calls: Any) -> None:
    draws = random.Random(0)
    for size in (1, 2, 3, 7, 1000, None, None, None):
        pieces, at = list[str](), 0
        while at < len(text):
            count = size or draws.randint(1, 9)
            pieces.append(text[at : at + count])
            at += count
        assert read(style, pieces)[:2] == (content, calls)


def test_arguments_come_before_they_are_complete() -> None:
    stream = CallStream("hermes", ("f",))
    said = stream.put('<tool_call>{"name": "f", "arguments": {"text": "a long')
    assert said.calls[0]["function"] == {"name": "f", "arguments": '{"text": "a long'}
    assert stream.put(" one").calls == [{"index": 0, "function": {"arguments": " one"}}]


def test_further_calls_are_left_out_where_one_is_wanted() -> None:
    text = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call><tool_call>{"name": "g"}</tool_call>'
    assert read("hermes", [text], several=False)[:2] == ("", [F])


def test_ids_are_those_that_templates_take() -> None:
    text = {"hermes": '<tool_call>{"name": "f"}', "mistral": '[TOOL_CALLS][{"name": "f"},{"name": "g"}]'}
    (only,) = read("hermes", [text["hermes"]])[2]
    first, second = read("mistral", [text["mistral"]])[2]
    assert only.startswith("call_") and len(first) == len(second) == 9 and first != second
    assert (first + second).isalnum()


def test_any_json_comes_back_as_it_was() -> None:
    draws = random.Random(1)

    def value(depth: int) -> Any:
        kind = draws.randrange(6 if depth else 4)
        if kind < 4:
            return [None, draws.random(), draws.choice([True, False]), draws.choice(['"', "\\", "}]", "é\n", ""])][kind]
        several = range(draws.randrange(4))
        return [value(depth - 1) for _ in several] if kind == 4 else {f"k{i}{{": value(depth - 1) for i in several}

    for _ in range(200):
        given = {"x": value(3), "name": "no"}
        raw = json.dumps(given, indent=draws.choice([None, 1]), ensure_ascii=draws.choice([True, False]))
        text = f'<tool_call>{{"name": "f", "arguments": {raw}}}</tool_call>'
        cut = draws.randrange(len(text))
        assert read("hermes", [text[:cut], text[cut:]])[1] == [["f", raw]]
