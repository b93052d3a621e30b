"""The recipe-level cases of ``scripts/acceptance/foundation_6_malformed.py``, in this process and without torch.

The script runs all cases, each in a process of its own; here the grammar is checked at every test run.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli.app import invoke

ACCEPTANCE = Path(__file__).resolve().parent.parent.parent / "scripts" / "acceptance"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from malformed.bench import make_base

    return make_base(tmp_path_factory.mktemp("malformed") / "base")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LLMCOMPRESS_NOT_SET", raising=False)
    monkeypatch.setenv("NO_COLOR", "1")


def _cases() -> Iterator[Any]:
    sys.path.insert(0, str(ACCEPTANCE))
    try:
        from malformed import model_cases, recipe_cases
    finally:
        sys.path.remove(str(ACCEPTANCE))
    light = [*recipe_cases.CASES, *(case for case in model_cases.COMMANDS if not case.torch)]
    yield from (pytest.param(case, id=case.name) for case in light)


@pytest.mark.parametrize("case", _cases())
def test_one_clear_message(
    case: Any, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from malformed.bench import Bench
    from malformed.check import problems

    bench = Bench(tmp_path / "case", base)
    monkeypatch.chdir(bench.folder)
    run = case.build(bench)
    capfd.readouterr()
    code = invoke(run.arguments)
    printed = capfd.readouterr()
    assert problems(case, run, code, printed.out, printed.err) == []


def test_the_check_notices(tmp_path: Path) -> None:
    """A check that passes everything would prove nothing."""
    from malformed.bench import Case, Run
    from malformed.check import complete, problems, unfinished_problems

    def build(bench: object) -> Run:
        return Run([])

    case = Case("x", (3,), "what", build, stage="quantize")
    run = Run([], run_dir=tmp_path)
    good = "error: what\nnext: do\n"
    assert problems(case, run, 3, "", good) == []
    for code, stderr in ((1, good), (3, "error: other\nnext: do\n"), (3, good + good), (3, "error: what\n")):
        assert problems(case, run, code, "", stderr) != []
    assert problems(case, run, 3, "", "Traceback\n" + good) != []
    (tmp_path / "artifact").mkdir()
    (tmp_path / "stages" / "quantize").mkdir(parents=True)
    (tmp_path / "stages" / "quantize" / "state.json").write_text('{"status": "finished"}')
    (tmp_path / "half.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    assert not complete(tmp_path / "half.safetensors")
    assert len(unfinished_problems(tmp_path, "quantize")) == 3
