"""How templates write calls, and grammars that make random logits write some."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch

pytest.importorskip("llguidance")

from llmcompress.inference.grammar import Grammars
from llmcompress.serving.structured import Form
from llmcompress.serving.text import TextStream
from llmcompress.serving.tool_calls import Style
from llmcompress.serving.tools import Function, Toolbox, style_of

CITY = {
    "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"],
    "additionalProperties": False,
}  # fmt: skip
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = (
    Function(name="weather", parameters=CITY, strict=True),
    Function(name="now", parameters=EMPTY, strict=True),
)
STYLES: tuple[Style, ...] = ("hermes", "llama3", "mistral", "mistral_named")


@pytest.mark.parametrize(
    ("template", "style"),
    [
        ('{{ \'<tool_call>\\n{"name": "\' + call.name }}', "hermes"),
        ("{{ '<tool_call>\\n<function=' + call.name }}", "qwen_xml"),
        ("{{ '<tool_call>' + name }}<arg_key>", "glm_xml"),
        ("{{ '<｜tool▁call▁begin｜>' + type + '<｜tool▁sep｜>' + name + '\n```json\n' }}", "deepseek_v3"),
        ("{{ '<｜tool▁call▁begin｜>' + name + '<｜tool▁sep｜>' }}", "deepseek_v31"),
        ("{{ '[TOOL_CALLS] [' }}", "mistral"),
        ("{{ '[TOOL_CALLS]' + name + '[ARGS]' }}", "mistral_named"),
        ("{{ '{\"name\": \"' + name + '\", ' }}{{ '\"parameters\": ' }}<|start_header_id|>ipython", "llama3"),
        ("{{ tools }}", None),
    ],
)
def test_how_a_model_calls_is_read_off_its_template(template: str, style: Style | None) -> None:
    assert style_of(template) == style


@pytest.mark.parametrize("style", ["qwen_xml", "glm_xml", "deepseek_v3", "deepseek_v31"])
def test_other_calls_than_json_are_read_and_not_enforced(style: Style, tiny_tokenizer: Any) -> None:
    loose = tuple(Function(name=one.name, parameters=one.parameters) for one in FUNCTIONS)
    assert Toolbox(style, loose, True).form(tiny_tokenizer, None) is None
    for box in (Toolbox(style, FUNCTIONS, True), Toolbox(style, loose, True, forced=True)):
        with pytest.raises(ValueError, match="JSON, which alone is enforced"):
            box.form(tiny_tokenizer, None)


@pytest.fixture(scope="module", params=["special", "added", "plain"])
def words(tiny_tokenizer: Any, request: pytest.FixtureRequest) -> Any:
    """With the templates' words as tokens of both kinds, and as letters."""
    from tokenizers import AddedToken

    found = copy.deepcopy(tiny_tokenizer)
    if request.param != "plain":
        special = request.param == "special"
        names = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<tool_call>", "</tool_call>")
        found.add_tokens([AddedToken(name, special=special) for name in names])
    return found


def write(words: Any, box: Toolbox, answer: Form | None, seed: int, likely: tuple[str, ...] = ()) -> tuple[str, Any]:
    """What random logits write: text and calls."""
    form = box.form(words, answer)
    assert form is not None
    walk = Grammars().walk(words, len(words), (2,), form.grammar())
    draws, stream, text, written = torch.Generator().manual_seed(seed), TextStream(words, (), box.kept(words)), "", 0
    wanted = words.convert_tokens_to_ids(list(likely)) if likely else []
    while not walk.ended and written < 150:
        logits = torch.randn(len(words), generator=draws)
        logits[wanted] += 30
        token = int(walk.restrict(logits).argmax())
        walk.take(token)
        text, written = text + ("" if token == 2 else stream.put(token)), written + 1
    calls = box.stream()
    said = calls.put(text + stream.end())
    return said.content + calls.end().content, [
        (call["function"]["name"], call["function"]["arguments"]) for call in said.calls
    ]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("several", [True, False])
@pytest.mark.parametrize("only", [None, "now", "weather"])
def test_a_call_that_is_asked_for_comes(words: Any, style: Style, several: bool, only: str | None) -> None:
    for seed in range(3):
        content, calls = write(words, Toolbox(style, FUNCTIONS, several, True, only), None, seed)
        assert content == "" and calls
        assert several or len(calls) == 1
        # the last may be cut short
        for name, arguments in calls[:-1] or calls[: not several]:
            assert only in (None, name)
            found = json.loads(arguments)
            assert found in ({"city": "Rome"}, {"city": "Oslo"}) if name == "weather" else found == {}


@pytest.mark.parametrize("style", STYLES)
def test_an_answer_is_json_or_a_call(words: Any, style: Style) -> None:
    seen = set()
    for seed in range(12):
        form = Form("schema", {"enum": ["yes", "no"]}, "response_format")
        content, calls = write(words, Toolbox(style, FUNCTIONS, False), form, seed)
        assert calls or json.loads(content) in ("yes", "no")
        seen.add(bool(calls))
    assert seen == {True, False}


@pytest.mark.parametrize("style", STYLES)
def test_amid_text_only_calls_are_bound(words: Any, style: Style) -> None:
    box = Toolbox(style, FUNCTIONS, True)
    opener = {"hermes": "<tool_call>", "llama3": "", "mistral": "[TOOL_CALLS]", "mistral_named": "[TOOL_CALLS]"}[style]
    texts, called = 0, list[Any]()
    for seed in range(10):
        content, calls = write(words, box, None, seed)
        texts += bool(content)
        called += calls
    assert texts
    if opener in words.get_vocab():
        content, called = write(words, box, None, 0, (opener,))
        assert called
    for name, arguments in called[:-1]:
        assert name in ("weather", "now") and json.loads(arguments) in ({"city": "Rome"}, {"city": "Oslo"}, {})


def test_without_a_need_nothing_is_bound(tiny_tokenizer: Any) -> None:
    loose = tuple(Function(name=function.name, parameters=function.parameters) for function in FUNCTIONS)
    assert Toolbox("hermes", loose, True).form(tiny_tokenizer, None) is None
    with pytest.raises(ValueError, match="guided_regex: only JSON goes with tools"):
        Toolbox("hermes", loose, True).form(tiny_tokenizer, Form("regex", "a", "guided_regex"))
