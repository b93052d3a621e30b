"""What a request may say, and what it means."""

from __future__ import annotations

from typing import Any

import pytest

from llmcompress.serving.protocol import ApiError, Ask, ChatAsk, CompletionAsk, parse

PLAIN = {"model": "m", "prompt": "x"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}


def test_prompts_are_texts_or_tokens_one_or_several() -> None:
    for prompt, expected in (
        ("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]),
    ):  # fmt: skip
        assert parse(CompletionAsk, {**PLAIN, "prompt": prompt}).prompts() == expected


@pytest.mark.parametrize(
    ("field", "inside", "outside"),
    [
        ("temperature", (0, 2), (-0.01, 2.01)),
        ("top_p", (0, 1), (-0.01, 1.01)),
        ("n", (1,), (0,)),
        ("seed", (-(2**63), 2**63 - 1), (-(2**63) - 1, 2**63)),
        ("top_k", (-1,), (-2,)),
        ("max_tokens", (1,), (0,)),
        ("stop", ("a", "a" * 256, list("abcd")), ("", "a" * 257, list("abcde"), ["a", ""])),
        ("presence_penalty", (0, None), (0.5,)),
        ("logit_bias", ({}, None), ({"5": 1},)),
        ("logprobs", (0, 5), (-1, 6)),
    ],
)
def test_bounds_of_fields(field: str, inside: tuple[Any, ...], outside: tuple[Any, ...]) -> None:
    for value in inside:
        parse(CompletionAsk, {**PLAIN, field: value})
    for value in outside:
        with pytest.raises(ApiError) as caught:
            parse(CompletionAsk, {**PLAIN, field: value})
        assert caught.value.status == 400 and field in str(caught.value)


def test_likely_tokens_are_told_only_with_probabilities() -> None:
    for value in (0, 20):
        assert parse(ChatAsk, {**CHAT, "logprobs": True, "top_logprobs": value}).top_logprobs == value
    for wrong in ({"top_logprobs": 2}, {"logprobs": False, "top_logprobs": 2}, {"logprobs": True, "top_logprobs": 21}):
        with pytest.raises(ApiError, match="top_logprobs"):
            parse(ChatAsk, {**CHAT, **wrong})


def test_a_chat_asks_for_so_many_new_tokens_by_the_newer_name_first() -> None:
    assert parse(ChatAsk, CHAT).wanted is None
    assert parse(ChatAsk, {**CHAT, "max_tokens": 3}).wanted == 3
    assert parse(ChatAsk, {**CHAT, "max_tokens": 3, "max_completion_tokens": 5}).wanted == 5


def test_a_stream_tells_its_usage_where_that_is_asked_for() -> None:
    def asked(**options: Any) -> Ask:
        return parse(CompletionAsk, {**PLAIN, "stream": True, **options})

    assert not asked().wants_usage and not asked(stream_options={"include_obfuscation": False}).wants_usage
    assert asked(stream_options={"include_usage": True}).wants_usage
