"""Calls as the templates of Qwen3-Coder, GLM-4.5, DeepSeek-V3 and V3.1 show them, in pieces of any size."""

from __future__ import annotations

import json
from typing import Any

import pytest

from llmcompress.serving.tool_calls import Style
from llmcompress.serving.tools import Function, Toolbox
from llmcompress.serving.xml_calls import XmlCallStream

PROPERTIES = {
    "city": {"type": "string"},
    "days": {"type": "integer"},
    "warm": {"type": ["boolean", "null"]},
    "where": {"type": "object"},
    "code": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "size": {"type": ["number", "string"]},
}
TOOLS = (Function(name="weather", parameters={"type": "object", "properties": PROPERTIES}), Function(name="now"))
VALUES: dict[str, Any] = {"city": "12", "days": 3, "warm": None, "where": {"a": "<b>\n"}}


def qwen(name: str, values: dict[str, str]) -> str:
    parts = "".join(f"<parameter={key}>\n{value}\n</parameter>\n" for key, value in values.items())
    return f"<tool_call>\n<function={name}>\n{parts}</function>\n</tool_call>"


def glm(name: str, values: dict[str, str]) -> str:
    parts = "".join(f"<arg_key>{key}</arg_key>\n<arg_value>{value}</arg_value>\n" for key, value in values.items())
    return f"<tool_call>{name}\n{parts}</tool_call>"


WRITERS: dict[Style, Any] = {"qwen_xml": qwen, "glm_xml": glm}
both = pytest.mark.parametrize("style", WRITERS)
sizes = pytest.mark.parametrize("size", [1, 2, 5, 11, 10_000])


def deepseek(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>function<｜tool▁sep｜>{name}\n```json\n{arguments}\n```<｜tool▁call▁end｜>"


def deepseek_v31(name: str, arguments: str) -> str:
    return f"<｜tool▁call▁begin｜>{name}<｜tool▁sep｜>{arguments}<｜tool▁call▁end｜>"


def read(style: Style, text: str, size: int, several: bool = True) -> tuple[str, list[tuple[str, Any]], XmlCallStream]:
    """Text and calls of an answer that comes in pieces."""
    stream = Toolbox(style, TOOLS, several).stream()
    assert isinstance(stream, XmlCallStream)
    content, calls = "", list[tuple[str, Any]]()
    for at in range(0, len(text), size):
        said = stream.put(text[at : at + size])
        content += said.content
        for call in said.calls:
            assert call["index"] == len(calls) and call["id"].startswith("call_") and call["type"] == "function"
            calls.append((call["function"]["name"], json.loads(call["function"]["arguments"])))
    return content + stream.end().content, calls, stream


@both
@sizes
def test_calls_and_the_text_before_them(style: Style, size: int) -> None:
    texts = {"city": "12", "days": "3", "warm": "None", "where": json.dumps(VALUES["where"])}
    write = WRITERS[style]
    text = f"Let me see < 3.\n\n{write('weather', texts)}\n{write('now', {})}\n"
    content, calls, stream = read(style, text, size)
    assert (content, stream.count) == ("Let me see < 3.", 2)
    assert calls == [("weather", VALUES), ("now", {})]
    assert read(style, text, size, several=False)[1] == [("weather", VALUES)]


@both
@sizes
@pytest.mark.parametrize("name", ["other", "weather"])
def test_what_is_no_call_is_text_as_it_was(style: Style, size: int, name: str) -> None:
    # a tool that there is not, and a call that the end cuts short
    text = f"a {WRITERS[style](name, {'city': 'Rome'})} b\n"
    text = text if name == "other" else text[: text.index("Rome") + 2]
    assert read(style, text, size)[:2] == (text, [])


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("days", "3", 3),
        ("days", "many", "many"),
        ("days", "NaN", "NaN"),
        ("where", "[1e999]", "[1e999]"),
        ("code", "12", "12"),
        ("code", "true", "true"),
        ("code", "None", None),
        ("size", "12", 12),
        ("size", "[12]", "[12]"),
        ("city", "true", "true"),
        ("warm", "True", True),
        ("warm", "null", None),
        ("unknown", "[1]", [1]),
        ("unknown", "a\nb", "a\nb"),
        ("city", "", ""),
    ],
)
@both
def test_values_have_the_types_that_their_tool_names(style: Style, name: str, text: str, value: Any) -> None:
    assert read(style, WRITERS[style]("weather", {name: text}), 7)[1] == [("weather", {name: value})]


deepseeks = pytest.mark.parametrize(
    ("style", "write"), [("deepseek_v3", deepseek), ("deepseek_v31", deepseek_v31)]
)  # fmt: skip


@deepseeks
@sizes
def test_calls_of_deepseek_and_the_text_before_them(style: Style, write: Any, size: int) -> None:
    calls = f"{write('weather', json.dumps(VALUES))}\n{write('now', '{}')}"
    text = f"Let me < see.\n<｜tool▁calls▁begin｜>{calls}<｜tool▁calls▁end｜>"
    content, found, stream = read(style, text, size)
    assert (content, found, stream.count) == ("Let me < see.", [("weather", VALUES), ("now", {})], 2)
    assert read(style, text, size, several=False)[1] == [("weather", VALUES)]


@deepseeks
@sizes
def test_what_is_no_call_of_deepseek_is_text(style: Style, write: Any, size: int) -> None:
    for call in (write("other", "{}"), write("now", "[1]"), write("now", '{"a": NaN}'), write("now", '{"a": 1}')[:-30]):
        assert read(style, f"a {call} b", size)[:2] == (f"a {call} b", [])
    assert read(style, "a <｜tool▁ b <｜too", size)[:2] == ("a <｜tool▁ b <｜too", [])
