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

    def delta(self, text: str, reason: str | None) -> dict[str, Any]:
        """A chunk's choice."""
        ...

    def choice(self, text: str) -> dict[str, Any]:
        """A whole choice."""
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

    def delta(self, text: str, reason: str | None) -> dict[str, Any]:
        """Text."""
        return {"text": text}

    def choice(self, text: str) -> dict[str, Any]:
        """Text."""
        return {"text": text}

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
    """``/v1/chat/completions``."""

    prefix, whole, part = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> dict[str, Any] | None:
        """The role."""
        return {"delta": {"role": "assistant", "content": ""}}

    def delta(self, text: str, reason: str | None) -> dict[str, Any]:
        """Content."""
        return {"delta": {"content": text} if text or reason is None else {}}

    def choice(self, text: str) -> dict[str, Any]:
        """A message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

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

    def chunk(self, index: int, piece: Piece) -> dict[str, Any]:
        """The chunk of a piece."""
        logprobs = None
        if piece.choices:
            logprobs = self._shape.logprobs(self._model.tokenizer, piece.choices, self._lengths[index])
        self._lengths[index] += len(piece.text)
        self._tokens[index] = piece.tokens
        choice = self._shape.delta(piece.text, piece.reason)
        return self._chunk({**choice, "index": index, "logprobs": logprobs, "finish_reason": piece.reason})

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
            choice = self._shape.choice(self._texts[index])
            choices.append({**choice, "index": index, "logprobs": logprobs, "finish_reason": self._reasons[index]})
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
