"""What a model's chat template makes of a request: the prompt, the tools that it tells of, whether it thinks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llmcompress.inference.grammar import GrammarError
from llmcompress.serving.protocol import ApiError, ChatAsk, Conversed
from llmcompress.serving.tools import NamedChoice, Tool, Toolbox, style_of

if TYPE_CHECKING:
    from llmcompress.serving.served import ServedModel
    from llmcompress.serving.structured import Form


def chat_template(model: ServedModel, tools: Sequence[Tool] | None) -> str:
    """The template of a model for requests with such tools.

    Raises:
        ApiError: 400, there is none.
    """
    words: Any = model.tokenizer
    try:
        return str(words.get_chat_template(tools=[tool.plain() for tool in tools] if tools else None))
    except ValueError as error:
        text = f"{model.name} has no chat template; use /v1/completions"
        raise ApiError(400, text, "no_chat_template", "model") from error


def variables(ask: Conversed, template: str) -> dict[str, Any]:
    """What the template is told beside the messages.

    Raises:
        ApiError: 400, it cannot be told how much to think.
    """
    found: dict[str, Any] = {"add_generation_prompt": ask.add_generation_prompt}
    if ask.continue_final_message:
        found["continue_final_message"] = True
    if isinstance(ask, ChatAsk) and ask.reasoning_effort is not None:
        if "reasoning_effort" in template:
            found["reasoning_effort"] = ask.reasoning_effort
        elif "enable_thinking" in template:
            found["enable_thinking"] = ask.reasoning_effort != "none"
        else:
            text = "reasoning_effort: the chat template of this model knows of none"
            raise ApiError(400, text, param="reasoning_effort")
    if ask.tools and not (isinstance(ask, ChatAsk) and ask.tool_choice == "none"):
        found["tools"] = [tool.plain() for tool in ask.tools]
    return {**found, **(ask.chat_template_kwargs or {})}


def toolbox(model: ServedModel, ask: ChatAsk, template: str) -> Toolbox | None:
    """The tools of a request, None for none.

    Raises:
        ApiError: 400, the model knows of no tools, or calls them in a way that is not read here.
    """
    if not ask.tools or ask.tool_choice == "none":
        return None
    functions = tuple(tool.function for tool in ask.tools)
    if "tools" not in template:
        raise ApiError(400, f"tools: the chat template of {model.name} has none", "no_tools", "tools")
    style = style_of(template)
    if style is None:
        text = f"tools: {model.name} writes calls in a way that is not read here"
        raise ApiError(400, text, "no_tools", "tools")
    only = ask.tool_choice.function.name if isinstance(ask.tool_choice, NamedChoice) else None
    forced = only is not None or ask.tool_choice == "required"
    return Toolbox(style, functions, ask.parallel_tool_calls is not False, forced, only)


def tool_form(tools: Toolbox, model: ServedModel, answer: Form | None) -> Form | None:
    """What an answer must be; see :meth:`Toolbox.form`.

    Raises:
        ApiError: 400, tools and format do not go together.
    """
    try:
        return tools.form(model.tokenizer, answer)
    except (ValueError, GrammarError) as error:
        raise ApiError(400, f"tools: {error}", param="tools") from error


def rendered(
    model: ServedModel, messages: list[dict[str, Any]], told: dict[str, Any], special: bool
) -> tuple[str, list[int]]:
    """A conversation as text and as token ids.

    Args:
        model: Whose template and tokenizer.
        messages: As :meth:`~llmcompress.serving.protocol.Message.plain` makes them.
        told: What it is told beside them, from :func:`variables`.
        special: Whether the tokenizer adds its special tokens, which a template mostly writes itself.

    Raises:
        ApiError: 400, the template refuses them.
    """
    from jinja2.exceptions import TemplateError

    words: Any = model.tokenizer

    def write(messages: list[dict[str, Any]]) -> str:
        return str(words.apply_chat_template(messages, tokenize=False, **told))

    try:
        try:
            text = write(messages)
        except TypeError:
            # DeepSeek's templates want arguments of earlier calls as text
            text = write([worded(message) for message in messages])
    except (TemplateError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ApiError(400, f"messages: the chat template refuses them: {error}", param="messages") from error
    return text, list(words(text, add_special_tokens=special)["input_ids"])


def worded(message: dict[str, Any]) -> dict[str, Any]:
    """A message whose calls have their arguments as text."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        # letters as they are, as the answer that was handed out had them
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}
