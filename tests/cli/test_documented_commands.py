"""Command lines that README, Makefile, recipes and the package's own hints show can be parsed; what runs would fit."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from llmcompress.cli.app import app, invoke
from llmcompress.errors import LLMCompressError
from llmcompress.recipe.catalog import list_recipes, shipped_path
from llmcompress.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[2]


def documented() -> list[str]:
    found = [info.command for info in list_recipes(fragments=False)]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    found += re.findall(r"^\t@?\$\(BIN\)/(llmcompress [^\n|>]*)", makefile, re.MULTILINE)
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "kernels").glob("**/*.md")):
        text = page.read_text(encoding="utf-8")
        found += re.findall(r"^(?:    |\$ )?(llmcompress [a-z][^\n|>]*)$", text, re.MULTILINE)
        # two words are the name of a command
        spans = [span.split() for span in re.findall(r"`(llmcompress [a-z][^`…]*)`", text)]
        found += [" ".join(words) for words in spans if len(words) > 2]
    found += beside()
    return sorted({line.split(" #")[0].split(";")[0].strip() for line in found if line.startswith("llmcompress ")})


def beside() -> list[str]:
    """Commands of files for schedulers and service managers."""
    folder = ROOT / "docs" / "cluster"
    job = list(yaml.safe_load_all((folder / "kubernetes-job.yaml").read_text(encoding="utf-8")))[-1]
    found = [shlex.join(pod["command"]) for pod in job["spec"]["template"]["spec"]["containers"]]
    for name in ("slurm.sbatch", "llmcompress.service"):
        text = (folder / name).read_text(encoding="utf-8").replace("\\\n", " ")
        found += re.findall(r"\b(llmcompress (?:run|serve) .*)$", text, re.MULTILINE)
    return found


COMMANDS = documented()


def parse(words: list[str]) -> dict[str, Any]:
    """Parameters of a command line, parsed but not run."""
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, f"no command {name}"
        command = command.commands[name]
    asks = "--help" in words
    words = [word for word in words if word != "--help"]
    return dict(command.make_context(command.name, words, resilient_parsing=asks).params)


def test_something_is_documented() -> None:
    assert len(COMMANDS) > 10
    # a schedule's, a job's and a service's are among them
    assert all(any(part in line for line in COMMANDS) for part in ("$MODEL", "--rdzv-id mixtral", "--host 0.0.0.0"))


@pytest.mark.parametrize("line", COMMANDS)
def test_documented_command_lines_parse(line: str) -> None:
    line = re.sub(r"\$SLURM_NNODES", "2", line.replace("$(REPRO_MODEL)", "/models/x"))
    words = shlex.split(line)
    parameters = parse(words[1:])
    recipe = parameters.get("recipe")
    # placeholders are written in capitals
    if recipe and not recipe.isupper() and "/" not in recipe and not recipe.endswith(".yaml"):
        assert shipped_path(recipe), f"no recipe {recipe}"


def planned() -> list[str]:
    """Settings of ``run`` lines that a machine with nothing but the shipped models can plan."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    lines = {
        line.split(" #")[0].strip() for line in re.findall(r"(?:^    |`)llmcompress run ([a-z][^\n`]*)", text, re.M)
    }
    # other capitals are the reader's own files, other paths and options belong to machines that are not here; stages
    # that a page shows how to write are tried by tests/unit/docs
    own = "".join(rf"|type: {name}\b" for name in re.findall(r'^    type: Literal\["(\w+)"\]', text, re.M))
    strange = re.compile(rf"[A-Z]{{3}}|/models|--|…{own}")
    return sorted(line for line in lines if not strange.search(line.replace("=FOLDER", "=folder")))


@pytest.mark.parametrize("line", planned())
def test_settings_of_documented_runs_are_accepted(line: str) -> None:
    words = shlex.split(line.replace("=FOLDER", f"={ROOT / 'recipes' / 'assets' / 'reference_reasoner'}"))
    assert invoke(["plan", *words, "--quiet"]) == 0


def test_enough_runs_are_planned() -> None:
    assert len([line for line in planned() if "gptq" in line]) > 1 and len(planned()) > 4


def settings() -> list[tuple[str, str]]:
    """Page and text of the overrides that stand in sentences."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md")]
    span = re.compile(r"`('?\+?(?:stages|vars|run|host)\.[^`\s]*[=~][^`…]*)`")
    found = [(page.name, text) for page in pages for text in span.findall(page.read_text(encoding="utf-8"))]
    return sorted(set(found))


# a setting belongs to the kind of recipe that its sentence speaks of
KINDS = ("gptq", "quickstart", "q_mamba_tiny", "rqt", "s2r_tiny", "s2r_qwen2_7b")


@pytest.mark.parametrize(("page", "text"), settings())
def test_settings_in_sentences_are_accepted(page: str, text: str) -> None:
    words = shlex.split(re.sub(r"\bFILE\b", "FILE.txt", text))
    refusals = []
    for name in KINDS:
        try:
            load_recipe(name, words, allow_missing=True)
        except LLMCompressError as error:
            refusals.append(error.message)
    assert len(refusals) < len(KINDS), refusals


def test_enough_settings_are_tried() -> None:
    assert len(settings()) > 6


def test_a_wrong_option_would_be_noticed() -> None:
    with pytest.raises(Exception, match="wrong"):
        parse(["run", "quickstart", "--wrong"])
