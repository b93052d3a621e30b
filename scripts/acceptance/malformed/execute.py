"""Runs cases, each in a process of its own.

Cases that end before torch is needed start a fresh interpreter. The others are forked from a parent that
has imported torch and transformers already: the same ``main`` with the same arguments, file descriptors
and exit code, without ten seconds of imports per case. ``--fresh`` gives every case a fresh interpreter.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

from malformed.bench import Bench, Case, Run
from malformed.check import problems

LIMIT_SECONDS = 180
QUIET = {
    "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1",
    "CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1", "TERM": "dumb",
}  # fmt: skip


def check_case(case: Case, number: int, root: Path, base: Path, fresh: bool) -> list[str]:
    """Build, run and judge one case; its folder is removed if all was well."""
    execute = _forked if case.torch and not fresh else _fresh
    bench = Bench(root / f"{number:03d}", base, execute)
    run = case.build(bench)
    try:
        code, stdout, stderr = execute(run, bench.folder)
        found = problems(case, run, code, stdout, stderr)
    finally:
        if run.cleanup is not None:
            run.cleanup()
    if found:
        (bench.folder / "stderr.txt").write_text(stderr, encoding="utf-8")
        found.append("stderr:\n    " + "\n    ".join(stderr.strip().splitlines()[-12:]))
    else:
        shutil.rmtree(bench.folder, ignore_errors=True)
    return found


def _fresh(run: Run, folder: Path) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-m", "llmcompress", *run.arguments], capture_output=True, text=True, cwd=folder,
        env={**os.environ, **QUIET, **run.environment}, preexec_fn=run.before, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


def preload() -> None:
    """Import what forked cases share, under the environment the command line itself would set."""
    from llmcompress.cli import app

    for key, value in {**app.LIBRARY_SETTINGS, **QUIET}.items():
        os.environ[key] = value
    import datasets  # noqa: F401
    import torch
    import transformers
    from transformers.models.mixtral import modeling_mixtral  # noqa: F401

    torch.set_num_threads(1)
    assert transformers.AutoModelForCausalLM is not None


def _forked(run: Run, folder: Path) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        pid = os.fork()
        if pid == 0:
            _child(run, folder, out.fileno(), err.fileno())
        timer = threading.Timer(LIMIT_SECONDS, os.kill, (pid, 9))
        timer.start()
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        timer.cancel()
        out.seek(0)
        err.seek(0)
        return code, out.read().decode(), err.read().decode()


def _child(run: Run, folder: Path, out: int, err: int) -> None:
    """Become ``llmcompress``; never returns."""
    code = 1
    try:
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir(folder)
        os.environ.update(run.environment)
        if run.before is not None:
            run.before()
        from llmcompress.cli.app import invoke

        code = int(invoke(run.arguments))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
