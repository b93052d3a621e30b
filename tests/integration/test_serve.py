"""The server as clients see it: the real ``openai`` client against a real socket."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

openai = pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
pytest.importorskip("prometheus_client")

from llmcompress.serving.limits import Limits  # noqa: E402

KEY = "a-key-for-tests"
# seconds for what takes milliseconds on a machine that does nothing else
PATIENCE = 120.0
LIMITS = Limits(
    rows=6, queue=8, cache_tokens=768, prompt_tokens=64, new_tokens=64, choices=8, body_bytes=4096, drain_seconds=20.0,
    write_seconds=5.0,
)  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('late') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if brief is defined and brief %}briefly {% endif %}assistant:"
)


def model_folder(root: Path, tokenizer: Any, model: Any) -> Path:
    folder = root / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def folder(tiny_tokenizer: Any, tiny_llama: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_llama(len(tiny_tokenizer), spread=2.0)
    return model_folder(tmp_path_factory.mktemp("serve"), tiny_tokenizer, model)


@pytest.fixture(scope="module", params=["native", "modules"])
def server(folder: Path, start_server: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    from llmcompress.hf import load
    from llmcompress.serving.served import serve_model

    model, tokenizer = load(folder)
    assert tokenizer is not None
    served = serve_model(model, tokenizer, "tiny", LIMITS, native=request.param == "native")
    running = start_server(served, LIMITS, KEY)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def reference(folder: Path) -> Any:
    """Greedy continuation of a text by transformers."""
    import torch

    from llmcompress.hf import load

    model, words = load(folder)
    assert words is not None

    def write(prompt: str, count: int) -> str:
        ids = torch.tensor([words(prompt)["input_ids"]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
        text: str = words.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        return text

    return write


def test_models_are_listed(server: Any) -> None:
    assert [model.id for model in server.client().models.list()] == ["tiny"]
    told = server.client().models.retrieve("tiny")
    assert told.owned_by == "llmcompress" and told.max_model_len == server.server.scheduler.room("tiny")
    with pytest.raises(openai.NotFoundError, match="served are tiny"):
        server.client().models.retrieve("other")


def test_a_completion_is_what_the_model_writes(server: Any, reference: Any) -> None:
    answer = server.client().completions.create(model="tiny", prompt="The cat", max_tokens=20, temperature=0)
    assert answer.choices[0].text == reference("The cat", 20)
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == answer.usage.total_tokens


def test_the_only_model_needs_no_name(server: Any) -> None:
    status, told = server.raw("/v1/completions", b'{"prompt": "The cat", "max_tokens": 1}')
    assert status == 200 and json.loads(told)["model"] == "tiny"


def test_many_streams_at_once_join_and_leave(server: Any, reference: Any) -> None:
    prompts = [f"{word} and" for word in ("The cat", "Nobody", "She wrote", "When the rain", "a café", "seven", "door")]
    wanted = {prompt: 8 + 5 * index for index, prompt in enumerate(prompts)}
    got: dict[str, str] = {}

    def ask(prompt: str) -> None:
        stream = server.client().completions.create(
            model="tiny", prompt=prompt, max_tokens=wanted[prompt], temperature=0, stream=True
        )
        got[prompt] = "".join(chunk.choices[0].text for chunk in stream)

    threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got == {prompt: reference(prompt, count) for prompt, count in wanted.items()}
    assert server.idle()


def test_a_chat_streams_role_content_reason_and_usage(server: Any, reference: Any) -> None:
    messages = [{"role": "user", "content": "The cat"}]
    whole = server.client().chat.completions.create(model="tiny", messages=messages, max_tokens=12, temperature=0)
    assert whole.choices[0].message.content == reference("user: The cat\nassistant:", 12)
    chunks = list(
        server.client().chat.completions.create(
            model="tiny", messages=messages, max_tokens=12, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )
    )  # fmt: skip
    assert chunks[0].choices[0].delta.role == "assistant"
    # present in every chunk, null but for the last
    assert all("usage" in chunk.model_fields_set for chunk in chunks)
    assert [chunk.usage is None for chunk in chunks] == [True] * (len(chunks) - 1) + [False]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens


def test_stop_strings_end_an_answer_before_them(server: Any, reference: Any) -> None:
    whole = reference("The cat", 20)
    stop = whole[4:7]
    answer = server.client().completions.create(model="tiny", prompt="The cat", max_tokens=20, temperature=0, stop=stop)
    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 20


def test_a_seed_repeats_and_choices_differ(server: Any) -> None:
    ask = {"model": "tiny", "prompt": "The", "max_tokens": 16, "temperature": 1.5, "top_p": 0.95, "seed": 7, "n": 3}
    first, second = (server.client().completions.create(**ask) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in second.choices]
    assert len(set(texts)) > 1


def test_probabilities_of_tokens(server: Any) -> None:
    answer = server.client().completions.create(model="tiny", prompt="The", max_tokens=4, temperature=0, logprobs=3)
    found = answer.choices[0].logprobs
    assert "".join(found.tokens) == answer.choices[0].text
    # several tokens may be written alike: parts of characters
    for top, value in zip(found.top_logprobs, found.token_logprobs):
        assert 1 <= len(top) <= 3
        assert value >= max(top.values())
    messages = [{"role": "user", "content": "The"}]
    chat = server.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=3, logprobs=True, top_logprobs=2
    )
    assert all(len(entry.top_logprobs) == 2 and entry.logprob <= 0 for entry in chat.choices[0].logprobs.content)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_may_begin_with_its_prompt(server: Any, reference: Any, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["The cat", "A"], "max_tokens": 5, "temperature": 0, "n": 2}
    found = server.client().completions.create(**asked, echo=True, stream=stream)
    texts = [choice.text for choice in found.choices] if not stream else ["", "", "", ""]
    for chunk in found if stream else ():
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [text + reference(text, 5) for text in ("The cat", "The cat", "A", "A")]


@pytest.mark.parametrize("ends", [False, True])
def test_what_lm_eval_asks_of_prompts(server: Any, folder: Path, ends: bool) -> None:
    """Its own reading of the answer, against the model's logits, also where the one new token ends it."""
    import torch

    from llmcompress.hf import load

    openai_models = pytest.importorskip("lm_eval.models.openai_completions")
    model, _ = load(folder)
    prompts, contexts = [[60, 61, 62, 63, 64], [70, 71, 72]], [2, 1]
    # the second one goes on as the model would
    prompts[1].append(int(model(torch.tensor([prompts[1]])).logits[0, -1].argmax()))
    contexts[1] = 3
    body = {
        "model": "tiny", "prompt": prompts, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234,
        "echo": True,
    }  # fmt: skip
    if ends:
        body["stop_token_ids"] = [int(model(torch.tensor([prompt])).logits[0, -1].argmax()) for prompt in prompts]
    status, answer = server.raw("/v1/completions", json.dumps(body).encode())
    assert status == 200, answer
    assert {choice["finish_reason"] for choice in json.loads(answer)["choices"]} == {"stop" if ends else "length"}
    found = openai_models.LocalCompletionsAPI.parse_logprobs(json.loads(answer), ctxlens=contexts)
    for prompt, context, (logprob, greedy) in zip(prompts, contexts, found):
        logs = model(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = [float(logs[at - 1, prompt[at]]) for at in range(context, len(prompt))]
        assert logprob == pytest.approx(sum(expected), abs=1e-4)
        assert greedy == all(int(logs[at - 1].argmax()) == prompt[at] for at in range(context, len(prompt)))
    assert [greedy for _, greedy in found] == [False, True]
    first = json.loads(answer)["choices"][0]["logprobs"]
    assert first["token_logprobs"][0] is first["top_logprobs"][0] is None
    assert len(first["tokens"]) == 6
    assert first["text_offset"][0] == 0
    if not ends:
        # without an answer the prompts' probabilities are the same
        status, alone = server.raw("/v1/completions", json.dumps({**body, "max_tokens": 0}).encode())
        assert status == 200, alone
        for less, more in zip(json.loads(alone)["choices"], json.loads(answer)["choices"]):
            assert less["finish_reason"] == "length" and more["text"].startswith(less["text"])
            assert less["logprobs"]["token_logprobs"] == more["logprobs"]["token_logprobs"][:-1]
        assert json.loads(alone)["usage"]["completion_tokens"] == 0 and server.idle()


def test_prompts_may_be_tokens_and_several(server: Any, reference: Any) -> None:
    ids = [[60, 61, 62], [70, 71]]
    answer = server.client().completions.create(model="tiny", prompt=ids, max_tokens=3, temperature=0)
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.usage.prompt_tokens == 5


def test_a_conversation_goes_on_where_its_last_message_ends(server: Any, reference: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "The cat"}, {"role": "assistant", "content": "It is"}]
    on = {"add_generation_prompt": False, "continue_final_message": True}
    answer = server.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=6, temperature=0, extra_body=on
    )
    prompt = "user: The cat\nassistant: It is"
    assert answer.choices[0].message.content == reference(prompt, 6)
    status, counted = server.raw("/tokenize", json.dumps({"messages": messages, **on}).encode())
    assert status == 200 and json.loads(counted)["count"] == answer.usage.prompt_tokens


def test_what_clients_write_in_other_words_is_the_same(server: Any) -> None:
    ask = server.client().chat.completions.create
    messages: list[Any] = [{"role": "system", "content": "Be"}, {"role": "user", "content": "The cat"}]
    plain = ask(model="tiny", messages=messages, max_tokens=8, temperature=0)
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]
    other = ask(
        model="tiny", messages=[{**messages[0], "role": "developer"}, {"role": "user", "content": parts}],
        max_completion_tokens=8, temperature=2, tools=[], tool_choice="none", metadata={"a": "b"}, store=False,
        response_format={"type": "text"}, extra_body={"top_k": 1, "min_p": 0.0, "repetition_penalty": 1.0},
    )  # fmt: skip
    assert other.choices == plain.choices
    # nothing is said of a length: as far as there is room
    whole = ask(model="tiny", messages=messages, temperature=0)
    assert whole.usage.completion_tokens == LIMITS.new_tokens or whole.choices[0].finish_reason == "stop"
    brief = ask(
        model="tiny", messages=messages, max_tokens=8, extra_body={"chat_template_kwargs": {"brief": True}},
    )  # fmt: skip
    assert brief.usage.prompt_tokens > plain.usage.prompt_tokens


def test_bytes_of_tokens_are_theirs_or_none(server: Any) -> None:
    messages: list[Any] = [{"role": "user", "content": "The cat"}]
    answer = server.client().chat.completions.create(
        model="tiny", messages=messages, max_tokens=40, temperature=0, logprobs=True
    )
    found = answer.choices[0].logprobs.content
    assert {entry.bytes is None for entry in found} == {True, False}
    for entry in found:
        assert (entry.bytes is None) == ("\ufffd" in entry.token)
        assert entry.bytes is None or bytes(entry.bytes).decode() == entry.token


def test_a_prompt_that_begins_like_another_is_read_from_there(server: Any, reference: Any) -> None:
    native = server.server.scheduler._groups[0].rows.kind == "native"
    messages = [{"role": "user", "content": "The cat sat"}]
    ask = {"model": "tiny", "max_tokens": 6, "temperature": 0}
    first = server.client().chat.completions.create(messages=messages, **ask)
    before = server.metric("reused_prompt_tokens_total")
    # as the client gives it, whatever fields it has
    messages += [first.choices[0].message, {"role": "user", "content": "And"}]
    second = server.client().chat.completions.create(messages=messages, **ask)
    text = f"user: {messages[0]['content']}\nassistant: {first.choices[0].message.content}\nuser: And\nassistant:"
    assert second.choices[0].message.content == reference(text, 6)
    held = second.usage.prompt_tokens_details.cached_tokens
    assert held < second.usage.prompt_tokens
    assert (held >= first.usage.prompt_tokens - 1) if native else held == 0
    assert server.metric("reused_prompt_tokens_total") - before == held
    # answers of one prompt read it once
    several = server.client().chat.completions.create(messages=messages, n=3, **ask)
    assert {choice.message.content for choice in several.choices} == {second.choices[0].message.content}
    assert several.usage.prompt_tokens == second.usage.prompt_tokens
    assert several.usage.prompt_tokens_details.cached_tokens == (second.usage.prompt_tokens - 1 if native else 0)


@pytest.mark.parametrize("family", ["falcon_mamba", "mamba2"])
def test_a_turn_goes_on_from_a_state(family: str, tiny: Any, tiny_tokenizer: Any, start_server: Any) -> None:
    from llmcompress.inference.native import decline
    from llmcompress.models.registry import layout_from_config
    from llmcompress.nn.mixers import attach
    from llmcompress.serving.served import serve_model

    sizes = {"state_size": 16, "time_step_rank": 16} if family == "falcon_mamba" else {"state_size": 32}
    model = tiny.model(family, vocab_size=len(tiny_tokenizer), max_position_embeddings=1024, **sizes)
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 4, "codec": "dsq"})
    if (reason := decline(model)) is not None:
        pytest.skip(reason)
    limits = replace(LIMITS, prompt_tokens=600, cache_tokens=2000, body_bytes=1 << 16)
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = TEMPLATE
    answers = []
    for prefixes in (True, False):
        bounds = replace(limits, prefix_caching=prefixes)
        served = serve_model(model, tokenizer, "tiny", bounds)
        assert served.batches[0].kind == "native"
        running, messages, reused = start_server(served, bounds, KEY), [], []
        try:
            for question in ("The cat sat on the mat and " * 12, "And then? " * 9, "Why?"):
                messages.append({"role": "user", "content": question})
                ask = {"model": "tiny", "max_tokens": 12, "temperature": 0, "messages": messages}
                answer = running.client().chat.completions.create(**ask)
                messages.append({"role": "assistant", "content": answer.choices[0].message.content})
                reused.append(answer.usage.prompt_tokens_details.cached_tokens)
                assert answer.usage.prompt_tokens > 64
            assert running.metric("reused_prompt_tokens_total") == sum(reused)
        finally:
            running.stop()
        assert reused[0] == 0
        assert all(count > 0 and count % 64 == 0 for count in reused[1:]) if prefixes else sum(reused) == 0
        answers.append(messages)
    assert answers[0] == answers[1]


GOOD = {"model": "tiny", "prompt": "The", "max_tokens": 2}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "x"}]}
BAD = [
    ("/v1/completions", b"{not json", 400, "not valid JSON"),
    ("/v1/completions", b"[1]", 400, "JSON object"),
    ("/v1/completions", {"model": "tiny"}, 400, "prompt: Field required"),
    ("/v1/completions", {**GOOD, "model": "nobody"}, 404, "does not exist"),
    ("/v1/completions", {**GOOD, "prompt": ""}, 400, "no tokens"),
    ("/v1/completions", {**GOOD, "prompt": []}, 400, "prompt"),
    ("/v1/completions", {**GOOD, "prompt": "\ud83d"}, 400, "surrogates"),
    ("/v1/completions", b'{"model": "tiny", "prompt": "\xed\xa0\xbd"}', 400, "not valid JSON"),
    ("/v1/completions", {**GOOD, "prompt": [[99999]]}, 400, "token ids are 0 to"),
    ("/v1/completions", {**GOOD, "prompt": "x " * 300}, 400, "at most 64"),
    ("/v1/completions", {**GOOD, "max_tokens": 65}, 400, "at most 64"),
    ("/v1/completions", {**GOOD, "prompt": [60] * 64, "max_tokens": 64, "n": 9}, 400, "at most 8"),
    ("/v1/completions", {**GOOD, "temperature": -1}, 400, "temperature"),
    ("/v1/completions", {**GOOD, "stop": ["a"] * 65}, 400, "stop: at most 64"),
    ("/v1/completions", {**GOOD, "frobnicate": 1}, 400, "unrecognized request argument supplied: frobnicate"),
    ("/v1/completions", {**GOOD, "presence_penalty": 2.5}, 400, "presence_penalty"),
    ("/v1/completions", {**GOOD, "logit_bias": {"5000": -100}}, 400, "logit_bias: token ids are 0 to"),
    ("/v1/completions", {**GOOD, "repetition_penalty": 0}, 400, "repetition_penalty"),
    ("/v1/completions", b'{"model": "tiny", "prompt": "x", "temperature": NaN}', 400, "temperature"),
    ("/tokenize", {}, 400, "give one of prompt and messages"),
    ("/tokenize", {"prompt": "x", "model": "nobody"}, 404, "does not exist"),
    ("/tokenize", {**CHAT, "chat_template_kwargs": {"tools": 1}}, 400, "tools cannot be set"),
    ("/detokenize", {"tokens": [99999]}, 400, "token ids are 0 to"),
    ("/v1/completions", {**GOOD, "min_p": 1.5}, 400, "min_p"),
    ("/v1/completions", {**GOOD, "best_of": 2}, 400, "best_of: not supported, unless it is n"),
    ("/v1/completions", {**GOOD, "prompt": [[1], "a"]}, 400, "prompt: a text, token ids, a list of texts"),
    ("/v1/completions", {**GOOD, "max_tokens": 0}, 400, "max_tokens: 0, which only goes with echo"),
    ("/v1/chat/completions", {**CHAT, "continue_final_message": True}, 400, "only with add_generation_prompt false"),
    ("/v1/completions", {**GOOD, "stream_options": {"include_usage": True}}, 400, "only with stream"),
    ("/v1/completions", {**GOOD, "user": "u" * 5000}, 413, "4096 bytes"),
    ("/v1/chat/completions", {**CHAT, "echo": True}, 400, "echo: True is not supported"),
    ("/v1/chat/completions", {**CHAT, "tools": [{"type": "function"}]}, 400, "tools.0.function: Field required"),
    (
        "/v1/chat/completions",
        {**CHAT, "tools": [{"type": "function", "function": {"name": "f"}}]},
        400,
        "tools: the chat template of tiny has none",
    ),
    ("/v1/chat/completions", {**CHAT, "tool_choice": "required"}, 400, "there are no tools"),
    ("/v1/chat/completions", {**CHAT, "response_format": {"type": "xml"}}, 400, "'json_object', 'json_schema'"),
    ("/v1/chat/completions", {**CHAT, "chat_template_kwargs": {"tokenize": True}}, 400, "tokenize cannot be set"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "assistant", "content": None}]}, 400, "needs content"),
    (
        "/v1/chat/completions",
        {**CHAT, "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "parts of type 'image_url' are not supported",
    ),
    ("/v1/chat/completions", {**CHAT, "messages": []}, 400, "messages"),
    ("/v1/chat/completions", {**CHAT, "messages": [{"role": "robot", "content": "x"}]}, 400, "role"),
    (
        "/v1/chat/completions",
        {**CHAT, "messages": [*CHAT["messages"], {"role": "system", "content": "x"}]},
        400,
        "late",
    ),
    ("/v1/nothing", {}, 404, "/v1/nothing"),
    ("/healthz", {}, 405, "/healthz"),
]


@pytest.mark.parametrize(("path", "body", "status", "words"), BAD)
def test_bad_requests_get_their_status_and_openais_shape(
    server: Any, path: str, body: Any, status: int, words: str
) -> None:
    got, answer = server.raw(path, body if isinstance(body, bytes) else json.dumps(body).encode())
    assert got == status, answer
    assert words in answer["error"]["message"]
    assert set(answer["error"]) == {"message", "type", "param", "code"}


def test_the_key_is_asked_for(server: Any) -> None:
    assert server.raw("/v1/models", key=None)[0] == server.raw("/metrics", key=None)[0] == 401
    assert server.raw("/healthz", key=None)[0] == server.raw("/health", key=None)[0] == 200
    with pytest.raises(openai.AuthenticationError, match="incorrect API key"):
        server.client("another-key").models.list()


def test_bounds_of_the_command_line_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    from llmcompress.cli import serve
    from llmcompress.cli.app import invoke
    from llmcompress.errors import InputError

    seen = []

    def opened(path: str, name: str | None, dtype: str, device: str, limits: Limits, native: bool) -> Any:
        seen.append(limits)
        raise InputError("seen", "nothing to do")

    monkeypatch.setattr(serve, "open_served", opened)
    options = {
        "max_sequences": "rows", "max_waiting": "queue", "max_prompt_tokens": "prompt_tokens",
        "max_new_tokens": "new_tokens", "max_body_bytes": "body_bytes", "max_connections": "connections",
    }  # fmt: skip
    options |= {
        name: name
        for name in ("cache_tokens", "prompt_chunk", "snapshot_bytes", "read_seconds", "write_seconds", "drain_seconds")
    }
    words = [word for n, key in enumerate(options, 2) for word in (f"--{key.replace('_', '-')}", str(n))]
    assert invoke(["serve", "model", "--port", "0", *words]) == 4
    assert [getattr(seen[0], name) for name in options.values()] == list(range(2, 2 + len(options)))


def test_a_body_without_a_length_is_counted(server: Any) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as sent:
        sent.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n"
            b"Authorization: Bearer " + KEY.encode() + b"\r\n\r\n"
        )
        sent.sendall(b"1000\r\n" + b"x" * 4096 + b"\r\n" + b"1000\r\n" + b"x" * 4096 + b"\r\n")
        assert b"413" in sent.recv(4096).split(b"\r\n")[0]


@pytest.fixture
def gate(server: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Every step of the server's batch waits until this is set."""
    opened = threading.Event()
    monkeypatch.setattr(server.server.metrics, "step", lambda rows, seconds: opened.wait(PATIENCE))
    yield opened
    opened.set()


def test_a_client_that_vanishes_frees_its_place(
    server: Any, gate: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheduler, left = server.server.scheduler, threading.Event()
    cancel = scheduler.cancel
    monkeypatch.setattr(scheduler, "cancel", lambda jobs: (cancel(jobs), left.set()))
    body = json.dumps({**GOOD, "max_tokens": 60, "n": 6, "stream": True}).encode()
    fields = f"Host: x\r\nAuthorization: Bearer {KEY}\r\nContent-Length: {len(body)}"
    head = f"POST /v1/completions HTTP/1.1\r\n{fields}\r\n\r\n"
    before = server.metric("generated_tokens_total")
    with socket.create_connection(("127.0.0.1", server.port)) as gone:
        gone.sendall(head.encode() + body)
        gone.recv(1)
        assert server.comes(lambda: server.metric("generated_tokens_total") > before)
    # its first step has not ended when it goes
    assert left.wait(PATIENCE)
    gate.set()
    assert server.idle()
    assert server.metric("generated_tokens_total") - before < 6 * 30
    whole = server.raw("/v1/completions", json.dumps(GOOD).encode())
    assert whole[0] == 200


def test_a_full_queue_is_said_so(server: Any, gate: threading.Event) -> None:
    statuses: list[int] = []
    together = threading.Barrier(24)

    def ask() -> None:
        body = {**GOOD, "max_tokens": 60, "n": 6, "temperature": 1.0}
        together.wait()
        statuses.append(server.raw("/v1/completions", json.dumps(body).encode())[0])

    threads = [threading.Thread(target=ask) for _ in range(together.parties)]
    for thread in threads:
        thread.start()
    # nothing ends before somebody was refused
    assert server.comes(lambda: statuses)
    gate.set()
    for thread in threads:
        thread.join()
    assert set(statuses) <= {200, 429}
    assert 429 in statuses
    assert 200 in statuses
    assert server.idle()


def test_metrics_count(server: Any) -> None:
    before = server.metric("prompt_tokens_total")
    server.client().completions.create(model="tiny", prompt=[60, 61], max_tokens=2)
    assert server.metric("prompt_tokens_total") == before + 2
    assert server.comes(lambda: server.metric('requests_total{endpoint="/v1/completions",status="200"}') > 0)


def test_sigterm_finishes_what_runs(folder: Path) -> None:
    command = [sys.executable, "-m", "llmcompress", "serve", str(folder), "--port", "0", "--json", "--name", "t"]
    environment = {**os.environ, "LLMCOMPRESS_API_KEY": KEY}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        lines = []
        while not lines or lines[-1] != "}":
            lines.append(process.stdout.readline().rstrip("\n"))
            assert lines[-1] or process.poll() is None
        told = json.loads("\n".join(lines))
        assert told["models"] == ["t"]
        (batch,) = told["batches"]
        assert batch["models"] == ["t"] and 0 < batch["together"] <= batch["sequences"] * batch["tokens"]
        # two layers of two heads of 8, keys and values in float32
        assert batch["cache_bytes"] >= batch["together"] * 2 * 2 * 8 * 2 * 4
        client = openai.OpenAI(base_url=told["url"], api_key=KEY, max_retries=0)
        stream = client.completions.create(model="t", prompt="The", max_tokens=100, temperature=0, stream=True)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        rest = list(stream)
        assert rest[-1].choices[0].finish_reason in ("length", "stop")
        assert process.wait(PATIENCE) == 0
        with pytest.raises(openai.APIConnectionError):
            client.models.list()


def test_several_models_share_a_server(
    folder: Path, reference: Any, tiny: Any, tiny_tokenizer: Any, start_server: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """Also what is logged of requests."""
    import logging

    from llmcompress.errors import InputError
    from llmcompress.hf import load
    from llmcompress.serving.served import serve_model, together

    model, tokenizer = load(folder)
    assert tokenizer is not None
    other = tiny.model("mixtral", vocab_size=len(tiny_tokenizer))
    parts = [
        serve_model(model, tokenizer, "tiny", LIMITS),
        serve_model(other, tiny_tokenizer, "mixture", LIMITS, native=False),
    ]
    with pytest.raises(InputError, match="two models are named tiny"):
        together([*parts, serve_model(model, tokenizer, "tiny", LIMITS)])
    running = start_server(together(parts), LIMITS, KEY)
    try:
        client = running.client()
        assert [entry.id for entry in client.models.list()] == ["tiny", "mixture"]
        texts: dict[str, str] = {}

        def ask(name: str) -> None:
            answer = client.completions.create(model=name, prompt="The cat", max_tokens=12, temperature=0)
            texts[name] = answer.choices[0].text

        with caplog.at_level(logging.INFO, "llmcompress.access"):
            threads = [threading.Thread(target=ask, args=(name,)) for name in ("tiny", "mixture")]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(PATIENCE)
            running.raw("/no%0Asuch")
            # a request is logged after its answer is sent: the list of models may come in here too
            wanted = ["GET other 404", *["POST /v1/completions 200"] * 2]

            def said() -> list[str]:
                lines = [record.getMessage() for record in caplog.records if record.name == "llmcompress.access"]
                return sorted(line.rsplit(" ", 2)[0] for line in lines if "/v1/models" not in line)

            assert running.comes(lambda: said() == wanted), said()
        assert texts["tiny"] == reference("The cat", 12) != texts["mixture"]
    finally:
        running.stop()


def test_members_have_settings_of_their_own(family_run: Path, tmp_path: Path) -> None:
    import torch

    from llmcompress.errors import InputError
    from llmcompress.hf import load
    from llmcompress.inference.generate import Recommended
    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.serving.served import serve_family

    folder = tmp_path / "artifact"
    shutil.copytree(family_run / "run" / "artifact", folder)
    settings = folder / "members" / "bee" / "generation_config.json"
    settings.write_text(json.dumps({"do_sample": True, "temperature": 0.3, "top_k": 5, "eos_token_id": [2, 7]}))
    served = serve_family(FamilyArtifact(folder), LIMITS, torch.float32, "cpu")
    bee, ant = served.models["bee"], served.models["ant"]
    assert (bee.sampling, ant.sampling) == (Recommended(0.3, None, 5), Recommended())
    # what ends a turn of one member is a token like any other of another
    assert bee.stop - ant.stop == {7}
    alone = {name: load(folder, member=name)[0].generation_config for name in ("bee", "ant")}
    assert alone["bee"].temperature == 0.3 != alone["ant"].temperature
    settings.write_text("{")
    with pytest.raises(InputError, match=r"bee/generation_config\.json: cannot be read"):
        serve_family(FamilyArtifact(folder), LIMITS, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("arguments", "environment", "words"),
    [
        (["--host", "0.0.0.0"], {}, "needs an API key"),
        (["--host", "0.0.0.0"], {"LLMCOMPRESS_API_KEY": "short"}, "at least 8"),
        (["--host", "999.1.1.1"], {"LLMCOMPRESS_API_KEY": KEY}, "999.1.1.1:8000"),
        (["--engine", "warp"], {}, "--engine warp"),
        (["--reasoning-parser", "warp"], {}, "--reasoning-parser warp"),
        (["--allow-origin", "http://localhost:3000/"], {}, "--allow-origin http://localhost:3000/"),
        (["another", "--name", "both"], {}, "--name: for one model only"),
    ],
)
def test_wrong_calls_end_with_one_line(
    folder: Path, arguments: list[str], environment: dict[str, str], words: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from llmcompress.cli.app import invoke

    monkeypatch.delenv("LLMCOMPRESS_API_KEY", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert invoke(["serve", str(folder), *arguments]) in (2, 4)
    assert words in capsys.readouterr().err
