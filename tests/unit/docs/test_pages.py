"""What pages say of the repository is so: recipes, make targets, and the figures of benchmarks/acceptance.json."""

from __future__ import annotations

import ast
import importlib
import json
import re
from fnmatch import fnmatch
from pathlib import Path

import pytest

from llmcompress.models.registry import families
from llmcompress.recipe.catalog import list_recipes

ROOT = Path(__file__).resolve().parents[3]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("**/*.md"), *(ROOT / "kernels").glob("**/*.md")]
ENTRIES = json.loads((ROOT / "benchmarks" / "acceptance.json").read_text(encoding="utf-8"))
NUMBER = re.compile(r"\d+\.\d+")
PAGE = re.compile(r"\b((?:docs|kernels)/[\w/.-]+\.md|(?:PAPERS|ARCHITECTURE|CONTRIBUTING|CHANGELOG)\.md)\b")


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def wrong_figures(text: str, entries: dict[str, dict[str, object]]) -> list[str]:
    """Decimals in rows ``| what | figure | `entry` |`` that the entry does not hold, rounded as the page does."""
    wrong = []
    for figure, entry in re.findall(r"^\|[^|\n]*\|([^|\n]*)\| `(\w+?)(?:\.py)?` \|$", text, re.MULTILINE):
        if entry not in entries:
            wrong.append(f"no entry {entry}")
            continue
        known = [float(x) for x in NUMBER.findall(str(entries[entry]["figure"]))]
        for number in NUMBER.findall(figure):
            places = len(number.partition(".")[2])
            if not any(f"{value:.{places}f}" == number for value in known):
                wrong.append(f"{entry}: {number}")
    return wrong


@pytest.mark.parametrize("page", ["README.md", "PAPERS.md"])
def test_figures_are_those_that_were_measured(page: str) -> None:
    assert len(re.findall(r"\| `\w+(?:\.py)?` \|$", read(page), re.MULTILINE)) > 7
    assert not wrong_figures(read(page), ENTRIES)


def test_wrong_figures_would_be_noticed() -> None:
    rows = "| a | 0.16 %, then 1.62 | `first` |\n| b | 2.0 | `second.py` |\n"
    assert wrong_figures(rows, {"first": {"figure": "rqt 0.161, bitdelta 1.61"}}) == ["first: 1.62", "no entry second"]


def test_recipes_of_the_papers_exist() -> None:
    shipped = [info.name for info in list_recipes(fragments=False)]
    rows = re.findall(r"^\|[^|\n]*\|[^|\n]*\.py`[^|\n]*\|([^|\n]*)\|$", read("PAPERS.md"), re.MULTILINE)
    named = {span for cell in rows for span in re.findall(r"`([\w/*]+)`", cell)}
    assert len(named) > 15
    assert not [pattern for pattern in named if not any(fnmatch(name, pattern) for name in shipped)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", read("Makefile"), re.MULTILINE))
    assert set(re.findall(r"(?:`|^    )make ([a-z0-9-]+)", page.read_text(encoding="utf-8"), re.MULTILINE)) <= targets


def test_the_page_of_models_lists_every_type() -> None:
    rows = re.findall(r"^\| (`[^|]*) \|", read("docs/models.md"), re.MULTILINE)
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row) if name != "model_type"]
    assert sorted(set(named)) == families()


def test_pages_that_sources_name_exist() -> None:
    absent = set()
    for folder in ("llmcompress", "kernels", "scripts", "recipes"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".h", ".cpp", ".cu", ".cuh", ".sh"}:
                named = PAGE.findall(path.read_text(encoding="utf-8"))
                absent |= {f"{path.relative_to(ROOT)}: {name}" for name in named if not (ROOT / name).exists()}
    assert not absent


def absent_files(package: Path, text: str) -> list[str]:
    """Files and folders that the head of a package names and that are not in it."""
    named = re.findall(r"``([\w*/]+(?:\.py|/))``", text)
    return [name for name in named if not (list(package.glob(name)) or (ROOT / name).exists())]


@pytest.mark.parametrize(
    "package", sorted((ROOT / "llmcompress").rglob("__init__.py")), ids=lambda path: path.parent.name
)
def test_heads_of_packages_name_files_that_are_there(package: Path) -> None:
    assert not absent_files(package.parent, package.read_text(encoding="utf-8"))


def test_a_file_that_is_gone_would_be_noticed() -> None:
    text = "``rules.py``, ``codecs/``, ``tests/paper/`` and ``gone.py``, ``tr*.py``, ``no*.py``"
    assert absent_files(ROOT / "llmcompress" / "quant", text) == ["gone.py", "no*.py"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_python_of_pages_can_be_read(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("llmcompress"):
                assert all(hasattr(importlib.import_module(str(node.module)), alias.name) for alias in node.names)
