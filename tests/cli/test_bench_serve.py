"""``bench serve`` at the command line, against a server of a few lines."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli.app import invoke


class Answers(BaseHTTPRequestHandler):
    """Two tokens for each request, or what ``refuses`` says."""

    asked: list[tuple[str, Any]]
    models: tuple[str, ...]
    refuses: str | None

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        self._send(200, json.dumps({"data": [{"id": name} for name in self.models]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append((self.path, body))
        if self.refuses is not None and self.refuses in body:
            self._send(
                400, json.dumps({"error": {"message": f"unrecognized request argument supplied: {self.refuses}"}})
            )
            return
        pieces: list[dict[str, Any]] = [
            {"choices": [{"text": "a", "delta": {"content": "a"}, "finish_reason": None}]},
            {"choices": [{"text": "b", "delta": {"content": "b"}, "finish_reason": "length"}]},
            {"choices": [], "usage": {"prompt_tokens": 5, "completion_tokens": 2}},
        ]
        self._send(200, "".join(f"data: {json.dumps(piece)}\n\n" for piece in pieces) + "data: [DONE]\n\n")

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())


@pytest.fixture
def server() -> Iterator[tuple[str, type[Answers]]]:
    kind = type("Own", (Answers,), {"asked": [], "models": ("tiny",), "refuses": None})
    with ThreadingHTTPServer(("127.0.0.1", 0), kind) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}/v1", kind
        running.shutdown()
        thread.join()


def told(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    assert invoke(["bench", "serve", *words, "--json", "--quiet"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_random_prompts(server: tuple[str, type[Answers]], capsys: pytest.CaptureFixture[str]) -> None:
    url, kind = server
    words = [url, "-n", "6", "--input-tokens", "9", "--output-tokens", "3", "--vocabulary", "20"]
    found = told(capsys, *words, "--goodput", "e2el:100000", "--percentile", "75", "--rate", "500")
    assert found["concurrency"] == 6 and found["model"] == "tiny" and found["requests"] == 6 and found["failed"] == 0
    assert found["completion_tokens"] == 12 and found["prompt_tokens"] == 30
    assert set(found["ttft_ms"]) == {"mean", "p75", "max"} and 0 < found["ttft_ms"]["p75"] <= found["e2el_ms"]["max"]
    assert found["good_requests_per_second"] == pytest.approx(found["requests_per_second"])
    # one to warm up, whose prompt is no other's
    assert len(kind.asked) == 7 and {path for path, _ in kind.asked} == {"/v1/completions"}
    for _, body in kind.asked:
        assert len(body["prompt"]) == 9 and all(3 <= token < 20 for token in body["prompt"])
        assert body["max_tokens"] == 3 and body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    first = [body["prompt"] for _, body in kind.asked]
    assert len({tuple(prompt) for prompt in first}) == 7
    kind.asked.clear()
    assert told(capsys, *words, "--warmup", "0")["concurrency"] == 8
    assert sorted(first[1:]) == sorted(body["prompt"] for _, body in kind.asked)


def test_prompts_of_a_file(
    server: tuple[str, type[Answers]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    url, kind = server
    lines = tmp_path / "some.jsonl"
    lines.write_text('{"prompt": "one", "max_tokens": 2}\n\n{"messages": [{"role": "user", "content": "two"}]}\n')
    told(capsys, url, "--prompts", str(lines), "--chat", "-n", "4", "-c", "1", "--warmup", "0", "--no-ignore-eos")
    assert [body["messages"][0]["content"] for _, body in kind.asked] == ["one", "two", "one", "two"]
    assert [body["max_tokens"] for _, body in kind.asked] == [2, 64, 2, 64]
    assert all(path == "/v1/chat/completions" and "ignore_eos" not in body for path, body in kind.asked)
    assert invoke(["bench", "serve", url, "--prompts", str(lines)]) == 4
    assert f"{lines}:3: messages are for chats" in capsys.readouterr().err
    # JSON's strings may hold what else ends lines
    lines.write_text('{"prompt": "a\u2028b\x85"}\n', encoding="utf-8")
    kind.asked.clear()
    told(capsys, url, "--prompts", str(lines), "-n", "1", "--warmup", "0")
    assert kind.asked[0][1]["prompt"] == "a\u2028b\x85"
    lines.write_text('{"prompt": 3}\n')
    assert invoke(["bench", "serve", url, "--prompts", str(lines)]) == 4
    assert f"{lines}:1: no prompt" in capsys.readouterr().err
    text = tmp_path / "some.txt"
    text.write_text("Once upon\n")
    kind.asked.clear()
    told(capsys, url, "--prompts", str(text), "-n", "1", "--warmup", "0")
    assert kind.asked[0][1]["prompt"] == "Once upon"


def test_people_get_a_table(server: tuple[str, type[Answers]], capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["bench", "serve", server[0], "-n", "3", "-c", "1"]) == 0
    shown = capsys.readouterr().out
    assert "first text (TTFT)" in shown and "6 tokens written" in shown and "3 requests in" in shown


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--rate", "0"], 2, "must be above 0"),
        (["--rate", "nan"], 2, "must be above 0"),
        (["--chat"], 2, "random token ids are no chat"),
        (["--goodput", "itl:5"], 2, "--goodput itl:5: not a bound"),
        (["--goodput", "ttft:fast"], 2, "like --goodput ttft:500"),
        (["--prompts", "/nowhere/x.txt"], 4, "/nowhere/x.txt"),
    ],
)
def test_bad_words(
    server: tuple[str, type[Answers]], capsys: pytest.CaptureFixture[str], words: list[str], code: int, said: str
) -> None:
    assert invoke(["bench", "serve", server[0], *words]) == code
    assert said in capsys.readouterr().err


def test_servers_that_do_not_answer(server: tuple[str, type[Answers]], capsys: pytest.CaptureFixture[str]) -> None:
    url, kind = server
    kind.refuses = "ignore_eos"
    assert invoke(["bench", "serve", url, "-n", "2"]) == 4
    shown = capsys.readouterr().err
    assert "2 times: status 400: unrecognized request argument supplied: ignore_eos" in shown
    assert "--no-ignore-eos" in shown
    kind.models = ("a", "b")
    assert invoke(["bench", "serve", url]) == 2
    assert "serves a, b" in capsys.readouterr().err
    assert invoke(["bench", "serve", "http://127.0.0.1:1/v1"]) == 4
    assert "start the server first" in capsys.readouterr().err


def test_a_server_that_is_silent(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/v1"
        assert invoke(["bench", "serve", url, "--timeout", "1"]) == 4
    assert f"{url}: no list of models within 1 s" in capsys.readouterr().err
