"""The endpoint verifier against a server of our own on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace
from typing import ClassVar

import pytest

from llmcompress.data import verifiers
from llmcompress.data.actions import CORRECT, INCORRECT
from llmcompress.data.problems.base import Problem
from llmcompress.data.verifiers import Endpoint, EndpointVerifier, Program
from llmcompress.errors import EnvironmentProblem, InputError

PROBLEM = Problem("q", "What is 2 + 2?", "4")


@pytest.fixture
def server():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        reply = "2 + 2 is \\boxed{4}. Therefore, the answer is correct."
        # what the next requests meet instead of it: a status, or a body that is longer in its header
        troubles: ClassVar[list[int | str]] = []

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append({**body, "path": self.path, "key": self.headers["Authorization"]})
            trouble = Handler.troubles.pop(0) if Handler.troubles else None
            if isinstance(trouble, int):
                self.send_error(trouble)
                return
            if trouble == "cut off":
                self.send_response(200)
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"choices": [')
                return
            body = json.dumps({"choices": [{"message": {"content": Handler.reply}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}/v1", asked, Handler
    httpd.shutdown()
    httpd.server_close()


def verifier(url, cache, **more):
    return Endpoint(EndpointVerifier(kind="openai", url=url, model="m", **more), cache)


@pytest.mark.parametrize("compact", [True, False])
def test_a_program_concludes_what_its_own_check_says(compact):
    """Where that check can err, the verification errs with it, and the caller drops it."""

    class Fallible(SimpleNamespace):
        def check(self, problem, answer):
            return True

        def check_steps(self, problem, answer):
            return f"{answer} was put back."

        def accepts(self, problem, answer):
            return answer == "5"

    program = Program(Fallible(compact=compact))
    for answer, said in (("4", INCORRECT), ("5", CORRECT)):
        assert program.write(PROBLEM, answer) == f"{answer} was put back.{'' if compact else ' '}{said}"


def test_each_answer_is_asked_once_even_after_a_restart(server, tmp_path):
    url, asked, _ = server
    cache = tmp_path / "v.jsonl"
    first = verifier(url, cache).write(PROBLEM, "4")
    assert first == "2 + 2 is 4. Therefore, the answer is correct."
    # a line cut off by a kill is asked again, whole ones are not
    cache.write_text(cache.read_text() + '{"key": "half')
    assert verifier(url, cache).write(PROBLEM, "4") == first
    assert len(asked) == 1
    # nor does what is left of it spoil the next one
    verifier(url, cache).write(PROBLEM, "5")
    for answer in ("4", "5"):
        verifier(url, cache).write(PROBLEM, answer)
    assert len(asked) == 2
    prompt = asked[0]["messages"][0]["content"]
    assert "What is 2 + 2?" in prompt
    assert "Proposed answer: 4" in prompt


def test_the_endpoint_is_asked_as_the_recipe_says(server, tmp_path, monkeypatch):
    url, asked, _ = server
    monkeypatch.setenv("MY_KEY", "secret")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    verifier(f"{url}/", tmp_path / "a.jsonl", key_variable="MY_KEY", temperature=0.7, max_tokens=99).write(PROBLEM, "4")
    verifier(url, tmp_path / "b.jsonl").write(PROBLEM, "4")
    assert [(a["path"], a["key"]) for a in asked] == [("/v1/chat/completions", k) for k in ("Bearer secret", None)]
    assert [(a["model"], a["temperature"], a["max_tokens"]) for a in asked] == [("m", 0.7, 99), ("m", 0.1, 512)]


@pytest.mark.parametrize(
    "reply",
    [
        "I do not know.",
        "Therefore, the answer cannot be verified.",
        None,
        # in a training row it would begin another attempt there
        "It is 5, so no. Let me try again. It is 4. Therefore, the answer is correct.",
    ],
)
def test_no_verdict_is_no_verification(server, tmp_path, reply):
    url, _, handler = server
    handler.reply = reply
    assert verifier(url, tmp_path / "v.jsonl").write(PROBLEM, "4") is None


def test_solving_again_is_dropped_unless_allowed(server, tmp_path):
    url, _, handler = server
    handler.reply = "Step 1: add. Therefore, the answer is correct."
    assert verifier(url, tmp_path / "v.jsonl").write(PROBLEM, "4") is None
    assert verifier(url, tmp_path / "v.jsonl", confirmative_only=False).write(PROBLEM, "4") is not None


def test_one_process_asks_once_too(server, tmp_path):
    url, asked, _ = server
    one = verifier(url, tmp_path / "v.jsonl")
    for answer in ("4", "5", "4", "5"):
        assert one.write(PROBLEM, answer) is not None
    assert len(asked) == 2


def test_a_silent_endpoint_is_an_environment_problem(tmp_path, monkeypatch):
    # nobody listens there, and asking again would only take time
    monkeypatch.setattr(verifiers, "time", SimpleNamespace(sleep=lambda _: pytest.fail("asked again")))
    with pytest.raises(EnvironmentProblem, match="no usable answer"):
        verifier("http://127.0.0.1:9/v1", tmp_path / "v.jsonl", timeout=2).write(PROBLEM, "4")
    with pytest.raises(InputError, match="not an http address"):
        verifier("file:///etc", tmp_path / "v.jsonl").write(PROBLEM, "4")


@pytest.mark.parametrize("trouble", [429, 503, "cut off"])
def test_a_busy_endpoint_is_asked_again(server, tmp_path, monkeypatch, trouble):
    url, asked, handler = server
    monkeypatch.setattr(verifiers, "PAUSES", (0.0, 0.0))
    handler.troubles = [trouble, trouble]
    assert verifier(url, tmp_path / "v.jsonl").write(PROBLEM, "4") is not None
    assert len(asked) == 3
    handler.troubles = [trouble] * 3
    with pytest.raises(EnvironmentProblem, match="no usable answer"):
        verifier(url, tmp_path / "v.jsonl").write(PROBLEM, "5")


def test_an_endpoint_that_refuses_is_not_asked_again(server, tmp_path):
    url, asked, handler = server
    handler.troubles = [401]
    with pytest.raises(EnvironmentProblem, match="401"):
        verifier(url, tmp_path / "v.jsonl").write(PROBLEM, "4")
    assert len(asked) == 1
