"""Tables of launch configurations in the user's cache: one JSON file per backend and GPU, read at dispatch.

    <cache>/<backend>/<gpu>.json: {"gpu": name, "versions": {...}, "entries": {key: configuration}}

``llmcompress bench tune`` fills them. What a table was measured with is part of it: on another GPU, with another
compiler or after a change of the kernels its figures say nothing, so it is left alone and :func:`read` says why. Needs
no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

CACHE_VARIABLE = "LLMCOMPRESS_CACHE"
PACKAGE = Path(__file__).resolve().parent
# what decides how fast the configurations of a backend are, besides the GPU
SOURCES = {"triton": ("triton/*.py",), "cuda": ("csrc/cuda/common/*", "csrc/cuda/skinny/*")}


def file_name(gpu: str) -> str:
    """File name of a GPU's table."""
    return "".join(c if c.isalnum() else "-" for c in gpu.lower()) + ".json"


def path_of(backend: str, gpu: str) -> Path:
    """Where a table lies.

    Args:
        backend: One of :data:`SOURCES`.
        gpu: Name as the driver tells it.
    """
    base = os.environ.get(CACHE_VARIABLE)
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "llmcompress")
    return Path(base).expanduser() / backend / file_name(gpu)


@cache
def versions(backend: str) -> dict[str, str]:
    """What a table of this backend depends on: a hash of the kernels, and the version of Triton."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES[backend] for path in PACKAGE.glob(pattern) if path.is_file()}):
        digest.update(path.relative_to(PACKAGE).as_posix().encode() + path.read_bytes())
    found = {"kernels": digest.hexdigest()[:12]}
    if backend == "triton":
        try:
            found["triton"] = metadata.version("triton")
        except metadata.PackageNotFoundError:
            found["triton"] = "none"
    return found


def read(backend: str, gpu: str) -> tuple[dict[str, Any], str | None]:
    """Entries of a table that may be used, and why there are none.

    Args:
        backend: One of :data:`SOURCES`.
        gpu: Name of the GPU that is to be configured.

    Returns:
        ``{key: configuration}`` as stored, and None or the reason why the table is missing or ignored.
    """
    path = path_of(backend, gpu)
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, "no table: llmcompress bench tune makes one"
    except (OSError, ValueError) as error:
        return {}, f"ignored, {path} is not readable: {error}"
    if not isinstance(stored, dict) or not isinstance(stored.get("entries"), dict):
        return {}, f"ignored, {path} has another form than this version writes"
    if stored.get("gpu") != gpu:
        return {}, f"ignored, it was measured on {stored.get('gpu')}"
    given, here = stored.get("versions"), versions(backend)
    if given != here:
        given = given if isinstance(given, dict) else {}
        apart = [f"{name} {given.get(name)} instead of {here[name]}" for name in here if given.get(name) != here[name]]
        return {}, f"ignored, it was measured with {', '.join(apart) or 'other versions'}; run llmcompress bench tune"
    return stored["entries"], None


def write(backend: str, gpu: str, found: Mapping[str, Any]) -> Path:
    """Add entries to a table; one that :func:`read` ignores is replaced.

    Args:
        backend: One of :data:`SOURCES`.
        gpu: Name of the GPU they were measured on.
        found: Configurations by key, of what JSON can hold.

    Returns:
        The file, complete at any time.
    """
    path, (entries, _) = path_of(backend, gpu), read(backend, gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"gpu": gpu, "versions": versions(backend), "entries": {**entries, **found}}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as handle:
        json.dump(content, handle, indent=1, sort_keys=True)
    Path(handle.name).replace(path)
    return path


def describe(gpus: Iterable[str]) -> list[dict[str, str]]:
    """One line per GPU and backend for ``doctor``: how many entries are used, or why none are."""
    lines = []
    for gpu in dict.fromkeys(gpus):
        for backend in SOURCES:
            entries, reason = read(backend, gpu)
            state = reason or f"{len(entries)} launches from {path_of(backend, gpu)}"
            lines.append({"gpu": gpu, "backend": backend, "table": state})
    return lines
