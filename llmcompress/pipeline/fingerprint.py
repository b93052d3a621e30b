"""Fingerprints: what a finished stage depended on, so that resume can tell whether it still holds.

A stage's fingerprint is the SHA-256 of its config, the contents of the files the config names and
the fingerprint of the stage before. The first link is the model, the seed and the compute policy.
Files count by content, not by name, so a moved model does not invalidate a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from llmcompress.errors import InputError
from llmcompress.models.paths import MODEL_FILES, PATH_KEYS, matches, or_artifact
from llmcompress.models.tensor_file import TensorFile
from llmcompress.recipe.lock import WHOLE_FILE_LIMIT

if TYPE_CHECKING:
    from llmcompress.stages.base import Stage

SAMPLE = 1 << 20
SAMPLES = 16
# what a folder of tasks may hold: rows in every form that evaluation/task_specs.py reads, and tasks of one's own
DATA_FILES = ("**/*.yaml", "**/*.jsonl", "**/*.jsonl.gz", "**/*.jsonl.xz", "**/*.parquet")
# from this size a hash is kept: reading so much takes longer than the step of a file system's clock, so that a file
# that is written again cannot look the same
REMEMBERED = 32 << 20
# of each tensor of a larger checkpoint
TENSOR_SAMPLE = 4 << 10


def digest(data: Any) -> str:
    """SHA-256 of ``data`` as compact JSON. The order of keys counts: rules are tried in order, stages run in order."""
    return hashlib.sha256(json.dumps(data, separators=(",", ":")).encode()).hexdigest()


def file_identity(path: Path) -> str:
    """SHA-256 of a file; of a part of it when it is larger than 1 GiB. Smaller ones the lock hashes whole anyway.

    Reading 90 GB before every run would cost more than it protects. Of a larger file size and 16 evenly spread
    mebibytes count, and the middle of each tensor where it is a checkpoint: one that was trained on, or of which a
    single tensor was replaced, differs there. A large file is read once by a process, as long as it stays as it is.
    """
    facts = path.stat()
    if facts.st_size < REMEMBERED:
        return _hashed(path)
    return _known(path.absolute(), facts.st_size, facts.st_mtime_ns, facts.st_ctime_ns, facts.st_ino)


@lru_cache(maxsize=1024)
def _known(path: Path, *_state: int) -> str:
    """Hash of a file in one state: a run asks before it begins, when it begins and when it ends."""
    return _hashed(path)


def _hashed(path: Path) -> str:
    size = path.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with path.open("rb") as handle:
        if size <= WHOLE_FILE_LIMIT:
            while chunk := handle.read(SAMPLE):
                found.update(chunk)
            return found.hexdigest()
        for index in range(SAMPLES):
            handle.seek((size - SAMPLE) * index // (SAMPLES - 1))
            found.update(handle.read(SAMPLE))
        for start in _tensor_middles(path):
            handle.seek(start)
            found.update(handle.read(TENSOR_SAMPLE))
    return found.hexdigest()


def _tensor_middles(path: Path) -> Iterator[int]:
    """Where the middle of each tensor of a safetensors file begins, in the order of the file."""
    if path.suffix != ".safetensors":
        return
    try:
        entries = TensorFile(path).entries.values()
    except InputError:
        return  # damaged: said when the model is opened
    for entry in sorted(entries, key=lambda entry: entry.start):
        yield entry.start + max(0, entry.nbytes - TENSOR_SAMPLE) // 2


def path_identity(path: Path) -> str:
    """Identity of a file, or of the model, tokenizer and task files of a folder by relative name.

    A run folder stands for its artifact, and a task of one's own for its rows as well.
    """
    if path.is_file():
        named = _named_by_task(path)
        return digest([file_identity(file) for file in (path, *named)]) if named else file_identity(path)
    path = or_artifact(path)
    files = {p for pattern in MODEL_FILES for p in path.glob(pattern)}
    files |= {p for pattern in DATA_FILES for p in path.glob(pattern)}
    return digest({p.relative_to(path).as_posix(): file_identity(p) for p in sorted(files) if p.is_file()})


class _TaskLoader(yaml.SafeLoader):
    """Reads tasks of lm-eval, whose functions are code that nothing here may run."""


_TaskLoader.add_multi_constructor("!", lambda loader, suffix, node: None)


def _named_by_task(path: Path) -> list[Path]:
    """Files of rows, and files that are included, which a task in lm-eval's YAML names and which are there."""
    found: set[Path] = set()
    left = [path]
    while left:
        task = left.pop()
        rows, included = _names_in_task(task)
        # as evaluation/task_specs.py finds rows: beside the task that was asked for, or from where the program runs
        places = [beside if (beside := path.parent / name).exists() else Path(name) for name in rows]
        places += [task.parent / name for name in included]
        new = {place.resolve() for place in places if place.is_file()} - found
        found |= new
        left += new
    return sorted(found)


def _names_in_task(path: Path) -> tuple[list[str], list[str]]:
    """Names of rows, and of tasks that are included, in one file."""
    if path.suffix not in (".yaml", ".yml"):
        return [], []
    try:
        task = yaml.load(path.read_text(encoding="utf-8"), _TaskLoader)
        rows = (task.get("dataset_kwargs") or {}).get("data_files") or {}
        included = task.get("include")
    except (OSError, ValueError, AttributeError, yaml.YAMLError):
        return [], []  # whoever reads the task says what is wrong with it
    names = list(rows.values()) if isinstance(rows, Mapping) else []
    includes = included if isinstance(included, list) else [included]
    return [n for n in names if isinstance(n, str)], [n for n in includes if isinstance(n, str)]


def with_contents(section: Any, key: str = "") -> Any:
    """Copy of a recipe section in which names of existing files are replaced by what is in them.

    Args:
        section: Plain data (mappings, lists, scalars).
        key: Key under which ``section`` was found.
    """
    if isinstance(section, Mapping):
        return {name: with_contents(value, name) for name, value in section.items()}
    if isinstance(section, list | tuple):
        return [with_contents(value, key) for value in section]
    if key in PATH_KEYS and isinstance(section, str) and section:
        found = matches(section)
        if len(found) == 1:
            return {"contents": path_identity(found[0])}
        if found:
            return {"contents": digest([path_identity(path) for path in found])}
    return section


def inputs_of(stage: Stage) -> dict[str, Any]:
    """What the fingerprint of a stage counts of the stage itself: its config, with the contents of files it names."""
    found: dict[str, Any] = with_contents(stage.config.model_dump(mode="json"))
    return found


def difference(before: Any, after: Any, prefix: str) -> list[str]:
    """Lines ``path: before → after`` for everything that differs between two pieces of plain data.

    Args:
        before: Nested mappings.
        after: The same, later; a part that only one of them has is one line.
        prefix: Path of the whole.
    """
    if before == after:
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        if "contents" in before and "contents" in after:
            return [f"{prefix}: another file, or its contents have changed"]
        lines = []
        for name in [*before, *(name for name in after if name not in before)]:
            path = f"{prefix}.{name}" if prefix else str(name)
            lines += difference(before.get(name, _ABSENT), after.get(name, _ABSENT), path)
        return lines
    return [f"{prefix}: {_shown(before)} → {_shown(after)}"]


_ABSENT = object()
_LONGEST = 160


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "(not set)"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"
