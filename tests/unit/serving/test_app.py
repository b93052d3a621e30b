"""The application without a socket: readers that have gone when an answer begins, what nobody foresaw."""

from __future__ import annotations

import asyncio
import copy
import json
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import pytest

pytest.importorskip("starlette")
pytest.importorskip("prometheus_client")

from llmcompress.inference.generate import Recommended
from llmcompress.inference.grammar import Grammars
from llmcompress.serving import app
from llmcompress.serving.app import Service, application
from llmcompress.serving.conversation import worded
from llmcompress.serving.letters import Letters
from llmcompress.serving.limits import Limits
from llmcompress.serving.metrics import Metrics
from llmcompress.serving.scheduler import Job, Piece
from llmcompress.serving.served import ServedModel


class Waiting:
    """A scheduler whose answers never begin."""

    draining, alive = False, True

    def __init__(self) -> None:
        self.jobs: list[Job] = []

    def room(self, model: str) -> int:
        return 100

    def submit(self, jobs: Sequence[Job]) -> None:
        self.jobs += jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.cancelled = True


def ask(
    words: Any, scheduler: Any, body: dict[str, Any], sent: list[Any], sending: float = 0.0, patience: float = 0.0,
    path: str = "/v1/completions", made: Recommended | None = None,
) -> None:  # fmt: skip
    """Ask as a reader who takes so many seconds for each message and goes after others."""
    limits, metrics = Limits(), Metrics()
    model = ServedModel("m", words, frozenset({2}), None, 300, made or Recommended())
    app = application(Service({"m": model}, scheduler, limits, metrics), None)
    arriving = [{"type": "http.request", "body": json.dumps(body).encode()}]

    async def receive() -> Any:
        if arriving:
            return arriving.pop()
        await asyncio.sleep(patience)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(sending)
        sent.append(message)

    scope: Any = {"type": "http", "method": "POST", "path": path, "headers": [], "query_string": b""}
    asyncio.run(app(scope, receive, send))


@pytest.mark.parametrize(("sending", "patience"), [(0.2, 0.02), (0.0, 0.2)])
@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_before_the_first_byte_or_later_frees_all_places(
    tiny_tokenizer: Any, stream: bool, sending: float, patience: float
) -> None:
    scheduler = Waiting()
    body = {"model": "m", "prompt": "The", "n": 3, "stream": stream, "max_tokens": 40}
    ask(tiny_tokenizer, scheduler, body, [], sending, patience)
    assert [job.cancelled for job in scheduler.jobs] == [True] * 3


@pytest.mark.parametrize(
    ("asked", "stop"), [({}, {2}), ({"stop_token_ids": [7]}, {2, 7}), ({"ignore_eos": True}, set()),
                        ({"ignore_eos": True, "stop_token_ids": [7, 8]}, {7, 8})],
)  # fmt: skip
def test_which_tokens_end_an_answer(tiny_tokenizer: Any, asked: dict[str, Any], stop: set[int]) -> None:
    scheduler = Waiting()
    ask(tiny_tokenizer, scheduler, {"model": "m", "prompt": "The", **asked}, [])
    assert scheduler.jobs[0].stop == stop


@pytest.mark.parametrize(("asked", "made", "wanted"), [(None, None, None), (None, 9, 9), (30, 9, 30)])
def test_a_chat_is_as_long_as_asked_or_as_the_model_says(
    tiny_tokenizer: Any, asked: int | None, made: int | None, wanted: int | None
) -> None:
    words, scheduler = copy.deepcopy(tiny_tokenizer), Waiting()
    words.chat_template = "{{ messages[0].content }}"
    prompt = words.decode(range(10, 50))
    room = 100 - len(words(prompt, add_special_tokens=False)["input_ids"])
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": asked}
    ask(words, scheduler, body, [], path="/v1/chat/completions", made=Recommended(max_new_tokens=made))
    assert [job.how.max_new_tokens for job in scheduler.jobs] == [wanted or room]


@pytest.mark.parametrize("template", ["{{ 'at ' + value }}", "{{ 'at ' }}{{ value | tojson }}"])
def test_arguments_of_earlier_calls_are_as_a_template_takes_them(tiny_tokenizer: Any, template: str) -> None:
    words, scheduler = copy.deepcopy(tiny_tokenizer), Waiting()
    words.chat_template = template.replace("value", "messages[0].tool_calls[0].function.arguments")
    call = {"type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    body = {"messages": [{"role": "assistant", "tool_calls": [call]}]}
    ask(words, scheduler, body, [], path="/v1/chat/completions")
    assert [words.decode(job.prompt) for job in scheduler.jobs] == [words.decode(words('at {"a": 1}')["input_ids"])]


def test_arguments_as_text_keep_their_letters() -> None:
    message = {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": {"city": "Zürich"}}}]}
    assert worded(message)["tool_calls"][0]["function"]["arguments"] == '{"city": "Zürich"}'


def test_what_nobody_foresaw_is_an_error_in_openais_shape(tiny_tokenizer: Any) -> None:
    class Broken(Waiting):
        def submit(self, jobs: Sequence[Job]) -> None:
            raise ZeroDivisionError("inside")

    sent: list[Any] = []
    # goes on to the server's log
    with pytest.raises(ZeroDivisionError):
        ask(tiny_tokenizer, Broken(), {"model": "m", "prompt": "The"}, sent)
    assert sent[0]["status"] == 500
    error = json.loads(sent[1]["body"])["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "inside" not in error["message"]


@pytest.mark.parametrize(
    ("begun", "status", "words"), [(False, 503, "formats of others"), (True, 400, "longer than 20 seconds")]
)
def test_a_grammar_that_takes_too_long_is_told_from_one_that_others_hold_up(
    tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch, begun: bool, status: int, words: str
) -> None:
    pytest.importorskip("llguidance")
    future, left = Future[Any](), list[Future[Any]]()
    if begun:
        future.set_running_or_notify_cancel()
    monkeypatch.setattr(app, "COMPILE_SECONDS", 0.0)
    monkeypatch.setattr(Grammars, "name", lambda *_: "words")
    monkeypatch.setattr(Grammars, "compiled", lambda *_: future)
    monkeypatch.setattr(Grammars, "give_up", lambda _, future: left.append(future))
    sent: list[Any] = []
    ask(tiny_tokenizer, Waiting(), {"prompt": "x", "guided_regex": "a"}, sent)
    assert sent[0]["status"] == status and words in sent[1]["body"].decode() and left == [future]


def test_scripts_of_named_pages_may_read_answers_and_are_told_so_without_a_key(tiny_tokenizer: Any) -> None:
    from starlette.testclient import TestClient

    waiting: Any = Waiting()
    model = ServedModel("m", tiny_tokenizer, frozenset({2}), None, 300, Recommended())
    service = Service({"m": model}, waiting, Limits(), Metrics())
    page = {"Origin": "http://localhost:3000"}
    before = {**page, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    client = TestClient(application(service, "a-key-for-tests", ["http://localhost:3000"]))
    asked = client.options("/v1/chat/completions", headers=before)
    assert asked.status_code == 200 and "authorization" in asked.headers["access-control-allow-headers"]
    # an error too
    for answer in (asked, client.get("/v1/models", headers=page)):
        assert answer.headers["access-control-allow-origin"] == "http://localhost:3000"
    other = client.options("/v1/models", headers={**before, "Origin": "http://elsewhere"})
    assert "access-control-allow-origin" not in other.headers
    silent = TestClient(application(service, "a-key-for-tests"))
    assert "access-control-allow-origin" not in silent.get("/health", headers=page).headers


def test_the_list_of_models_may_end_in_a_slash(tiny_tokenizer: Any) -> None:
    from starlette.testclient import TestClient

    waiting: Any = Waiting()
    model = ServedModel("m", tiny_tokenizer, frozenset({2}), None, 300, Recommended())
    client = TestClient(application(Service({"m": model}, waiting, Limits(), Metrics()), None))
    assert [one["id"] for one in client.get("/v1/models/").json()["data"]] == ["m"]


def test_pieces_of_one_step_wake_the_loop_once_and_keep_their_order() -> None:
    async def read() -> list[tuple[int, Piece]]:
        loop, letters, pieces = asyncio.get_running_loop(), Letters(), asyncio.Queue[tuple[int, Piece]]()
        woken, wake = [], loop.call_soon_threadsafe

        def counted(*asked: Any) -> Any:
            woken.append(asked)
            return wake(*asked)

        loop.call_soon_threadsafe = counted  # type: ignore[method-assign]
        for index in range(3):
            letters.put(loop, pieces, index, Piece(str(index), 1))
        assert pieces.empty() and not woken
        letters.post()
        letters.post()
        assert len(woken) == 1
        return [await asyncio.wait_for(pieces.get(), 60) for _ in range(3)]

    assert [(index, piece.text) for index, piece in asyncio.run(read())] == [(0, "0"), (1, "1"), (2, "2")]


def test_a_reader_whose_loop_has_closed_is_gone() -> None:
    loop, letters = asyncio.new_event_loop(), Letters()
    letters.put(loop, asyncio.Queue(), 0, Piece("", 1))
    loop.close()
    letters.post()
    with pytest.raises(RuntimeError, match="closed"):
        letters.put(loop, asyncio.Queue(), 0, Piece("", 1))
