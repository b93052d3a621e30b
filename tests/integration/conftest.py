"""What integration tests share: a family of tiny models with its finished run, and a run of two processes of which one
is killed."""

from __future__ import annotations

import json
import subprocess
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from llmcompress.errors import ExitCode

# seconds for what takes milliseconds on a machine that does nothing else
PATIENCE = 120.0
MEMBERS = ("ant", "bee", "cat")
RECIPE = """
version: 1
name: family
model: {{path: {folder}/base}}
run: {{dir: {folder}/run, device: cpu, threads: 1}}
stages:
  load: {{type: load}}
  rqt:
    type: rqt
    members:
      ant: {{path: {folder}/ant}}
      bee: {{path: {folder}/bee}}
      cat: {{path: {folder}/cat}}
    calibration: {{samples: 6, length: 16, general: {{kind: inline, texts: {texts}}}}}
    bits: {{budget: 3.5}}
    group_size: 16
  evaluate_family:
    type: evaluate_family
    texts:
      ant: {{source: {{kind: inline, texts: {texts}}}, length: 16, max_tokens: 48}}
  export_family: {{type: export_family}}
"""


def _tiny_llama(vocabulary: int, spread: float = 1.0) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=48, max_position_embeddings=128, tie_word_embeddings=True, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, spread * parameter.shape[-1] ** -0.5)
    return model


class Running:
    """A server in a thread of this process, on a free port."""

    def __init__(self, served: Any, limits: Any, key: str | None = None) -> None:
        from llmcompress.serving.server import Server, bind

        self._key = key

        self.server = Server(served, limits, key)
        self._bound = bind("127.0.0.1", 0)
        self.port = self._bound.getsockname()[1]
        self._thread = threading.Thread(target=self.server.run, args=(self._bound,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self.port}"
        assert self.comes(lambda: self.server.started or not self._thread.is_alive()) and self.server.started

    @staticmethod
    def comes(wanted: Callable[[], object]) -> bool:
        """Wait until something holds; whether it came to that.

        What a server counts and logs of an answer it may count and log after the client has read it.
        """
        deadline = time.monotonic() + PATIENCE
        while not wanted():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def client(self, key: str | None = None) -> Any:
        """The openai client; without retries, so that a test sees every answer."""
        import openai

        key = key or self._key or "none"
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=PATIENCE)

    def raw(self, path: str, body: bytes | None = None, key: str | None = "") -> tuple[int, Any]:
        """Status and text, or error; the server's own key unless another or none is given."""
        key = self._key if key == "" else key
        request = urllib.request.Request(self.url + path, data=body, method="POST" if body is not None else "GET")
        if key is not None:
            request.add_header("Authorization", f"Bearer {key}")
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def metric(self, name: str) -> float:
        _, text = self.raw("/metrics")
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(f"llmcompress_{name}"))

    def idle(self) -> bool:
        """Whether it comes to hold nothing; the cache's gauge is set last."""
        gauges = ("running_sequences", "waiting_sequences", "reserved_tokens", "cache_bytes")
        return self.comes(lambda: all(self.metric(name) == 0 for name in gauges))

    def stop(self) -> None:
        self.server.shut()
        self._thread.join(PATIENCE)
        self._bound.close()
        assert not self._thread.is_alive()


@pytest.fixture(scope="session")
def start_server() -> type[Running]:
    """Starts a server in a thread of this process; its user stops it."""
    return Running


@pytest.fixture(scope="session")
def tiny_llama() -> Callable[..., Any]:
    """Makes a random Llama of two layers for a vocabulary; ``spread`` scales its weights."""
    return _tiny_llama


@pytest.fixture(scope="session")
def family_run(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes of it (random differences; two of them close), and a finished run."""
    root = tmp_path_factory.mktemp("family")
    model = _tiny_llama(len(tiny_tokenizer))
    original = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    near = {name: 0.05 * torch.randn_like(tensor) for name, tensor in original.items() if tensor.ndim > 1}
    for name in ("base", *MEMBERS):
        state = {key: tensor.clone() for key, tensor in original.items()}
        for key in near if name != "base" else ():
            apart = 0.03 * torch.randn_like(state[key])
            state[key] += apart + (near[key] if name != "cat" else 2 * apart)
        model.load_state_dict(state)
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    texts = json.dumps(["The cat sat on the warm stone and looked at the sea. " * 12])
    (root / "recipe.yaml").write_text(RECIPE.format(folder=root, texts=texts))
    from llmcompress.cli.app import invoke

    assert invoke(["run", str(root / "recipe.yaml"), "--quiet"]) == ExitCode.OK
    return root


def _kill_one_of_two(command: Sequence[str], ready: Callable[[], object]) -> str:
    """Start a run on two processes, kill one of them outright once it is ready; what the run said."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not ready():
        time.sleep(0.02)
    assert process.returncode is None, process.communicate()
    children = [child for child in psutil.Process(process.pid).children() if "llmcompress" in child.cmdline()]
    ranks = {child.environ()["RANK"]: child for child in children}
    assert sorted(ranks) == ["0", "1"]
    ranks["1"].kill()
    _, said = process.communicate()
    assert process.returncode == 4, said
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "process 1 of 2 was killed (SIGKILL)" in errors[0], said
    return said


@pytest.fixture(scope="session")
def kill_one_of_two() -> Callable[[Sequence[str], Callable[[], object]], str]:
    """Run on two processes of which one is killed; the run must end with one error that says so."""
    return _kill_one_of_two
