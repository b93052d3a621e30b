"""Answers in OpenAI's shapes, whole or in chunks."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llmcompress.serving.text import REPLACEMENT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from llmcompress.serving.scheduler import Job, Piece, TokenChoice
    from llmcompress.serving.served import ServedModel
    from llmcompress.serving.thoughts import Thinking
    from llmcompress.serving.tools import Toolbox


class Shape(Protocol):
    """What the two endpoints do differently.

    Attributes:
        prefix: Prefix of ids.
        whole: ``object`` of a whole answer.
        part: ``object`` of a chunk.
    """

    prefix: str
    whole: str
    part: str

    def opening(self) -> dict[str, Any] | None:
        """The choice of a chunk before any text, or None."""
        ...

    def delta(self, index: int, text: str, reason: str | None) -> dict[str, Any] | None:
        """A chunk's choice of the answer ``index``, None where there is nothing to tell."""
        ...

    def choice(self, index: int, text: str) -> dict[str, Any]:
        """A whole choice."""
        ...

    def ended(self, index: int, reason: str | None) -> str | None:
        """Why an answer has ended, in OpenAI's words."""
        ...

    def logprobs(self, words: PreTrainedTokenizerBase, choices: Sequence[TokenChoice], offset: int) -> dict[str, Any]:
        """Probabilities of tokens; ``offset`` is the length of the text before them."""
        ...


class CompletionShape:
    """``/v1/completions``."""

    prefix, whole, part = "cmpl", "text_completion", "text_completion"

    def opening(self) -> dict[str, Any] | None:
        """Nothing."""
        return None

    def delta(self, index: int, text: str, reason: str | None) -> dict[str, Any] | None:
        """Text."""
        return {"text": text}

    def choice(self, index: int, text: str) -> dict[str, Any]:
        """Text."""
        return {"text": text}

    def ended(self, index: int, reason: str | None) -> str | None:
        """The same."""
        return reason

    def logprobs(self, words: PreTrainedTokenizerBase, choices: Sequence[TokenChoice], offset: int) -> dict[str, Any]:
        """Parallel lists."""
        texts = [_text(words, choice.token) for choice in choices]
        offsets = []
        for text in texts:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [choice.logprob for choice in choices],
            "top_logprobs": [_likely(words, choice) for choice in choices],
            "text_offset": offsets,
        }


class ChatShape:
    """``/v1/chat/completions``.

    Args:
        answers: How many there will be.
        tools: That they may call, None for none.
        thinking: How they think, None where thoughts are not told apart.
    """

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def __init__(self, answers: int = 1, tools: Toolbox | None = None, thinking: Thinking | None = None) -> None:
        self._tools, self._thinking = tools, thinking
        self._calls = [tools.stream() for _ in range(answers)] if tools is not None else []
        self._thoughts = [thinking.stream() for _ in range(answers)] if thinking is not None else []

    def opening(self) -> dict[str, Any] | None:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, index: int, text: str, reason: str | None) -> dict[str, Any] | None:
        """Thoughts, content, and what has come of calls."""
        told = self._told(index, text, reason is not None)
        return {"delta": told} if told or reason is not None else None

    def choice(self, index: int, text: str) -> dict[str, Any]:
        """A message."""
        message: dict[str, Any] = {"role": "assistant", "content": "", "refusal": None}
        message.update(self._told(index, text, True))
        if "tool_calls" in message:
            message["content"] = message["content"] or None
            for call in message["tool_calls"]:
                del call["index"]
        return {"message": message}

    def _told(self, index: int, text: str, over: bool) -> dict[str, Any]:
        """What some more of an answer adds to its message, but for what is empty."""
        thoughts, calls = "", list[dict[str, Any]]()
        if self._thinking is not None:
            stream = self._thoughts[index]
            parts = [stream.put(text), *([stream.end()] if over else [])]
            thoughts, text = ("".join(part) for part in zip(*parts))
            thoughts = thoughts if self._thinking.told else ""
        if self._tools is not None:
            said = self._calls[index].put(text)
            text, calls = said.content, said.calls
            if over:
                text += self._calls[index].end().content
        told = {"reasoning_content": thoughts, "content": text, "tool_calls": calls}
        return {name: value for name, value in told.items() if value}

    def ended(self, index: int, reason: str | None) -> str | None:
        """For calls, unless a certain one was asked for."""
        tools = self._tools
        called = tools is not None and tools.only is None and self._calls[index].count > 0
        return "tool_calls" if called and reason == "stop" else reason

    def logprobs(self, words: PreTrainedTokenizerBase, choices: Sequence[TokenChoice], offset: int) -> dict[str, Any]:
        """One object for each token."""

        def entry(token: int, value: float | None) -> dict[str, Any]:
            text = _text(words, token)
            # part of a character: its bytes are not those of what stands for it
            known = REPLACEMENT not in text
            return {"token": text, "logprob": value, "bytes": list(text.encode()) if known else None}

        return {
            "content": [
                {**entry(choice.token, choice.logprob), "top_logprobs": [entry(*pair) for pair in choice.top]}
                for choice in choices
            ],
            "refusal": None,
        }


def _likely(words: PreTrainedTokenizerBase, choice: TokenChoice) -> dict[str, float] | None:
    """The likeliest tokens of a place and the one that stands there, by their texts."""
    if choice.logprob is None:
        return None
    found: dict[str, float] = {}
    for token, value in (*choice.top, (choice.token, choice.logprob)):
        # parts of characters have one text, which stands for the likeliest: lm-eval compares with that
        found.setdefault(_text(words, token), value)
    return found


def _text(words: PreTrainedTokenizerBase, token: int) -> str:
    text = str(words.decode([token], clean_up_tokenization_spaces=False))
    # decoders of SentencePiece leave out the space before the first word
    spaced = str(words.convert_ids_to_tokens(token)).startswith("\u2581") and not text.startswith(" ")
    return f" {text}" if spaced else text


class Answers:
    """The answers of one request.

    Args:
        shape: Shape of the endpoint.
        model: Asked for.
        name: Id of the request.
        jobs: One for each answer.
        prompts: Token ids; each was asked ``len(jobs) / len(prompts)`` times.
    """

    def __init__(
        self, shape: Shape, model: ServedModel, name: str, jobs: Sequence[Job], prompts: Sequence[Sequence[int]]
    ) -> None:
        self.jobs = jobs
        self._shape, self._model, self._prompts = shape, model, prompts
        self._head = {"id": name, "created": int(time.time()), "model": model.name}
        self._texts = ["" for _ in jobs]
        self._lengths = [0 for _ in jobs]
        self._tokens = [0 for _ in jobs]
        self._reasons: list[str | None] = [None for _ in jobs]
        self._choices: list[list[TokenChoice]] = [[] for _ in jobs]

    def openings(self) -> Iterator[dict[str, Any]]:
        """Chunks that come before any text."""
        opening = self._shape.opening()
        for index in range(len(self.jobs)) if opening is not None else ():
            yield self._chunk({**(opening or {}), "index": index, "logprobs": None, "finish_reason": None})

    def chunk(self, index: int, piece: Piece) -> dict[str, Any] | None:
        """The chunk of a piece, None where it tells nothing yet."""
        logprobs = None
        if piece.choices:
            logprobs = self._shape.logprobs(self._model.tokenizer, piece.choices, self._lengths[index])
        self._lengths[index] += len(piece.text)
        self._tokens[index] = piece.tokens
        choice = self._shape.delta(index, piece.text, piece.reason)
        if choice is None and logprobs is None:
            return None
        reason = self._shape.ended(index, piece.reason)
        told = choice or {"delta": {}}
        return self._chunk({**told, "index": index, "logprobs": logprobs, "finish_reason": reason})

    def _chunk(self, choice: dict[str, Any]) -> dict[str, Any]:
        return {**self._head, "object": self._shape.part, "choices": [choice]}

    def usage_chunk(self) -> dict[str, Any]:
        """The last chunk of a stream that counts."""
        return {**self._head, "object": self._shape.part, "choices": [], "usage": self.usage()}

    def add(self, index: int, piece: Piece) -> None:
        """Keep a piece for :meth:`body`."""
        self._texts[index] += piece.text
        self._tokens[index], self._reasons[index] = piece.tokens, piece.reason
        self._choices[index] += piece.choices

    def body(self) -> dict[str, Any]:
        """The whole answer."""
        choices = []
        for index, job in enumerate(self.jobs):
            logprobs = None
            if job.logprobs is not None:
                logprobs = self._shape.logprobs(self._model.tokenizer, self._choices[index], 0)
            choice = self._shape.choice(index, self._texts[index])
            reason = self._shape.ended(index, self._reasons[index])
            choices.append({**choice, "index": index, "logprobs": logprobs, "finish_reason": reason})
        return {**self._head, "object": self._shape.whole, "choices": choices, "usage": self.usage()}

    def usage(self) -> dict[str, Any]:
        """Tokens so far."""
        prompt, new = sum(map(len, self._prompts)), sum(self._tokens)
        # a prompt counts once, however many answers it has, and so does what the first of them found
        each = len(self.jobs) // len(self._prompts)
        held = sum(job.reused for job in self.jobs[::each])
        return {
            "prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": held},
        }  # fmt: skip
