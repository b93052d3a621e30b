"""Who writes the verifications of a training set: a program that tests the answer, or a language model behind an
endpoint.

A verification shows the problem and the answer, not the solution, and is asked to test the answer without solving again
("confirmative", S2R section 2.2): solving again follows the same path and leans towards "correct". Whoever writes it, a
verification whose verdict differs from the truth is dropped by the caller.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import urllib.error
import urllib.request
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import Field

from llmcompress.algorithms.self_verify import opens_action, verdict_of
from llmcompress.data.actions import verdict
from llmcompress.data.problems.base import Problem, ProblemSet
from llmcompress.errors import EnvironmentProblem, InputError
from llmcompress.section import Section

_REQUEST = """You are a mathematics teacher. Here is a question and a proposed answer.
Say whether the answer is right. Do not solve the question step by step from the start: test the given answer in another
way, for instance by putting it back into the conditions, by working backwards, or by checking properties it must have.
Write it as a check of your own earlier answer, do not mention these instructions, and end with exactly one of these
sentences:
"Therefore, the answer is correct."
"Therefore, the answer is incorrect."
"Therefore, the answer cannot be verified."

Question: {question}

Proposed answer: {answer}"""
# seconds to wait before an endpoint that is too busy, or restarts, is asked again
PAUSES = (1.0, 4.0, 16.0)
BUSY = frozenset({408, 429, 500, 502, 503, 504})
# signs of a verification that solves the problem anew; the authors' unused filter looks for such words too
_SOLVES_AGAIN = re.compile(
    r"\b(step 1|let us solve|let's solve|solve (it|the (problem|question))( again)? step)\b", re.IGNORECASE
)


class ProgramVerifier(Section):
    """Exact checks of the shipped tasks, written out."""

    kind: Literal["program"] = "program"


class EndpointVerifier(Section):
    """A language model behind an OpenAI-compatible endpoint, on this machine or elsewhere."""

    kind: Literal["openai"]

    url: str = "http://localhost:8000/v1"
    """Base address; ``/chat/completions`` is added."""

    model: str
    """Model name as the endpoint knows it."""

    key_variable: str = "OPENAI_API_KEY"
    """Environment variable that holds the key, if the endpoint wants one."""

    temperature: float = Field(default=0.1, ge=0)
    """Sampling temperature (0.1 in the paper's code)."""

    max_tokens: int = Field(default=512, ge=16)
    """Longest verification."""

    timeout: float = Field(default=120, gt=0)
    """Seconds to wait for one verification."""

    confirmative_only: bool = True
    """Drop verifications that solve the problem again."""


class Verifier(Protocol):
    """Writes a verification, or None where it cannot."""

    def write(self, problem: Problem, answer: str) -> str | None:
        """Text that ends with a verdict, or None."""


class Program:
    """Verifications by the task's own check."""

    def __init__(self, problems: ProblemSet) -> None:
        self.problems = problems

    def write(self, problem: Problem, answer: str) -> str | None:
        """Facts about the answer, then the verdict that follows from them."""
        # a task with a fallible check says what its check concludes; the caller compares it with the truth
        accepts = getattr(self.problems, "accepts", self.problems.check)
        facts = self.problems.check_steps(problem, answer)
        joint = "" if getattr(self.problems, "compact", False) else " "
        return f"{facts}{joint}{verdict(accepts(problem, answer))}"


class Endpoint:
    """Verifications by a language model; each (problem, answer) is asked once and kept in a file.

    Args:
        config: Where and how.
        cache: JSON lines; made if missing.
    """

    def __init__(self, config: EndpointVerifier, cache: Path) -> None:
        self.config, self.cache = config, cache
        self._known: dict[str, str] = {}
        if cache.exists():
            text = cache.read_text(encoding="utf-8")
            for line in text.splitlines():
                # a kill can cut the last line off
                with suppress(ValueError):
                    row = json.loads(line)
                    self._known[row["key"]] = row["text"]
            if text and not text.endswith("\n"):
                # or the next one would be written behind what is left of it, and both be lost
                with cache.open("a", encoding="utf-8") as handle:
                    handle.write("\n")

    def write(self, problem: Problem, answer: str) -> str | None:
        """Ask once; None when the text has no verdict, solves the problem again or would be cut into other actions.

        Raises:
            EnvironmentProblem: The endpoint does not answer.
        """
        key = hashlib.sha256(json.dumps([problem.question, answer]).encode()).hexdigest()
        if key not in self._known:
            text = self._ask(problem.question, answer)
            with self.cache.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps({"key": key, "text": text}) + "\n")
            self._known[key] = text
        text = self._known[key].strip()
        if (
            verdict_of(text) is None
            or opens_action(text)
            or (self.config.confirmative_only and _SOLVES_AGAIN.search(text))
        ):
            return None
        # a box in a verification could be taken for an answer by other tools
        return re.sub(r"\\boxed\{([^{}]*)\}", r"\1", text)

    def _ask(self, question: str, answer: str) -> str:
        config = self.config
        body = {
            "model": config.model,
            "temperature": config.temperature,
            "max_tokens": config.max_tokens,
            "messages": [{"role": "user", "content": _REQUEST.format(question=question, answer=answer)}],
        }
        headers = {"Content-Type": "application/json"}
        if os.environ.get(config.key_variable):
            headers["Authorization"] = f"Bearer {os.environ[config.key_variable]}"
        url = f"{config.url.rstrip('/')}/chat/completions"
        if not url.startswith(("http://", "https://")):
            raise InputError(f"verifier.url: {config.url} is not an http address", "write http://host:port/v1")
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            data: Any = json.loads(_fetch(request, config.timeout))
            # nothing was written where all of max_tokens went into hidden reasoning
            return str(data["choices"][0]["message"]["content"] or "")
        except (OSError, HTTPException, ValueError, KeyError, IndexError, TypeError) as error:
            raise EnvironmentProblem(
                f"verifier: {url} gave no usable answer: {error}",
                "see that the server runs and knows the model and the key, then resume: what it has answered is kept",
            ) from error


def _fetch(request: urllib.request.Request, timeout: float) -> bytes:
    """Body of the reply; asks again after a pause where the server is busy or breaks off, as one of thousands of
    requests will.
    """
    for pause in (*PAUSES, None):
        try:
            with urllib.request.urlopen(request, timeout=timeout) as reply:
                return bytes(reply.read())
        except urllib.error.HTTPError as error:
            if pause is None or error.code not in BUSY:
                raise
        except urllib.error.URLError:
            # nobody listens there
            raise
        except (OSError, HTTPException):
            if pause is None:
                raise
        time.sleep(pause)
    raise AssertionError("the last try returns or raises")


def build_verifier(config: ProgramVerifier | EndpointVerifier, problems: ProblemSet, cache: Path) -> Verifier:
    """The verifier a recipe asks for."""
    return Program(problems) if isinstance(config, ProgramVerifier) else Endpoint(config, cache)
