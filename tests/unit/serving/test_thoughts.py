"""Thoughts told from answers, however their text is cut, and grammars of answers behind them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from llmcompress.serving.answers import ChatShape
from llmcompress.serving.text import TextStream
from llmcompress.serving.thoughts import KNOWN, THINK, State, Thinking, ThoughtStream, thinking_of
from llmcompress.serving.tools import Function, Toolbox

MISTRAL = KNOWN[1]


def spoken(text: str, state: State, size: int) -> tuple[str, str]:
    stream = ThoughtStream(THINK, state)
    parts = [stream.put(text[at : at + size]) for at in range(0, len(text), size)] + [stream.end()]
    return "".join(part[0] for part in parts), "".join(part[1] for part in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8, 13, 1000])
@pytest.mark.parametrize(
    ("state", "text", "thoughts", "answer"),
    [
        ("may begin", "<think>\nHm.\n\nSo 4.\n</think>\n\nIt is 4.\n", "Hm.\n\nSo 4.", "It is 4.\n"),
        ("may begin", " \n<think></think>4", "", "4"),
        ("may begin", "It is <think>4</think>", "", "It is <think>4</think>"),
        ("may begin", " <thin", "", " <thin"),
        ("may begin", "  plain ", "", "  plain "),
        ("begun", "\nHm <b> </thin </think>\n4 </think>", "Hm <b> </thin", "4 </think>"),
        ("begun", "<think>\nHm</think>4", "Hm", "4"),
        ("begun", "</think>4", "", "4"),
        ("begun", "cut short \n</th", "cut short \n</th", ""),
        ("begun", "cut short\n\n", "cut short", ""),
        ("begun", "<", "<", ""),
        ("begun", "", "", ""),
        ("over", "<think>4</think> ", "", "<think>4</think> "),
    ],
)
def test_thoughts_and_answer(state: State, text: str, thoughts: str, answer: str, size: int) -> None:
    assert spoken(text, state, size) == (thoughts, answer)


def test_what_is_certain_is_told_at_once() -> None:
    stream = ThoughtStream(THINK, "begun")
    told = [stream.put(text) for text in ("\n", "Hm", " a", "</", "x", "</think>", "\n\n", "4", "!")]
    assert told == [
        ("", ""), ("Hm", ""), (" a", ""), ("", ""), ("</x", ""), ("", ""), ("", ""), ("", "4"), ("", "!"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("template", "prompt", "parser", "wanted"),
    [
        ("{{ content.split('</think>')[-1] }}", "assistant\n", "auto", Thinking(THINK, "may begin")),
        ("{{ content.split('</think>')[-1] }}", "assistant\n<think>\n", "auto", Thinking(THINK, "begun")),
        ("{{ content.split('</think>')[-1] }}", "<think>\n\n</think>\n\n", "auto", Thinking(THINK, "over")),
        ("{{ content }}", "assistant: <think>", "auto", None),
        ("[THINK]{{ thoughts }}[/THINK]", "[/INST]", "auto", Thinking(MISTRAL, "may begin")),
        ("{{ content }}", "assistant:", "deepseek_r1", Thinking(THINK, "begun")),
        ("{{ content }}", "</think>", "deepseek_r1", Thinking(THINK, "over")),
        ("{{ content }}", "assistant:", "qwen3", Thinking(THINK, "may begin")),
        ("</think>", "<think>", "none", None),
    ],
)
def test_how_a_model_thinks_is_read_off_its_template_and_the_prompt(
    template: str, prompt: str, parser: str, wanted: Thinking | None
) -> None:
    assert thinking_of(template, prompt, parser) == wanted


@pytest.mark.parametrize(
    ("message", "state"), [("<think>Hm", "begun"), ("<think>Hm</think>It", "over"), ("It", "over")],
)  # fmt: skip
def test_a_message_that_goes_on_is_in_thoughts_or_beyond_them(message: str, state: State) -> None:
    assert thinking_of("</think>", f"user: What is <think>?\nassistant: {message}", begun_with=message) == Thinking(
        THINK, state
    )


def test_a_call_behind_thoughts_and_none_in_them() -> None:
    box = Toolbox("hermes", (Function(name="now"),), True)
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    text = f"<think>I might {call}\n</think>\n\nWell.\n{call}"
    whole = ChatShape(1, box, Thinking(THINK, "may begin"))
    message = whole.choice(0, text)["message"]
    assert (message["reasoning_content"], message["content"]) == (f"I might {call}", "Well.")
    assert [one["function"]["name"] for one in message["tool_calls"]] == ["now"]
    assert whole.ended(0, "stop") == "tool_calls"
    parts = ChatShape(1, box, Thinking(THINK, "may begin"))
    told: dict[str, Any] = {"reasoning_content": "", "content": "", "tool_calls": []}
    for at in range(0, len(text), 4):
        found: Any = parts.delta(0, text[at : at + 4], "stop" if at + 4 >= len(text) else None)
        for name, value in (found or {"delta": {}})["delta"].items():
            told[name] += value
    assert (told["reasoning_content"], told["content"]) == (f"I might {call}", "Well.")
    assert "".join(one["function"]["arguments"] for one in told["tool_calls"]) == "{}"


def test_thoughts_may_be_left_out_and_an_answer_without_text_is_empty() -> None:
    silent = ChatShape(2, None, Thinking(THINK, "begun", told=False))
    assert silent.choice(0, "Hm</think>4")["message"] == {"role": "assistant", "content": "4", "refusal": None}
    assert silent.delta(1, "Hm", None) is None and silent.delta(1, "", "length") == {"delta": {}}


@pytest.fixture(scope="module", params=["special", "added", "plain"])
def words(tiny_tokenizer: Any, request: pytest.FixtureRequest) -> Any:
    """With the marks as tokens of both kinds, and as letters."""
    from tokenizers import AddedToken

    found = copy.deepcopy(tiny_tokenizer)
    if request.param != "plain":
        found.add_tokens([AddedToken(name, special=request.param == "special") for name in ("<think>", "</think>")])
    return found


@pytest.mark.parametrize("state", ["may begin", "begun", "over"])
@pytest.mark.parametrize("kind", ["schema", "regex", "choice"])
def test_only_what_is_behind_thoughts_keeps_to_a_grammar(words: Any, state: State, kind: str) -> None:
    pytest.importorskip("llguidance")
    from llmcompress.inference.grammar import Grammars, of_choice, of_regex, of_schema

    answer = {"schema": of_schema({"const": 7}), "regex": of_regex("7"), "choice": of_choice(["7"])}[kind]
    thinking = Thinking(THINK, state)
    walk = Grammars().walk(words, len(words), (2,), thinking.before(answer, words))
    thoughts = "" if state == "over" else "not 5</th"
    written = {"may begin": f"<think>{thoughts}</think>\n7", "begun": f"{thoughts}</think>\n7", "over": "7"}[state]
    free, wrong = torch.zeros(len(words)), words("5", add_special_tokens=False)["input_ids"][0]
    # where no thoughts have begun nothing but the answer or they may come, and no blanks, which would be the answer's
    blank = words("\n", add_special_tokens=False)["input_ids"][-1]
    assert [walk.restrict(free)[one] == 0 for one in (wrong, blank)] == [state == "begun"] * 2
    stream, text = TextStream(words, (), thinking.kept(words)), ""
    for token in words(written, add_special_tokens=False)["input_ids"]:
        assert walk.restrict(free)[token] == 0
        walk.take(token)
        text += stream.put(token)
    assert walk.ended or walk.restrict(free).isfinite().nonzero().tolist() == [[2]]
    told = thinking.stream()
    assert told.put(text + stream.end()) == (thoughts, "7")


def test_marks_are_kept_where_they_would_be_dropped(words: Any) -> None:
    text = "<think>Hm</think>7"
    stream = TextStream(words, (), Thinking(THINK, "may begin").kept(words))
    assert "".join(map(stream.put, words(text, add_special_tokens=False)["input_ids"])) + stream.end() == text
