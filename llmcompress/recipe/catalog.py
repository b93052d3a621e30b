"""Recipes that ship with llmcompress, and how a name on the command line becomes a file.

A shipped recipe begins with comments: the schema line, a title, the command that runs it and what it needs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from llmcompress.errors import RecipeError
from llmcompress.recipe.diagnose import did_you_mean

ROOT = Path(__file__).resolve().parent.parent / "_recipes"
_SKIPPED = {"assets"}
LOCK_NAME = "recipe.lock.json"
SYSTEMS = {
    "EAC-MoE": "mixtures of experts: QESC for weights and routers, PESF skips experts",
    "GPTQ": "dense models, for vLLM and llama.cpp too",
    "Q-Mamba": "Mamba and hybrids, states in low bits",
    "RQT": "families of fine-tunes in one artifact",
    "S2R": "models that verify and correct themselves",
    "tests": "seconds to a minute each; what they measure means nothing",
    "fragments": "parts that recipes extend",
}
"""What recipes are about, in the order of the list."""
_BEGINNINGS = {
    "smoke/": "tests", "base/": "fragments", "q_mamba": "Q-Mamba", "rqt": "RQT", "s2r": "S2R", "gptq_then_s2r": "S2R",
    "gptq": "GPTQ", "eac_moe": "EAC-MoE", "quickstart": "EAC-MoE",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class RecipeInfo:
    """A shipped recipe.

    Attributes:
        name: As given on the command line, such as ``quickstart`` or ``smoke/gptq_tiny``.
        path: The file.
        title: First line of its header.
        command: How to run it.
        needs: Memory, device and time.
        fragment: Whether it is a part to extend (``base/``), not a recipe to run.
        system: One of :data:`SYSTEMS`, by its name; empty for a name that says nothing.
    """

    name: str
    path: Path
    title: str
    command: str
    needs: str
    fragment: bool
    system: str

    @property
    def runs_on(self) -> str:
        """The machine in a word: ``GPU, 42 GB``, ``CPU, 1.8 GB``, ``see plan`` for any model of a kind.

        Empty where the header names no size.
        """
        if "`llmcompress plan" in self.needs:
            return "see plan"
        gpu, ram = re.search(r"a GPU with ([\d.]+) GB", self.needs), re.search(r"([\d.]+) GB RAM", self.needs)
        if gpu is not None:
            return f"GPU, {gpu[1]} GB"
        return f"CPU, {ram[1]} GB" if ram is not None else ""


def list_recipes(fragments: bool = True) -> list[RecipeInfo]:
    """All shipped recipes by name; those to run first, then ``base/`` and ``smoke/``.

    Args:
        fragments: Whether to include the parts that recipes extend.
    """
    found = []
    for path in sorted(ROOT.rglob("*.yaml")):
        name = path.relative_to(ROOT).with_suffix("").as_posix()
        if name.split("/")[0] not in _SKIPPED:
            found.append(_info(name, path))
    kept = [info for info in found if fragments or not info.fragment]
    return sorted(kept, key=lambda info: (info.name.count("/"), info.name))


def recipe_names(fragments: bool = False) -> list[str]:
    """Names of shipped recipes, for shell completion."""
    return [info.name for info in list_recipes(fragments)]


def find_recipe(name_or_path: str | Path) -> Path:
    """The file that a name or a path stands for.

    A file wins over a shipped recipe of the same name. A run folder stands for its lock.

    Raises:
        RecipeError: There is no such file or recipe.
    """
    text = str(name_or_path)
    path = Path(text).expanduser()
    if path.is_file():
        return path
    if path.is_dir() and (path / LOCK_NAME).is_file():
        return path / LOCK_NAME
    shipped = shipped_path(text)
    if shipped is not None:
        return shipped
    what = f"{text}: a folder without {LOCK_NAME}" if path.is_dir() else f"{text}: no such file or shipped recipe"
    raise RecipeError(what + _nearest(text), "llmcompress recipes ls")


def shipped_path(name: str) -> Path | None:
    """File of the shipped recipe ``name`` (with or without ``.yaml``), None if there is none."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    for candidate in (ROOT / name, ROOT / f"{name}.yaml"):
        if candidate.is_file() and candidate.suffix == ".yaml":
            return candidate
    return None


def _nearest(text: str) -> str:
    names = [info.name for info in list_recipes()]
    found = did_you_mean(Path(text).with_suffix("").as_posix(), names)
    return found if "did you mean" in found else ""


def _info(name: str, path: Path) -> RecipeInfo:
    header = []
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            if not line.startswith("#"):
                break
            header.append(line.lstrip("#").strip())
    texts = [line for line in header if line and not line.startswith("yaml-language-server:")]
    marked = {
        key: next((line.removeprefix(key).strip() for line in texts if line.startswith(key)), "")
        for key in ("run:", "needs:")
    }
    title = next((line for line in texts if not line.startswith(tuple(marked))), "")
    system = next((group for beginning, group in _BEGINNINGS.items() if name.startswith(beginning)), "")
    return RecipeInfo(name, path, title, marked["run:"], marked["needs:"], name.startswith("base/"), system)
