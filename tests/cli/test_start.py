"""The command line starts fast, without torch, and every command explains itself."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from llmcompress import __version__
from llmcompress.cli.app import invoke
from llmcompress.units import bytes_text

LIGHT = ("--help", "version", "recipes ls", "schema", "validate eac_moe_mixtral", "recipes show quickstart")
HEAVY = ("torch", "transformers", "datasets", "lm_eval", "safetensors", "tokenizers", "numpy")


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600)


@pytest.mark.parametrize("words", LIGHT)
def test_light_commands_import_nothing_heavy_and_are_quick(words: str) -> None:
    code = (
        "import sys, time; from llmcompress.cli.app import invoke\n"
        f"code = invoke({words.split()!r})\n"
        f"print('heavy', [m for m in {HEAVY!r} if m in sys.modules], code, time.process_time(), file=sys.stderr)"
    )
    done = python(code)
    assert "heavy [] 0 " in done.stderr, done.stderr
    # processor time, because a busy machine must not fail this test; the limit of one second is kept with room
    seconds = float(done.stderr.split()[-1])
    assert seconds < 3, f"{words} took {seconds:.1f} s of processor time"


def test_version_is_an_option_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["--version"]) == invoke(["version"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == second == f"llmcompress {__version__}"


def test_a_pipe_is_as_wide_as_its_columns_say(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def widest(columns: str) -> int:
        monkeypatch.setenv("COLUMNS", columns)
        assert invoke(["recipes", "ls"]) == 0
        return max(len(line) for line in capsys.readouterr().out.splitlines())

    assert widest("80") == 80
    assert widest("140") == 140


def test_help_shows_no_value_behind_a_flag_and_joins_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert invoke(["serve", "--help"]) == 0
    said = capsys.readouterr().out
    assert "--json" in said and "<bool>" not in said
    text = said[said.index("/v1/completions") : said.index("Arguments")]
    full = [line.rstrip() for line in text.splitlines()[:-2] if line.strip()]
    assert all(len(line) > 60 for line in full[:-1])  # no line ends early, whatever the docstring's lines are


def test_an_output_that_is_not_utf8_loses_signs_and_no_run() -> None:
    narrow = {**os.environ, "PYTHONIOENCODING": "ascii:strict", "PYTHONUTF8": "1"}

    def told(*words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            [sys.executable, "-m", "llmcompress", *words], capture_output=True, env=narrow, timeout=600
        )

    done = told("validate", "gptq")  # it says load → calibrate
    assert done.returncode == 0 and b"load ? calibrate" in done.stdout
    done = told("validate", "läuft", "--json")
    assert done.returncode == 3 and "läuft" in json.loads(done.stdout)["error"]["message"]


def test_a_reader_that_has_gone_changes_no_exit_code(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("version: 1\nname: r\nmodel: {path: nowhere/at/all}\nstages: {load: {type: load}}\n")
    for words, code in ((["recipes", "ls"], 0), (["validate", "gptq"], 0), (["validate", str(recipe)], 4)):
        reader, writer = os.pipe()
        os.close(reader)
        done = subprocess.run(
            [sys.executable, "-m", "llmcompress", *words], stdout=writer, stderr=subprocess.PIPE, timeout=600
        )
        os.close(writer)
        assert done.returncode == code, words
        assert b"Traceback" not in done.stderr and b"BrokenPipe" not in done.stderr


def test_a_full_disk_behind_stderr_changes_no_exit_code_and_one_behind_stdout_is_named(tmp_path: Path) -> None:
    def told(*words: str, **streams: Any) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([sys.executable, "-m", "llmcompress", *words], timeout=600, check=False, **streams)

    with Path("/dev/full").open("wb") as full:
        done = told("validate", "nowhere", "--json", stdout=subprocess.PIPE, stderr=full)
        assert done.returncode == 3 and "nowhere" in json.loads(done.stdout)["error"]["message"]
        assert told("validate", "gptq", stdout=subprocess.PIPE, stderr=full).returncode == 0
        for words in (["recipes", "ls"], ["version", "--json"]):
            done = told(*words, stdout=full, stderr=subprocess.PIPE)
            assert done.returncode == 5 and b"standard output: no space left" in done.stderr


@pytest.mark.parametrize("number", [errno.EPIPE, errno.ENOSPC, errno.EIO])
def test_a_run_outlives_those_who_read_its_progress(number: int) -> None:
    import io

    from llmcompress.events import Event
    from llmcompress.pipeline.sinks import PlainSink

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise OSError(number, "nobody reads")

    PlainSink(Closed())(Event("note", "quantize", {"text": "still at work"}))


def commands(group: Any = None, words: str = "") -> list[tuple[str, bool]]:
    """Every command and group as typed, and whether it is a command."""
    from llmcompress.cli.app import app

    group = group or typer.main.get_command(app)
    found = []
    for name, inner in group.commands.items():
        deeper = hasattr(inner, "commands")
        found.append((f"{words} {name}".strip(), not deeper))
        found += commands(inner, f"{words} {name}".strip()) if deeper else []
    return found


@pytest.mark.parametrize(("name", "runs"), commands(), ids=str)
def test_every_command_has_help_and_the_common_options(
    name: str, runs: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    from llmcompress.cli.app import invoke

    assert invoke([*name.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "Usage:" in text
    if runs:
        for option in ("--json", "--quiet", "--debug"):
            assert option in text


def test_the_module_runs_like_the_script() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "llmcompress", "version", "--json"],
        capture_output=True,
        text=True,
        check=True,
        timeout=600,
    )
    assert json.loads(done.stdout)["version"]
    assert done.stderr == ""


def test_ctrl_c_during_the_first_imports_is_no_traceback() -> None:
    program = (
        "import runpy, sys\n"
        "class Impatient:\n"
        "    def find_spec(self, name, *rest):\n"
        "        if name == 'llmcompress.cli.app':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Impatient())\n"
        "runpy.run_module('llmcompress', run_name='__main__')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=600, check=False)
    assert done.returncode == 130 and done.stderr.startswith(b"error: stopped by Ctrl-C\nnext: ")
    assert b"Traceback" not in done.stderr


def test_a_process_without_standard_streams_keeps_its_exit_code(tmp_path: Path) -> None:
    """Started with ``<&- >&-``, as daemons do; what is opened next must not become stdout."""
    recipe = "import sys; from llmcompress.cli.app import main; main(sys.argv[1:])"
    for closed in (">&-", "<&- >&-", "<&- >&- 2>&-"):
        for words, code in (("version", 0), ("recipes show nothing", 2), ("validate quickstart", 0)):
            line = f'exec "$0" -c "$1" {words} {closed}'
            done = subprocess.run(["bash", "-c", line, sys.executable, recipe], capture_output=True, check=False)
            assert done.returncode == code, (closed, words, done.stderr)


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (None, "–"),
        (12, "12 B"),
        (3_400, "3.4 kB"),
        (93.4e9, "93.4 GB"),
        (999, "999 B"),
        (999.9, "1 kB"),
        (999.4e6, "999 MB"),
        (999.7e6, "1 GB"),
        (16e12, "16 TB"),
        (1.5e15, "1500 TB"),
    ],
)  # fmt: skip
def test_sizes_never_round_into_an_exponent(count: float | None, text: str) -> None:
    assert bytes_text(count) == text
