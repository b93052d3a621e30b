"""The part of OpenAI's protocol that is spoken here: request bodies, errors.

Fields that would change the answer and are not supported are refused, as are unknown ones: a client learns that it does
not get what it asked for.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from llmcompress.inference.penalties import Penalties
from llmcompress.serving.given import Given
from llmcompress.serving.structured import AnyFormat, Choices, StructuredOutputs, form_of
from llmcompress.serving.tools import MAX_TOOLS, NamedChoice, Tool, ToolCall, ToolChoice

if TYPE_CHECKING:
    from llmcompress.inference.generate import Recommended

# vLLM has no bound, OpenAI 4: measurements ask for more than that
MAX_STOP = 64
# OpenAI's bound of `top_logprobs`; the older endpoint has 5
MAX_TOP = 20
# of a repetition penalty; beyond it logits lose their meaning
MAX_REPETITION = 100
# arguments of transformers' apply_chat_template that are not variables of the template
RESERVED = frozenset({
    "conversation", "messages", "tools", "documents", "chat_template", "add_generation_prompt",
    "continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict",
    "return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs",
})  # fmt: skip


class ApiError(Exception):
    """Becomes an error answer.

    Args:
        status: HTTP status.
        message: For people.
        code: For programs.
        param: The field that is wrong.
        kind: OpenAI's ``type``.
    """

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:  # fmt: skip
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.kind = status, message, code, param, kind

    def body(self) -> dict[str, Any]:
        """OpenAI's shape of an error."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Stop = Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=256)]] | None, BeforeValidator(_listed)]


class StreamOptions(Given):
    """How to stream."""

    include_usage: bool = False
    # beyond OpenAI, as vLLM has it: what was counted so far, in every chunk
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _free(given: dict[str, Any]) -> dict[str, Any]:
    reserved = sorted(RESERVED & set(given))
    if reserved:
        raise ValueError(f"{', '.join(reserved)} cannot be set")
    return given


TemplateVariables = Annotated[dict[str, bool | int | str], AfterValidator(_free)]


class Ask(Given):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=False, allow_inf_nan=False)
    # beyond OpenAI, as vLLM has it: may be left out where one model is served
    model: str | None = None
    # where a request is silent, the model's generation_config.json decides, else 1 as at OpenAI
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, ge=0, le=1)
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    # beyond OpenAI, as vLLM and llama.cpp have it: 0 and -1 are all tokens
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    # beyond OpenAI, as vLLM has them: measurements want answers of one length
    ignore_eos: bool = False
    min_tokens: int = Field(default=0, ge=0)
    stop_token_ids: list[int] | None = Field(default=None, max_length=64)
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    # what a client says about itself
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    # beyond OpenAI, as vLLM has it
    repetition_penalty: float | None = Field(default=None, gt=0, le=MAX_REPETITION)
    logit_bias: dict[TokenId, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    response_format: AnyFormat | None = None
    # beyond OpenAI, as vLLM names it now and did before
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None
    # beyond OpenAI, as vLLM has it: whether the tokenizer adds its own; a chat's template mostly writes them
    add_special_tokens: bool | None = None
    # accepted where they change nothing
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    prompt_cache_retention: str | None = None
    use_beam_search: Literal[False] | None = None
    length_penalty: Literal[1] | None = None
    spaces_between_special_tokens: Literal[True] | None = None
    priority: Literal[0] | None = None
    request_id: str | None = None
    cache_prompt: bool | None = None

    @model_validator(mode="after")
    def _stops(self) -> Ask:
        if self.stop is not None and len(self.stop) > MAX_STOP:
            raise ValueError(f"stop: at most {MAX_STOP} strings")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        form_of(self)
        return self

    def penalties(self, made: Recommended, ends: Collection[int]) -> Penalties:
        """What changes logits before a token is chosen.

        Args:
            made: What the model's makers recommend where the request is silent.
            ends: Token ids that end the answer.
        """
        repetition = self.repetition_penalty or made.repetition_penalty or 1.0
        return Penalties(
            self.presence_penalty or 0.0, self.frequency_penalty or 0.0, repetition,
            tuple(sorted((self.logit_bias or {}).items())), self.min_tokens, tuple(sorted(ends)),
        )  # fmt: skip

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def counts_always(self) -> bool:
        """Whether every chunk of such a stream tells it."""
        return self.wants_usage and self.stream_options is not None and self.stream_options.continuous_usage_stats


T = TypeVar("T", bound=BaseModel)


class CompletionAsk(Ask):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    # none of them where only the prompt's probabilities are asked for
    max_tokens: int = Field(default=16, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool | None = None
    best_of: int | None = None
    suffix: Literal[""] | None = None

    @model_validator(mode="after")
    def _some(self) -> CompletionAsk:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0, which only goes with echo")
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported, unless it is n")
        return self

    def prompts(self) -> list[str | list[int]]:
        """One by one, as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            tokens: Any = self.prompt
            return [tokens]
        several: Any = self.prompt
        return list(several)


class TextPart(Given):
    """A part of a message."""

    type: Literal["text"]
    text: str
    # what clients of other servers say about caches: prompts are cached here anyway
    cache_control: dict[str, Any] | None = None


def _joined(value: Any) -> Any:
    """Parts of text as one text."""
    if not isinstance(value, list):
        return value
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"parts of type {kind!r} are not supported, only 'text'")
    return "".join(TextPart.model_validate(part).text for part in value)


Content = Annotated[str | None, BeforeValidator(_joined)]
# absent, or as good as that
Nothing = Annotated[list[Any] | None, Field(max_length=0)]


class Message(Given):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    # of an answer that a client passes back as it was
    refusal: None = None
    audio: None = None
    function_call: None = None
    annotations: Nothing = None
    cache_control: dict[str, Any] | None = None
    # beyond OpenAI: thoughts of an earlier answer, as servers that tell them apart name them
    reasoning_content: str | None = None
    reasoning: str | None = None

    @model_validator(mode="after")
    def _whose(self) -> Message:
        if self.tool_calls and self.role != "assistant":
            raise ValueError("tool_calls: only of the assistant")
        if self.tool_call_id is not None and self.role != "tool":
            raise ValueError("tool_call_id: only with role tool")
        if self.thoughts and self.role != "assistant":
            raise ValueError("reasoning_content: only of the assistant")
        if self.content is None and not self.tool_calls:
            raise ValueError("a message needs content, unless it calls tools")
        # arguments that are no JSON are noticed here
        self.plain()
        return self

    @property
    def thoughts(self) -> str | None:
        """What came before the answer."""
        return self.reasoning_content or self.reasoning

    def plain(self) -> dict[str, Any]:
        """For a chat template."""
        role = "system" if self.role == "developer" else self.role
        found: dict[str, Any] = {"role": role, "content": self.content or ""}
        if self.thoughts:
            # under both names: templates read either
            found |= {"reasoning_content": self.thoughts, "reasoning": self.thoughts}
        if self.tool_calls:
            found["tool_calls"] = [call.plain() for call in self.tool_calls]
        if self.role == "tool":
            told = {"tool_call_id": self.tool_call_id, "name": self.name}
            found |= {key: value for key, value in told.items() if value is not None}
        return found


class Conversed(Given):
    """A conversation, and how it becomes a prompt; beyond OpenAI, as vLLM has it."""

    messages: list[Message] | None = Field(default=None, min_length=1)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    # the answer goes on where the last message ends
    continue_final_message: bool = False
    # variables of the chat template, as llama.cpp has them too
    chat_template_kwargs: TemplateVariables | None = None

    @model_validator(mode="after")
    def _ends(self) -> Conversed:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message: only with add_generation_prompt false")
        return self


class ChatAsk(Ask, Conversed):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    # for templates that ask for it, or at least for whether to think
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = None
    # beyond OpenAI, as vLLM has it
    include_reasoning: bool = True
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    # accepted where they change nothing
    functions: Nothing = None
    function_call: Literal["none", "auto"] | None = None
    modalities: list[Literal["text"]] | None = None
    verbosity: Literal["medium"] | None = None
    echo: Literal[False] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> ChatAsk:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise ValueError("tools: two have one name")
        if isinstance(self.tool_choice, NamedChoice) and self.tool_choice.function.name not in names:
            raise ValueError(f"tool_choice: there is no tool {self.tool_choice.function.name!r}")
        if self.tool_choice == "required" and not names:
            raise ValueError("tool_choice: required, and there are no tools")
        return self

    @property
    def wanted(self) -> int | None:
        """New tokens asked for."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


class TokenizeAsk(Conversed):
    """``POST /tokenize``, as vLLM has it: a text or a conversation."""

    # may be left out where one model is served
    model: str | None = None
    prompt: str | None = None
    return_token_strs: bool = False

    @model_validator(mode="after")
    def _one(self) -> TokenizeAsk:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give one of prompt and messages")
        return self


class DetokenizeAsk(Given):
    """``POST /detokenize``, as vLLM has it."""

    model: str | None = None
    tokens: list[TokenId]


def parse(kind: type[T], data: Any) -> T:
    """Check a body.

    Raises:
        ApiError: 400, naming the field.
    """
    if not isinstance(data, dict):
        raise ApiError(400, "the body must be a JSON object")
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = [str(part) for part in first["loc"]]
        field = where[0] if where else None
        if first["type"] == "extra_forbidden" and len(where) == 1:
            raise ApiError(400, f"unrecognized request argument supplied: {field}", param=field) from error
        text = first["msg"].removeprefix("Value error, ")
        named = text.partition(":")[0]
        if not where and named in kind.model_fields:
            # what several fields say together begins with the one that is wrong
            field = named
        elif field == "prompt" and len(where) > 1:
            where, text = where[:1], "a text, token ids, a list of texts, or a list of lists of token ids"
        if first["type"] == "literal_error":
            text = f"{first['input']!r:.80} is not supported, only {first['ctx']['expected']}"
        elif first["type"] == "too_long" and first["ctx"]["max_length"] == 0:
            text = "not supported"
        raise ApiError(400, f"{'.'.join(where)}: {text}" if where else text, param=field) from error
