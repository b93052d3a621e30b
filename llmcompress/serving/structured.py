"""Formats that an answer may be asked to have: OpenAI's ``response_format``, vLLM's ``structured_outputs`` and the
``guided_…`` fields that it had before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from llmcompress.inference.grammar import of_choice, of_grammar, of_lark, of_regex, of_schema
from llmcompress.serving.given import Given
from llmcompress.serving.text import loads

if TYPE_CHECKING:
    from llmcompress.serving.protocol import Ask

Choices = Annotated[list[Annotated[str, StringConstraints(min_length=1)]], Field(min_length=1)]
# what `json_object` means
OBJECT: Mapping[str, Any] = {"type": "object"}


class TextFormat(Given):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(Given):
    """Any JSON object; ``schema`` is llama.cpp's name for what it must be like."""

    type: Literal["json_object"]
    described: dict[str, Any] | None = Field(default=None, alias="schema")


class NamedSchema(Given):
    """A schema as OpenAI wants it; answers follow it whether ``strict`` or not."""

    name: str
    description: str | None = None
    described: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class SchemaFormat(Given):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


AnyFormat = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StructuredOutputs(Given):
    """vLLM's field: one of these, and how JSON is spaced."""

    described: dict[str, Any] | str | None = Field(default=None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool = False
    whitespace_pattern: str | None = None

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        given = (self.described, self.regex, self.choice, self.grammar, self.json_object or None)
        if sum(value is not None for value in given) != 1:
            raise ValueError("give one of json, json_object, regex, choice and grammar")
        return self


@dataclass(frozen=True, slots=True)
class Form:
    """What an answer must be.

    Attributes:
        kind: Kind of ``value``.
        value: A schema, a pattern, texts, a grammar in any notation, or one in Lark's.
        field: Field of the request, for errors.
        space: White space of JSON; see :func:`~llmcompress.inference.grammar.of_schema`.
    """

    kind: Literal["schema", "regex", "choice", "grammar", "lark"]
    value: Any
    field: str
    space: str | None = None

    def grammar(self) -> str:
        """For :class:`~llmcompress.inference.grammar.Grammars`.

        Raises:
            GrammarError: It is none.
            EnvironmentProblem: The library is missing.
        """
        if self.kind == "schema":
            return of_schema(self.value, self.space)
        makers: Mapping[str, Callable[[Any], str]] = {
            "regex": of_regex, "choice": of_choice, "grammar": of_grammar, "lark": of_lark,
        }  # fmt: skip
        return makers[self.kind](self.value)


def form_of(ask: Ask) -> Form | None:
    """The format that a request asks for, None for any.

    Raises:
        ValueError: It asks for several, or a schema is no JSON.
    """
    space = ask.guided_whitespace_pattern
    found: list[Form] = []
    asked = ask.response_format
    if isinstance(asked, ObjectFormat):
        found.append(Form("schema", OBJECT if asked.described is None else asked.described, "response_format", space))
    elif isinstance(asked, SchemaFormat):
        found.append(Form("schema", asked.json_schema.described, "response_format", space))
    if ask.structured_outputs is not None:
        found.append(_of_vllm(ask.structured_outputs))
    if ask.guided_json is not None:
        found.append(Form("schema", _schema(ask.guided_json, "guided_json"), "guided_json", space))
    kinds: tuple[Literal["regex", "choice", "grammar"], ...] = ("regex", "choice", "grammar")
    for kind in kinds:
        value = getattr(ask, f"guided_{kind}")
        if value is not None:
            found.append(Form(kind, value, f"guided_{kind}"))
    if len(found) > 1:
        raise ValueError(f"{' and '.join(form.field for form in found)}: one format at a time")
    return found[0] if found else None


def _of_vllm(asked: StructuredOutputs) -> Form:
    space = "" if asked.disable_any_whitespace else asked.whitespace_pattern
    field = "structured_outputs"
    if asked.described is not None:
        return Form("schema", _schema(asked.described, field), field, space)
    if asked.regex is not None:
        return Form("regex", asked.regex, field)
    if asked.choice is not None:
        return Form("choice", asked.choice, field)
    if asked.grammar is not None:
        return Form("grammar", asked.grammar, field)
    return Form("schema", OBJECT, field, space)


def _schema(given: dict[str, Any] | str, field: str) -> Any:
    """A schema that may come as text."""
    if not isinstance(given, str):
        return given
    try:
        found = loads(given)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{field}: the schema is not valid JSON: {error}") from error
    if not isinstance(found, dict | bool):
        raise ValueError(f"{field}: a schema is a JSON object")
    return found
