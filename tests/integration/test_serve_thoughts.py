"""Thoughts over the wire, with the ``openai`` client: told from the answer, bounded, left out."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("llguidance")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llmcompress.serving.limits import Limits  # noqa: E402

LIMITS = Limits(rows=6, queue=32, cache_tokens=2000, prompt_tokens=200, new_tokens=60, choices=8)
# as DeepSeek's and Qwen's: thoughts of earlier answers stand apart, those of the next one are begun, or ended at once
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {{ m.reasoning_content }}|{{ m.content.split('</think>')[-1] }}\n{% endfor %}"
    "assistant:<think>\n"
    "{% if enable_thinking is defined and enable_thinking is false %}\n</think>\n\n{% endif %}"
)


@pytest.fixture(scope="module")
def words(tiny_tokenizer: Any) -> Any:
    from tokenizers import AddedToken

    found = copy.deepcopy(tiny_tokenizer)
    found.add_tokens([AddedToken("<think>", special=True), AddedToken("</think>", special=True)])
    found.chat_template = TEMPLATE
    return found


@pytest.fixture(scope="module")
def server(words: Any, tiny_llama: Any, start_server: Any) -> Iterator[Any]:
    from llmcompress.serving.served import serve_model

    running = start_server(serve_model(tiny_llama(len(words)), words, "tiny", LIMITS, native=False), LIMITS)
    yield running
    running.stop()


def chat(server: Any, end: int, bias: int, **asked: Any) -> Any:
    """Ask with a bias of the token that ends thoughts."""
    given = {"messages": [{"role": "user", "content": "The cat"}], "max_tokens": 8, "temperature": 0, **asked}
    return server.client().chat.completions.create(model="tiny", logit_bias={str(end): bias}, **given)


@pytest.fixture
def end(words: Any) -> int:
    return int(words.convert_tokens_to_ids("</think>"))


def test_thoughts_that_do_not_end_are_no_answer(server: Any, end: int) -> None:
    (whole,) = chat(server, end, -100).choices
    assert whole.message.content == "" and whole.message.reasoning_content and whole.finish_reason == "length"
    chunks = list(chat(server, end, -100, stream=True))
    told = "".join(getattr(chunk.choices[0].delta, "reasoning_content", "") for chunk in chunks)
    assert told == whole.message.reasoning_content and not any(chunk.choices[0].delta.content for chunk in chunks)
    hidden = chat(server, end, -100, extra_body={"include_reasoning": False}).choices[0].message
    assert hidden.content == "" and not hasattr(hidden, "reasoning_content")


@pytest.mark.parametrize("effort", ["high", "none"])
def test_a_format_begins_behind_thoughts(server: Any, end: int, effort: str) -> None:
    # blanks may come before it
    asked = {"extra_body": {"guided_regex": "c[aou]t"}, "reasoning_effort": effort, "n": 2, "seed": 5, "max_tokens": 20}
    bias = 100 if effort == "high" else 0
    whole = chat(server, end, bias, **asked, temperature=1.0)
    for one in whole.choices:
        assert one.message.content in ("cat", "cot", "cut") and one.finish_reason == "stop"
    contents = ["", ""]
    for chunk in chat(server, end, bias, **asked, temperature=1.0, stream=True):
        contents[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert set(contents) <= {"cat", "cot", "cut"}


def test_what_was_thought_goes_back_as_it_came(server: Any, end: int) -> None:
    first = chat(server, end, -100).choices[0].message.model_dump(exclude_none=True)
    asked, silent = {"role": "user", "content": "The cat"}, {"role": "assistant", "content": first["content"]}
    read = [chat(server, end, -100, messages=[asked, said, asked]).usage.prompt_tokens for said in (first, silent)]
    assert first["reasoning_content"] and read[0] > read[1]


def test_a_template_without_thoughts_takes_no_effort(words: Any, tiny_llama: Any, start_server: Any, end: int) -> None:
    from llmcompress.serving.served import serve_model

    plain = copy.deepcopy(words)
    plain.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    running = start_server(serve_model(tiny_llama(len(plain)), plain, "tiny", LIMITS, native=False), LIMITS)
    try:
        with pytest.raises(openai.BadRequestError, match="reasoning_effort: the chat template of this model"):
            chat(running, end, 0, reasoning_effort="low")
        message = chat(running, end, 0).choices[0].message
        assert message.content and not hasattr(message, "reasoning_content")
    finally:
        running.stop()
