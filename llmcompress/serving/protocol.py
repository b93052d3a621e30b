"""The part of OpenAI's protocol that is spoken here: request bodies, errors.

Fields that would change the answer and are not supported are refused, as are unknown ones: a client learns that it does
not get what it asked for.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

MAX_STOP = 4
# OpenAI's bound of `top_logprobs`; the older endpoint has 5
MAX_TOP = 20


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


class StreamOptions(BaseModel):
    """How to stream."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False
    include_obfuscation: bool = False


class Ask(BaseModel):
    """What both endpoints take."""

    model_config = ConfigDict(extra="forbid", strict=False)
    model: str
    # where a request is silent, the model's generation_config.json decides, else 1 as at OpenAI
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int = Field(default=1, ge=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: Stop = None
    seed: int | None = Field(default=None, ge=-(2**63), lt=2**63)
    user: str | None = None
    # accepted where they change nothing
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: dict[str, float] | None = Field(default=None, max_length=0)

    @model_validator(mode="after")
    def _stops(self) -> Ask:
        if self.stop is not None and len(self.stop) > MAX_STOP:
            raise ValueError(f"stop: at most {MAX_STOP} strings")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only with stream")
        return self

    @property
    def wants_usage(self) -> bool:
        """Whether a stream ends with the number of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


T = TypeVar("T", bound=Ask)


class CompletionAsk(Ask):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = Field(default=16, ge=1)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        """One by one, as text or tokens."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            tokens: Any = self.prompt
            return [tokens]
        several: Any = self.prompt
        return list(several)


class TextPart(BaseModel):
    """A part of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """For a chat template."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class TextFormat(BaseModel):
    """The one format that needs nothing."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]


class ChatAsk(Ask):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP)
    response_format: TextFormat | None = None

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatAsk:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: only with logprobs")
        return self

    @property
    def wanted(self) -> int | None:
        """New tokens asked for."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens


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
        raise ApiError(400, f"{'.'.join(where)}: {text}" if where else text, param=field) from error
