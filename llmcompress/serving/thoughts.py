"""Thoughts before an answer: which words stand around them, whether a prompt has begun or ended them, and their text
told from the answer's as it comes, as vLLM's reasoning parsers do. Torch-free: the command line reads the names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from llmcompress.serving.text import BLANKS, added, overlap, specials, word

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Marks:
    """The words that begin and end thoughts."""

    begin: str
    end: str


THINK = Marks("<think>", "</think>")
KNOWN = (THINK, Marks("[THINK]", "[/THINK]"), Marks("<seed:think>", "</seed:think>"))
# vLLM's names, and whether an answer counts as begun in thoughts whatever the prompt says
PARSERS: Mapping[str, tuple[Marks, bool]] = {
    "deepseek_r1": (THINK, True), "qwen3": (THINK, False), "mistral": (KNOWN[1], False), "seed_oss": (KNOWN[2], False),
}  # fmt: skip
# thoughts may begin an answer, have begun in its prompt, or are over there
State = Literal["may begin", "begun", "over"]


@dataclass(frozen=True, slots=True)
class Thinking:
    """How the answers of one request think.

    Attributes:
        marks: Around thoughts.
        state: At the end of the prompt.
        told: Whether the answer holds the thoughts; they are left out otherwise.
    """

    marks: Marks
    state: State
    told: bool = True

    def stream(self) -> ThoughtStream:
        """Tells thoughts from text in one answer."""
        return ThoughtStream(self.marks, self.state)

    def kept(self, words: PreTrainedTokenizerBase) -> frozenset[int]:
        """The marks where they are special tokens."""
        ids = added(words)
        return specials(words).intersection(ids[mark] for mark in (self.marks.begin, self.marks.end) if mark in ids)

    def before(self, grammar: str, words: PreTrainedTokenizerBase) -> str:
        """A grammar of answers, with the thoughts that come before them.

        Args:
            grammar: Of the answer, as :mod:`llmcompress.inference.grammar` makes them.
            words: Tokenizer of the model.
        """
        from llmcompress.inference.grammar import behind

        if self.state == "over":
            return grammar
        lines = [r"thoughts: TEXT " + word(words, self.marks.end), r"TEXT: /(.|\n)*/"]
        if self.marks.end not in added(words):
            lines = [rf"thoughts[lazy]: /(.|\n)*{re.escape(self.marks.end).replace('/', chr(92) + '/')}/"]
        # without thoughts no blanks either: nobody would take them off the answer
        first = "thoughts BLANKS?" if self.state == "begun" else f"({word(words, self.marks.begin)} thoughts BLANKS?)?"
        return behind("\n".join([f"start: {first} @answer", *lines, r"BLANKS: /[ \t\r\n]{1,8}/"]), grammar)


def thinking_of(
    template: str, prompt: str, parser: str = "auto", told: bool = True, begun_with: str | None = None
) -> Thinking | None:
    """How an answer to a prompt thinks; None where thoughts are not told apart.

    Args:
        template: Chat template, which takes thoughts out of earlier answers if the model has any.
        prompt: What it made.
        parser: ``auto`` for what the template says, ``none``, or one of :data:`PARSERS`.
        told: As in :class:`Thinking`.
        begun_with: The last message where the answer goes on where that ends, None for an answer of its own.
    """
    if parser == "none":
        return None
    marks, begun = PARSERS.get(parser, (None, False))
    marks = marks or next((one for one in KNOWN if one.end in template), None)
    if marks is None:
        return None
    tail = prompt.rstrip()
    if begun_with is not None:
        begun = marks.begin in begun_with.rpartition(marks.end)[2]
        return Thinking(marks, "begun" if begun else "over", told)
    if tail.endswith(marks.end):
        return Thinking(marks, "over", told)
    return Thinking(marks, "begun" if begun or tail.endswith(marks.begin) else "may begin", told)


class ThoughtStream:
    """Tells thoughts from text in one answer.

    Args:
        marks: Around thoughts.
        state: At the end of the prompt.

    Thoughts come first or not at all: what looks like them later is text. Blanks around them belong to nobody.
    """

    def __init__(self, marks: Marks, state: State) -> None:
        self._marks = marks
        self._state: Literal["may begin", "begun", "thinking", "between", "over"] = state
        self._pending = ""

    def put(self, text: str) -> tuple[str, str]:
        """Take some more of the answer in; returns what has become certain of thoughts, and of the text behind them."""
        if self._state == "over":
            return "", text
        self._pending += text
        if self._state in ("may begin", "begun"):
            opened = self._pending.lstrip(BLANKS)
            if self._marks.begin.startswith(opened) and opened != self._marks.begin:
                return "", ""
            # a model may write once more what its prompt has begun with
            opens = opened.startswith(self._marks.begin)
            if not opens and self._state == "may begin":
                return "", self._rest()
            self._state = "thinking"
            self._pending = opened.removeprefix(self._marks.begin).lstrip(BLANKS)
            if not self._pending:
                self._state = "begun"
                return "", ""
        thoughts = self._think() if self._state == "thinking" else ""
        if self._state == "between":
            self._pending = self._pending.lstrip(BLANKS)
            if self._pending:
                return thoughts, self._rest()
        return thoughts, ""

    def end(self) -> tuple[str, str]:
        """No more comes: what was held back."""
        thinking = self._state in ("begun", "thinking")
        rest = self._rest()
        return (rest.rstrip(BLANKS), "") if thinking else ("", rest)

    def _think(self) -> str:
        before, found, rest = self._pending.partition(self._marks.end)
        if found:
            self._pending, self._state = rest, "between"
            return before.rstrip(BLANKS)
        certain = self._pending[: len(self._pending) - overlap(self._pending, self._marks.end)].rstrip(BLANKS)
        self._pending = self._pending[len(certain) :]
        return certain

    def _rest(self) -> str:
        rest, self._pending, self._state = self._pending, "", "over"
        return rest
