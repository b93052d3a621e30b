"""Whether two answers in LaTeX are the same, by math-verify, within bounds of time and memory."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

from llmcompress.errors import EnvironmentProblem

# processor time of a comparison; honest ones take milliseconds, a few of them a second
SECONDS = 5.0


class _Comparer:
    """Keeps a process of :mod:`~llmcompress.data.problems.math_worker` and starts another where one has ended."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._lock = threading.Lock()

    def equal(self, gold: str, answer: str) -> bool:
        """See :func:`math_equal`."""
        with self._lock:
            if self._process is not None and self._process.poll() is not None:
                self.close()
            process = self._process or self._start()
            assert process.stdin is not None and process.stdout is not None
            try:
                process.stdin.write(json.dumps([gold, answer]) + "\n")
                process.stdin.flush()
                said = process.stdout.readline()
            except BrokenPipeError:
                said = ""
            if not said:
                self.close()
            return said == "1\n"

    def _start(self) -> subprocess.Popen[str]:
        worker = Path(__file__).with_name("math_worker.py")
        # -P: the folder of this file is no place to import from
        process = subprocess.Popen(
            [sys.executable, "-P", str(worker), str(SECONDS)], text=True, encoding="utf-8",
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        assert process.stdout is not None
        self._process = process
        if process.stdout.readline() != "ready\n":
            self.close()
            raise EnvironmentProblem(
                "task.math: math-verify does not start", f"see what {sys.executable} -c 'import math_verify' says"
            )
        return process

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()


_COMPARER = _Comparer()
atexit.register(_COMPARER.close)


@lru_cache(maxsize=100_000)
def math_equal(gold: str, answer: str) -> bool:
    """Compare two LaTeX answers with math-verify; cached, because a comparison can take seconds.

    Args:
        gold: The right answer.
        answer: What a model wrote. It may be anything: a comparison that takes more than :data:`SECONDS` of processor
            time or gigabytes of memory is given up, and the answer is wrong.

    Raises:
        EnvironmentProblem: The package is not installed or does not start.
    """
    require_math()
    return _COMPARER.equal(gold, answer)


def require_math() -> None:
    """Look for math-verify, without starting it.

    Raises:
        EnvironmentProblem: The package is not installed.
    """
    if find_spec("math_verify") is None:
        raise EnvironmentProblem(
            "task.math: the package math-verify is not installed", "pip install 'llmcompress[math]', or set math: false"
        )
