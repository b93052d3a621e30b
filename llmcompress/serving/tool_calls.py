"""Calls of tools in what a model writes, as it comes: text, names, and arguments piece by piece."""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Literal

from llmcompress.serving.text import BLANKS, loads, overlap

Style = Literal["hermes", "llama3", "mistral", "mistral_named", "qwen_xml", "glm_xml", "deepseek_v3", "deepseek_v31"]
OPENERS: dict[Style, str] = {
    "hermes": "<tool_call>", "llama3": "<|python_tag|>", "mistral": "[TOOL_CALLS]", "mistral_named": "[TOOL_CALLS]",
    "qwen_xml": "<tool_call>", "glm_xml": "<tool_call>", "deepseek_v3": "<｜tool▁call▁begin｜>",
    "deepseek_v31": "<｜tool▁call▁begin｜>",
}  # fmt: skip
CLOSER = "</tool_call>"
_LETTERS = string.ascii_letters + string.digits


def call_id(size: int) -> str:
    """A name for a call: this many letters, after OpenAI's word where there is room."""
    own = "".join(secrets.choice(_LETTERS) for _ in range(size))
    return own if size < 10 else f"call_{own}"


class _Broken(Exception):
    """What comes is no JSON object."""


class _Value:
    """One JSON value, letter by letter; what is between its brackets is taken as it is."""

    def __init__(self) -> None:
        self.done = False
        self.raw = ""
        self._depth, self._quoted, self._escaped = 0, False, False

    def feed(self, letter: str) -> bool:
        """Take one more; returns whether it belongs to the value."""
        if not self.raw:
            return self._begin(letter)
        if self._quoted:
            closes = letter == '"' and not self._escaped
            self._escaped = letter == "\\" and not self._escaped
            self._quoted = not closes
            self.done = closes and self._depth == 0
        elif self._depth == 0 and letter in ",}]" + BLANKS:
            # a number or a word, which has no end of its own
            self.done = True
            return False
        elif letter == '"':
            self._quoted = True
        elif letter in "{[":
            self._depth += 1
        elif letter in "}]":
            self._depth -= 1
            self.done = self._depth == 0
        self.raw += letter
        return True

    def _begin(self, letter: str) -> bool:
        if letter in BLANKS:
            return True
        if letter in "{[":
            self._depth = 1
        elif letter == '"':
            self._quoted = True
        elif letter not in "-0123456789tfn":
            raise _Broken
        self.raw = letter
        return True


class _Call:
    """A JSON object with a name and arguments, letter by letter.

    Attributes:
        name: None until it is complete.
        begun: Whether its arguments have.
        fresh: Text of arguments that nobody has taken yet.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.begun = self.done = False
        self.fresh = ""
        self._expects: Literal["{", "key", ":", "value", ","] = "{"
        self._key = ""
        self._value = _Value()

    def feed(self, letter: str) -> None:
        """Take one more."""
        if self._expects == "value":
            if self._take(letter):
                return
        elif self._expects == "key" and (self._value.raw or letter == '"'):
            self._value.feed(letter)
            if self._value.done:
                self._key, self._expects = str(_loaded(self._value.raw)), ":"
            return
        if letter in BLANKS:
            return
        if letter == "}" and self._expects in ("key", ","):
            self.done = True
            return
        following: dict[str, Any] = {"{": "key", ":": "value", ",": "key"}
        if letter != self._expects:
            raise _Broken
        self._expects, self._value = following[letter], _Value()

    def _take(self, letter: str) -> bool:
        """One more of a value; returns whether it belongs to it."""
        value, before = self._value, len(self._value.raw)
        belongs = value.feed(letter)
        arguments = self._key in ("arguments", "parameters")
        # some models write their arguments as a string of JSON
        quoted = value.raw.startswith('"')
        if arguments and value.raw:
            self.begun = True
            self.fresh += "" if quoted else value.raw[before:]
        if value.done:
            self._expects = ","
            if arguments and quoted:
                self.fresh += str(_loaded(value.raw))
            elif self._key == "name" and quoted:
                self.name = str(_loaded(value.raw))
        return belongs


def _loaded(raw: str) -> Any:
    try:
        return loads(raw, strict=False)
    except ValueError as error:
        raise _Broken from error


@dataclass(slots=True)
class Said:
    """What has become certain.

    Attributes:
        content: Text beside calls.
        calls: OpenAI's deltas of calls, at most one of each.
    """

    content: str
    calls: list[dict[str, Any]]


class CallStream:
    """Tells calls from text in one answer.

    Args:
        style: How the model writes them, in JSON.
        names: Of the tools that there are.
        several: Whether there may be more than one call; further ones are left out.

    What turns out to be no call is text, as it was written. A call that the answer's end cuts short stays so.
    """

    def __init__(self, style: Style, names: Collection[str], several: bool = True) -> None:
        self._style, self._names, self._several = style, names, several
        self._opener = OPENERS[style]
        self._mode: Literal["text", "begin", "plain", "open", "name", "call", "arguments", "after"]
        self._mode = "begin" if style == "llama3" else "text"
        self._pending = self._raw = self._blank = ""
        self._listed = self._told = False
        # nothing but blanks since a call
        self._behind = False
        self._call, self._value = _Call(), _Value()
        self._said = Said("", [])
        self.count = 0

    def put(self, text: str) -> Said:
        """Take some more of the answer in."""
        self._pending += text
        self._said = Said("", [])
        while self._pending and getattr(self, f"_on_{self._mode}")():
            pass
        return self._said

    def end(self) -> Said:
        """No more comes."""
        self._said = Said("", [])
        # one that follows others is a call that was cut short before it said anything
        unfinished = self._mode in ("open", "name", "call") and not self._told
        rest = "" if self._mode == "after" or (unfinished and self.count) else self._pending
        rest = self._raw + rest if unfinished and not self.count else rest
        self._pending = ""
        self._said.content = self._blank + rest if self.count == 0 or rest.strip() else ""
        return self._said

    def _say(self, text: str) -> None:
        """Text; blanks wait for what follows, as those around calls belong to them."""
        text = (self._blank + text).lstrip(BLANKS if self._behind else "")
        self._behind = self._behind and not text
        kept = text.rstrip(BLANKS)
        self._said.content += kept
        self._blank = text[len(kept) :]

    def _on_text(self) -> bool:
        at = self._pending.find(self._opener)
        if at < 0:
            kept = overlap(self._pending, self._opener)
            self._say(self._pending[: len(self._pending) - kept])
            self._pending = self._pending[len(self._pending) - kept :]
            return False
        self._say(self._pending[:at])
        self._pending = self._pending[at + len(self._opener) :]
        self._raw, self._mode = self._opener, "open"
        return True

    def _on_begin(self) -> bool:
        """Where a call is the whole answer and begins as any JSON does."""
        text = self._pending.lstrip(BLANKS)
        if not text or self._opener.startswith(text):
            return False
        if text.startswith(self._opener):
            self._pending = text[len(self._opener) :]
            return True
        if text[0] != "{":
            self._mode = "plain"
            return True
        self._raw, self._mode = self._pending[: len(self._pending) - len(text)], "call"
        self._pending = text
        self._start()
        return True

    def _on_plain(self) -> bool:
        self._say(self._pending)
        self._pending = ""
        return False

    def _on_open(self) -> bool:
        """After the word that announces a call."""
        self._skip()
        if not self._pending:
            return False
        self._listed = self._style != "hermes" and self._pending[0] == "["
        if self._listed:
            self._raw, self._pending = self._raw + "[", self._pending[1:]
        by_name = self._style != "hermes" and not self._listed and self._pending[:1] != "{"
        self._mode = "name" if by_name else "call"
        self._start()
        return True

    def _start(self) -> None:
        self._call, self._value, self._told = _Call(), _Value(), False

    def _skip(self) -> None:
        text = self._pending.lstrip(BLANKS)
        self._raw += self._pending[: len(self._pending) - len(text)]
        self._pending = text

    def _on_name(self) -> bool:
        """A name before its arguments, possibly with an id between them in brackets."""
        at = self._pending.find("{")
        if at < 0:
            return False
        name = self._pending[:at].split("[")[0].strip()
        self._raw, self._pending = self._raw + self._pending[:at], self._pending[at:]
        if not name:
            return self._no_call()
        self._tell(name)
        self._mode = "arguments"
        return True

    def _on_arguments(self) -> bool:
        for at, letter in enumerate(self._pending):
            self._value.feed(letter)
            if self._value.done:
                self._argue(self._pending[: at + 1])
                self._pending, self._mode = self._pending[at + 1 :], "after"
                return True
        self._argue(self._pending)
        self._pending = ""
        return False

    def _on_call(self) -> bool:
        call, broken, taken = self._call, False, 0
        # up to the letter that decides something: told is the same however the text is cut
        while taken < len(self._pending) and not (broken or call.done or self._decided()):
            try:
                call.feed(self._pending[taken])
            except _Broken:
                broken = True
            taken += 1
        self._raw, self._pending = self._raw + self._pending[:taken], self._pending[taken:]
        # JSON that is an answer may have a name too
        if call.name is not None and self._style == "llama3" and call.name not in self._names:
            return self._no_call()
        if call.name is not None and not self._told and not broken and (call.begun or call.done):
            self._tell(call.name)
        if self._told:
            self._argue(call.fresh or ("{}" if call.done and not call.begun else ""))
            call.fresh = ""
        if broken or (call.done and not self._told):
            return self._no_call()
        if call.done:
            self._mode = "after"
        return True

    def _decided(self) -> bool:
        """Whether it has become certain that a call is one, or is none."""
        known = self._call.name is not None and not self._told
        return known and (self._call.begun or (self._style == "llama3" and self._call.name not in self._names))

    def _no_call(self) -> bool:
        """It was text after all; what has been told of a call stays told."""
        if not self._told:
            self._say(self._raw)
        self._mode = "plain" if self._style == "llama3" else "text"
        return True

    def _on_after(self) -> bool:
        """Behind a call: another one, or text."""
        self._raw = ""
        self._skip()
        if not self._pending or (
            self._style == "hermes" and CLOSER.startswith(self._pending) and self._pending != CLOSER
        ):
            return False
        separators = {"hermes": (CLOSER,), "llama3": (";", ","), "mistral": (",", "]"), "mistral_named": (",", "]")}
        found = next((word for word in separators[self._style] if self._pending.startswith(word)), "")
        self._pending = self._pending[len(found) :]
        another = found in (";", ",") and (self._listed or self._style == "llama3")
        self._mode = "call" if another else "plain" if self._style == "llama3" else "text"
        self._raw = found
        self._start()
        return True

    def _tell(self, name: str) -> None:
        self._told, self._behind, self.count, self._blank = True, True, self.count + 1, ""
        # templates of Mistral take ids of nine letters only
        self._append(
            {
                "id": call_id(9 if self._style.startswith("mistral") else 24),
                "type": "function",
                "function": {"name": name, "arguments": ""},
            }
        )

    def _argue(self, text: str) -> None:
        if text:
            self._append({"function": {"arguments": text}})

    def _append(self, delta: dict[str, Any]) -> None:
        index, calls = self.count - 1, self._said.calls
        if index > 0 and not self._several:
            return
        if calls and calls[-1]["index"] == index:
            calls[-1]["function"]["arguments"] += delta["function"]["arguments"]
        else:
            calls.append({"index": index, **delta})
