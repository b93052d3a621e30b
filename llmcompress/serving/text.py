"""Tokens to text as they come: whole characters only, and nothing that may turn out to be a stop string."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# what a decoder writes for bytes that do not end a character yet
REPLACEMENT = "\ufffd"
BLANKS = " \t\r\n"
# tokens after which an unfinished character is given up: the longest is four bytes
PATIENCE = 8


class TextStream:
    """The text of one answer, token by token.

    Args:
        tokenizer: Tokenizer of the model.
        stops: Strings that end the answer; they are not part of it.
        kept: Ids of special tokens that are text nevertheless, as those that announce a call of a tool.
        included: Whether what ends the answer is part of it after all.
        least: Tokens whose text is no part of a string that ends the answer.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str] = (), kept: Collection[int] = (),
        included: bool = False, least: int = 0,
    ) -> None:  # fmt: skip
        self.included = included
        self._least, self._count = least, 0
        self._kept = bool(kept)
        self._dropped = specials(tokenizer).difference(kept) if kept else frozenset()
        self._tokenizer, self._stops = tokenizer, [stop for stop in stops if stop]
        self._tokens: list[int] = []
        # tokens before `_seen` are text already; those from `_context` on are decoded again, because what a token
        # becomes depends on its neighbours (spaces before words)
        self._context = self._seen = 0
        self._held = ""
        self.stopped = False

    def _decode(self, tokens: list[int]) -> str:
        skip = not self._kept
        return str(self._tokenizer.decode(tokens, skip_special_tokens=skip, clean_up_tokenization_spaces=False))

    def put(self, token: int) -> str:
        """Take one token in; returns the text that is certain now. After a stop string nothing more comes."""
        self._count += 1
        if self.stopped or token in self._dropped:
            return ""
        self._tokens.append(token)
        before = self._decode(self._tokens[self._context : self._seen])
        after = self._decode(self._tokens[self._context :])
        if after.endswith(REPLACEMENT) and len(self._tokens) - self._seen < PATIENCE:
            return ""
        self._context, self._seen = self._seen, len(self._tokens)
        return self._release(after[len(before) :])

    def end(self) -> str:
        """What was held back, when no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._tokens[self._context : self._seen])
        rest = self._decode(self._tokens[self._context :])[len(before) :]
        text = self._release(rest)
        if not self.stopped:
            text, self._held = text + self._held, ""
        return text

    def _release(self, fresh: str) -> str:
        text = self._held + fresh
        if self._count <= self._least:
            return text
        found = min(((at, len(stop)) for stop in self._stops if (at := text.find(stop)) >= 0), default=None)
        if found is not None:
            self.stopped, self._held = True, ""
            return text[: sum(found) if self.included else found[0]]
        kept = max((overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]


def loads(text: str, strict: bool = True) -> Any:
    """JSON whose texts a tokenizer takes and an answer can be written with: half a surrogate pair, which json lets pass
    as an escape, is none.

    Args:
        text: JSON.
        strict: Whether strings hold no control characters.

    Raises:
        ValueError: It is no JSON, or holds such a half.
        RecursionError: It is too deep.
    """
    found = json.loads(text, strict=strict)
    if "\\u" in text:
        json.dumps(found, ensure_ascii=False).encode()
    return found


def specials(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids of all tokens that are no text, those without a role among them."""
    words: Any = tokenizer
    named = (number for number, token in words.added_tokens_decoder.items() if token.special)
    return frozenset([*named, *words.all_special_ids])


def added(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Words that are one token whatever is around them."""
    words: Any = tokenizer
    return {str(token): number for number, token in words.added_tokens_decoder.items()}


def word(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """A word of the template in a grammar: the token that it is, else its letters.

    llguidance takes added tokens in angle brackets for special ones, also where they are not.
    """
    ids = added(tokenizer)
    return f"<[{ids[text]}]>" if text in ids else json.dumps(text)


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` with which ``stop`` begins."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
