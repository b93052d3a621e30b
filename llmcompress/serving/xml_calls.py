"""Calls of tools that are no JSON as a whole: Qwen3-Coder's and GLM-4.5's, which are XML between the words of Hermes,
and DeepSeek's, a name and JSON between words of its own.

In XML a value has no type: what the tool's schema calls a string is text, all else is read as JSON, and where it may be
both, what it takes decides. So a call is told when it is complete, where calls in JSON are told as they come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from llmcompress.serving.text import BLANKS, loads, overlap
from llmcompress.serving.tool_calls import CLOSER, OPENERS, Said, Style, call_id

CLOSERS: dict[Style, str] = {"deepseek_v3": "<｜tool▁call▁end｜>", "deepseek_v31": "<｜tool▁call▁end｜>"}
SEPARATOR = "<｜tool▁sep｜>"
# around all calls of DeepSeek; they say nothing
FRAMES = ("<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>")
# a call's name and the rest, and a parameter's name and value in that, None where it is JSON
FORMS: dict[Style, tuple[re.Pattern[str], re.Pattern[str] | None]] = {
    "qwen_xml": (
        re.compile(r"\s*<function=([^>\n]+)>(.*?)</function>\s*", re.DOTALL),
        re.compile(r"\s*<parameter=([^>\n]+)>(.*?)</parameter>", re.DOTALL),
    ),
    "glm_xml": (
        re.compile(r"\s*([^<\s]+)\s*(.*)", re.DOTALL),
        re.compile(r"\s*<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL),
    ),
    "deepseek_v3": (
        re.compile(rf"\s*function{SEPARATOR}([^\n]+?)\s*\n```(?:json)?\n(.*)\n```\s*", re.DOTALL), None,
    ),
    "deepseek_v31": (re.compile(rf"\s*([^\n]+?)\s*{SEPARATOR}(.*)", re.DOTALL), None),
}  # fmt: skip
# as Python and JSON write them: Qwen's template shows the former
_WORDS: dict[str, Any] = {"true": True, "false": False, "none": None, "null": None}
# what a schema may call a value
_KINDS: dict[type, set[str]] = {
    str: {"string"}, bool: {"boolean"}, int: {"integer", "number"}, float: {"number"}, list: {"array"},
    dict: {"object"}, type(None): {"null"},
}  # fmt: skip


def read_call(style: Style, text: str, tools: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of a call, None where the text is none.

    Args:
        style: How it is written, one of :data:`FORMS`.
        text: What is between the words that begin and end a call.
        tools: Schemas of the parameters of all tools.
    """
    whole, part = FORMS[style]
    found = whole.fullmatch(text)
    if found is None or found[1] not in tools:
        return None
    if part is None:
        given = _json(found[2])
        return (found[1], given) if isinstance(given, dict) else None
    arguments, at = dict[str, Any](), 0
    while one := part.match(found[2], at):
        arguments[one[1].strip()] = _value(one[2], _kinds(tools[found[1]], one[1].strip()))
        at = one.end()
    return None if found[2][at:].strip(BLANKS) else (found[1], arguments)


def _kinds(schema: Mapping[str, Any], name: str) -> set[str]:
    """Types that a parameter may have; none where the schema does not say it in a word."""
    properties = schema.get("properties")
    found = properties.get(name) if isinstance(properties, dict) else None
    if not isinstance(found, dict):
        return set()
    # an optional text of pydantic is one of two schemas
    either = found.get("anyOf") or found.get("oneOf")
    kinds = set[str]()
    for one in either if isinstance(either, list) else [found]:
        said = one.get("type") if isinstance(one, dict) else None
        kinds.update([said] if isinstance(said, str) else said if isinstance(said, list) else ())
    return kinds


def _value(text: str, kinds: set[str]) -> Any:
    """What a value's text means."""
    # both templates put it on lines of its own, or may
    text = text.removeprefix("\n").removesuffix("\n")
    if kinds == {"string"}:
        return text
    word = text.strip()
    found = _json(word, _WORDS.get(word.lower(), text))
    # digits are a text where the tool takes texts and no numbers
    return text if "string" in kinds and not kinds & _KINDS[type(found)] else found


def _json(text: str, otherwise: Any = None) -> Any:
    """What JSON says."""
    try:
        found = loads(text)
        # json reads numbers that are none in JSON
        json.dumps(found, allow_nan=False)
    except (ValueError, RecursionError):
        return otherwise
    return found


class XmlCallStream:
    """Tells calls from text in one answer, as :class:`~llmcompress.serving.tool_calls.CallStream` does.

    Args:
        style: How the model writes them.
        tools: Schemas of the parameters of all tools, by name.
        several: Whether there may be more than one call; further ones are left out.
    """

    def __init__(self, style: Style, tools: Mapping[str, Mapping[str, Any]], several: bool = True) -> None:
        self._style, self._tools, self._several = style, tools, several
        self._opener, self._closer = OPENERS[style], CLOSERS.get(style, CLOSER)
        self._frames = FRAMES if style in CLOSERS else ()
        self._pending = self._blank = ""
        self._inside = False
        self.count = 0

    def put(self, text: str) -> Said:
        """Take some more of the answer in."""
        self._pending += text
        said = Said("", [])
        while self._inside or self._opener in self._pending:
            if not self._inside:
                before, _, self._pending = self._pending.partition(self._opener)
                self._say(said, self._unframed(before))
                self._inside = True
            if self._closer not in self._pending:
                return said
            call, _, self._pending = self._pending.partition(self._closer)
            self._inside = False
            self._tell(said, call)
        self._pending = self._unframed(self._pending)
        kept = max(overlap(self._pending, word) for word in (self._opener, *self._frames))
        self._say(said, self._pending[: len(self._pending) - kept])
        self._pending = self._pending[len(self._pending) - kept :]
        return said

    def end(self) -> Said:
        """No more comes; a call that is cut short is text."""
        rest = f"{self._opener if self._inside else ''}{self._pending}"
        self._pending, self._inside = "", False
        said = Said("", [])
        self._say(said, rest)
        # blanks around calls belong to them
        said.content += self._blank if not self.count else ""
        return said

    def _unframed(self, text: str) -> str:
        for word in self._frames:
            text = text.replace(word, "")
        return text

    def _say(self, said: Said, text: str) -> None:
        """Text; blanks wait for what follows."""
        text = self._blank + text
        kept = text.rstrip(BLANKS)
        said.content += kept
        self._blank = text[len(kept) :]

    def _tell(self, said: Said, text: str) -> None:
        found = read_call(self._style, text, self._tools)
        if found is None:
            self._say(said, f"{self._opener}{text}{self._closer}")
            return
        self._blank, self.count = "", self.count + 1
        if self.count > 1 and not self._several:
            return
        name, arguments = found
        function = {"name": name, "arguments": json.dumps(arguments, ensure_ascii=False)}
        said.calls.append({"index": self.count - 1, "id": call_id(24), "type": "function", "function": function})
