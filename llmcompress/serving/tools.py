"""Tools of a chat: how a model is told of them and writes its calls, and grammars that make it write one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import StringConstraints

from llmcompress.inference.grammar import inline_schema
from llmcompress.serving.given import Given
from llmcompress.serving.structured import OBJECT, Form
from llmcompress.serving.text import added, loads, specials, word
from llmcompress.serving.tool_calls import CLOSER, OPENERS, CallStream, Style
from llmcompress.serving.xml_calls import CLOSERS, FORMS, FRAMES, SEPARATOR, XmlCallStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MAX_TOOLS = 128
# tokens of GLM's and DeepSeek's beside those that announce and end a call
OTHER_WORDS = ("<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", SEPARATOR, *FRAMES)
Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_.:/-]{1,128}$")]


class Function(Given):
    """What a tool is called and takes."""

    name: Name
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Given):
    """A tool."""

    type: Literal["function"]
    function: Function

    def plain(self) -> dict[str, Any]:
        """For a chat template."""
        return {"type": "function", "function": self.function.model_dump(exclude_none=True, exclude={"strict"})}


class FunctionName(Given):
    """One of them."""

    name: str


class NamedChoice(Given):
    """A tool that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedChoice


class Called(Given):
    """The function of a call that a client passes back."""

    name: str
    arguments: str


class ToolCall(Given):
    """A call that a client passes back; streamed ones have an index."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: Called

    def plain(self) -> dict[str, Any]:
        """For a chat template, which writes the arguments as JSON itself.

        Raises:
            ValueError: They are none.
        """
        try:
            arguments = loads(self.function.arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"arguments of {self.function.name} are not valid JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"arguments of {self.function.name} are not a JSON object")
        return {"id": self.id, "type": "function", "function": {"name": self.function.name, "arguments": arguments}}


def style_of(template: str) -> Style | None:
    """How a model writes calls, by what its chat template writes of earlier ones; None for ways not known here."""
    if "<tool_call>" in template:
        # Qwen3-Coder and GLM-4.5 write XML between the same words
        return "qwen_xml" if "<function=" in template else "glm_xml" if "<arg_key>" in template else "hermes"
    if OPENERS["deepseek_v3"] in template:
        return "deepseek_v3" if "```json" in template else "deepseek_v31"
    if "[TOOL_CALLS]" in template:
        return "mistral_named" if "[ARGS]" in template else "mistral"
    if '"parameters"' in template and ("<|python_tag|>" in template or "ipython" in template):
        return "llama3"
    return None


@dataclass(frozen=True, slots=True)
class Toolbox:
    """The tools of one request.

    Attributes:
        style: How the model writes calls.
        functions: Which there are.
        several: Whether one answer may call more than once.
        forced: Whether there must be a call.
        only: Name of the one that must be called, None for any.
    """

    style: Style
    functions: tuple[Function, ...]
    several: bool
    forced: bool = False
    only: str | None = None

    def stream(self) -> CallStream | XmlCallStream:
        """Tells calls from text in one answer."""
        if self.style in FORMS:
            return XmlCallStream(self.style, {one.name: one.parameters or {} for one in self.functions}, self.several)
        return CallStream(self.style, [function.name for function in self.functions], self.several)

    def kept(self, words: PreTrainedTokenizerBase) -> frozenset[int]:
        """Special tokens that say something about calls."""
        wanted = {OPENERS[self.style], CLOSERS.get(self.style, CLOSER), "[ARGS]", "[CALL_ID]", *OTHER_WORDS}
        ids = added(words)
        return specials(words).intersection(ids[text] for text in wanted if text in ids)

    def form(self, words: PreTrainedTokenizerBase, answer: Form | None) -> Form | None:
        """What the answer must be, None for anything.

        Args:
            words: Tokenizer of the model.
            answer: What it must be where it is no call.

        Raises:
            ValueError: The two do not go together.
        """
        if answer is not None and answer.kind != "schema":
            raise ValueError(f"{answer.field}: only JSON goes with tools")
        if not self.forced and answer is None and not any(function.strict for function in self.functions):
            return None
        if self.style in FORMS:
            text = "this model does not write calls as JSON, which alone is enforced: neither strict nor required"
            raise ValueError(text)
        lines = [f"call: {' | '.join(self._calls(words))}", f"calls: {self._listed(words)}"]
        if self.forced:
            lines.append("start: calls")
        elif answer is not None:
            lines += ["start: answer | calls", f"answer: {inline_schema(answer.value, answer.space)}"]
        else:
            lines += self._amid_text(words)
        return Form("lark", "\n".join(lines), "tools")

    def _calls(self, words: PreTrainedTokenizerBase) -> list[str]:
        """Grammars of single calls, without the word that announces them."""
        found = []
        for function in self.functions:
            if self.only not in (None, function.name):
                continue
            # an answer that may be text is left alone, but for tools that ask for more
            exact = self.forced or bool(function.strict)
            schema = inline_schema(function.parameters if exact and function.parameters is not None else OBJECT)
            name = json.dumps(function.name)
            if self.style == "mistral_named":
                found.append(f"{name} {word(words, '[ARGS]')} {schema}")
                continue
            key = "parameters" if self.style == "llama3" else "arguments"
            head = f'{{"name": {name}, "{key}": '
            if self.style == "hermes":
                found.append(f"{json.dumps(chr(10) + head)} {schema} {json.dumps('}' + chr(10))} {word(words, CLOSER)}")
            else:
                found.append(f'{json.dumps(head)} {schema} "}}"')
        return found

    def _listed(self, words: PreTrainedTokenizerBase) -> str:
        opener = word(words, OPENERS[self.style])
        if self.style == "llama3":
            return "call"
        if self.style == "mistral":
            return f'{opener} "[" call ("," " "? call)* "]"' if self.several else f'{opener} "[" call "]"'
        between = '"\\n" ' if self.style == "hermes" else ""
        return f"{opener} call ({between}{opener} call)*" if self.several else f"{opener} call"

    def _amid_text(self, words: PreTrainedTokenizerBase) -> list[str]:
        """Text that may hold calls."""
        opener = OPENERS[self.style]
        if self.style == "llama3":
            return ["start: call | OTHER", r"OTHER: /([^{ \t\r\n](.|\n)*)?/"]
        inner = '"[" call ("," " "? call)* "]"' if self.style == "mistral" else "call"
        lines = ["start: marked* TEXT", r"TEXT: /(.|\n)*/"]
        if opener in added(words):
            return [*lines, f"marked: TEXT {word(words, opener)} {inner}"]
        return [*lines, f"marked: announced {inner}", f"announced[lazy]: TEXT {json.dumps(opener)}"]
