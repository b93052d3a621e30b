"""Sampling that a checkpoint's makers recommend, and what it means to a chat and a request."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig

from llmcompress.cli.generate import Sampling as Talk
from llmcompress.inference.generate import Recommended, Sampling, recommended
from llmcompress.serving.app import _sampling
from llmcompress.serving.protocol import ChatAsk, parse


def model(**settings: Any) -> Any:
    return SimpleNamespace(generation_config=GenerationConfig(**settings))


def test_only_a_file_that_asks_for_sampling_recommends() -> None:
    assert recommended(GenerationConfig()) == recommended(None) == Recommended()
    made = GenerationConfig(do_sample=True, temperature=0.6, top_p=0.9, top_k=20, min_p=0.05)
    assert recommended(made) == Recommended(0.6, 0.9, 20, 0.05)
    assert recommended(GenerationConfig(do_sample=True, temperature=0.6)).temperature == 0.6
    assert recommended(GenerationConfig(do_sample=False, temperature=0.6)) == Recommended()
    # transformers and vLLM count repetitions with greedy decoding too
    for sampled in (False, True):
        made = recommended(GenerationConfig(do_sample=sampled, repetition_penalty=1.05))
        assert made == Recommended(repetition_penalty=1.05)
        assert recommended(GenerationConfig(do_sample=sampled, max_new_tokens=9)) == Recommended(max_new_tokens=9)


@pytest.mark.parametrize(
    ("asked", "made", "expected"),
    [
        ({}, Recommended(), (1.0, 1.0, 0, 0.0)),
        ({}, Recommended(0.6, 0.9, 20, 0.1), (0.6, 0.9, 20, 0.1)),
        ({"temperature": 0}, Recommended(0.6, 0.9, 20), (0.0, 0.9, 20, 0.0)),
        ({"top_p": 0.5}, Recommended(0.6, None, None), (0.6, 0.5, 0, 0.0)),
        ({"top_k": -1, "min_p": 0}, Recommended(0.6, None, 20, 0.1), (0.6, 1.0, 0, 0.0)),
        ({"top_k": 5, "min_p": 0.2}, Recommended(), (1.0, 1.0, 5, 0.2)),
    ],
)
def test_a_request_wins_over_the_file(asked: dict[str, Any], made: Recommended, expected: tuple[float, ...]) -> None:
    ask = parse(ChatAsk, {"model": "m", "messages": [{"role": "user", "content": "x"}], **asked})
    found = _sampling(ask, SimpleNamespace(sampling=made), 5, 3)  # type: ignore[arg-type]
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == expected
    assert (found.max_new_tokens, found.seed) == (5, 3)


def test_a_chat_follows_the_file_and_generate_does_not() -> None:
    made = model(do_sample=True, temperature=0.6, top_k=20)
    assert Talk(8, None, None, 1, talk=True).of(made) == Sampling(8, 0.6, 0.95, 20, 1)
    assert Talk(8, None, None, 1, talk=True).of(model()) == Sampling(8, 0.7, 0.95, 0, 1)
    assert Talk(8, None, None, 1, 0, 0.1, talk=True).of(made) == Sampling(8, 0.6, 0.95, 0, 1, 0.1)
    made = model(do_sample=True, temperature=0.6, top_k=20, repetition_penalty=1.2)
    assert Talk(8, None, None, 1, talk=True).of(made) == Sampling(8, 0.6, 0.95, 20, 1, 0.0, 1.2)
    assert Talk(8, None, None, 1, None, None, 1.0, talk=True).of(made) == Sampling(8, 0.6, 0.95, 20, 1)
    assert Talk(8, 0.9, 0.8, 1).of(made) == Sampling(8, 0.9, 0.8, 0, 1)


@pytest.mark.parametrize("asked", [(None, None), (0.5, None), (None, 0.5), (0.5, 0.5)])
def test_a_chat_and_a_request_that_say_the_same_get_the_same(asked: tuple[float | None, float | None]) -> None:
    made = model(do_sample=True, temperature=0.6, top_p=0.9, top_k=20)
    ask = parse(ChatAsk, {"model": "m", "messages": [{"role": "user", "content": "x"}],
                          **{k: v for k, v in zip(("temperature", "top_p"), asked) if v is not None}})  # fmt: skip
    served = SimpleNamespace(sampling=recommended(made.generation_config))
    assert Talk(8, *asked, 3, talk=True).of(made) == _sampling(ask, served, 8, 3)  # type: ignore[arg-type]
