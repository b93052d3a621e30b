"""What the documentation points to exists: links between pages, their anchors, and files that pages name."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from functools import cache
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
FOLDERS = ("benchmarks", "docs", "kernels", "llmcompress", "recipes", "scripts", "tests")
PAGES = sorted({*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))})
KERNEL_PAGES = [page for page in PAGES if page.is_relative_to(ROOT / "kernels")]
SUFFIXES = "py|h|inc|cpp|cuh|cu|json|sh|md"


def without_code(text: str) -> str:
    """A page without its blocks of code, fenced or indented."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"^(?: {4}|\t).*$", "", text, flags=re.MULTILINE)


def links(page: Path) -> list[str]:
    """Targets of a page's links that are not on the web."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text(encoding="utf-8")))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


@cache
def anchors(page: Path) -> frozenset[str]:
    """Names that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ +(.*)$", without_code(page.read_text(encoding="utf-8")), re.MULTILINE)
    return frozenset(re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings)


def broken(page: Path, target: str) -> bool:
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    return not file.exists() or bool(anchor and anchor not in anchors(file))


@cache
def files() -> tuple[str, ...]:
    """Paths of the repository, each with a slash in front."""
    below = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix)
    return tuple(f"/{path.relative_to(ROOT).as_posix()}" for path in (*ROOT.glob("*.*"), *below))


def spelled_out(name: str) -> list[str]:
    """`a_{2,3}.cu` is `a_2.cu` and `a_3.cu`."""
    parts = [part.split(",") for part in re.split(r"[{}]", name)]
    return ["".join(chosen) for chosen in product(*parts)]


def missing(name: str) -> bool:
    return not all(any(fnmatch(path, f"*/{wanted}") for path in files()) for wanted in spelled_out(name))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert [target for target in links(page) if broken(page, target)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_files_that_pages_name_exist(page: Path) -> None:
    # other pages name JSON files that runs write
    suffixes = SUFFIXES if page in KERNEL_PAGES else SUFFIXES.replace("|json", "")
    named = re.findall(rf"`([\w./*{{}},-]+\.(?:{suffixes}))`", without_code(page.read_text(encoding="utf-8")))
    assert sorted({name for name in named if missing(name)}) == []


def test_every_page_about_kernels_is_in_the_first_one() -> None:
    first = ROOT / "kernels" / "README.md"
    reached = {(first.parent / target.partition("#")[0]).resolve() for target in links(first)}
    assert {page for page in KERNEL_PAGES if page != first} - reached == set()


def test_broken_links_and_missing_files_would_be_noticed() -> None:
    page = ROOT / "kernels" / "README.md"
    assert not broken(page, "docs/states.md#operators") and not missing("skinny_{2,3,4}.cu")
    assert broken(page, "docs/absent.md") and broken(page, "docs/states.md#absent")
    assert missing("absent.cuh") and missing("skinny_{2,9}.cu")
