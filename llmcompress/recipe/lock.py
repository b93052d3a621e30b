"""``recipe.lock.json``: everything that is needed to run a recipe again and to see what has changed since.

It holds the resolved recipe with all defaults written out, its hash, the hash of every input file, versions, the git
commit and the machine. ``load_recipe("RUN_DIR/recipe.lock.json")`` gives the same recipe again. Values that came from
the environment (``${oc.env:NAME}``) are kept as that text: the name is recorded, the value is not.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmcompress import plugins
from llmcompress.errors import InputError
from llmcompress.models.paths import MODEL_FILES, matches, named_paths, resolve_path
from llmcompress.models.tensor_file import header_bytes
from llmcompress.recipe.load import LoadedRecipe

FORMAT = 1
PACKAGES = (
    "llmcompress", "torch", "transformers", "numpy", "safetensors", "tokenizers", "datasets", "lm_eval",
    "pydantic", "omegaconf", "compressed-tensors", "gguf", "trl", "vllm",
)  # fmt: skip
# larger safetensors files are identified by their header: names, types, shapes and offsets of all tensors
WHOLE_FILE_LIMIT = 1 << 30
_CHUNK = 1 << 20
CPUINFO = Path("/proc/cpuinfo")


def make_lock(loaded: LoadedRecipe) -> dict[str, Any]:
    """The lock of a recipe on this machine, as plain data for JSON.

    Args:
        loaded: The recipe. Files it names are read and hashed; those that are missing are left out, because the stage
            that needs them says so better.
    """
    recipe = locked_recipe(loaded)
    return {
        "format": FORMAT,
        "recipe": recipe,
        "recipe_sha256": digest(recipe),
        "composition": {
            "files": {_name(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in loaded.files},
            "overrides": list(loaded.overrides),
        },
        "inputs": inputs(loaded),
        "versions": versions(),
        "git": git_state(),
        "hardware": hardware(),
    }


def locked_recipe(loaded: LoadedRecipe) -> dict[str, Any]:
    """The resolved recipe; text that looks like an interpolation but is not is escaped."""

    def walk(value: Any, path: str) -> Any:
        if path in loaded.environment:
            return loaded.environment[path]
        if isinstance(value, Mapping):
            return {str(key): walk(item, f"{path}.{key}" if path else str(key)) for key, item in value.items()}
        if isinstance(value, list):
            return [walk(item, f"{path}.{index}") for index, item in enumerate(value)]
        return value.replace("${", "\\${") if isinstance(value, str) else value

    found: dict[str, Any] = walk(loaded.data, "")
    return found


def digest(data: Any) -> str:
    """SHA-256 of plain data as canonical JSON; the order of stages and rules counts."""
    return hashlib.sha256(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode()).hexdigest()


def changes_since(loaded: LoadedRecipe) -> list[str]:
    """What differs between a lock and this machine now: input files and versions, one line each.

    Args:
        loaded: A recipe that was read from a lock; for any other the list is empty.
    """
    if loaded.lock is None:
        return []
    lines = []
    now = inputs(loaded)
    for key, before in (loaded.lock.get("inputs") or {}).items():
        files, present = before.get("files", {}), now.get(key, {}).get("files", {})
        for name in files:
            if name not in present:
                lines.append(f"{key}: {name} is missing")
            elif present[name] != files[name]:
                lines.append(f"{key}: {name} has changed")
        lines += [f"{key}: {name} is new" for name in present if name not in files]
    current = versions()
    for package, before in (loaded.lock.get("versions") or {}).items():
        if current.get(package) != before:
            lines.append(f"{package}: {before} then, {current.get(package, 'not installed')} now")
    return lines


def inputs(loaded: LoadedRecipe) -> dict[str, Any]:
    """Recipe path → what the file or folder it names holds: name → size and hash."""
    found = {}
    records: dict[Path, dict[str, Any]] = {}  # the same text is often named more than once
    for path, text in named_paths(loaded.data):
        try:
            files = list(_files(text))
        except InputError:
            continue  # an asset that is not installed; the stage that needs it says so
        for _, file in files:
            if file not in records:
                records[file] = file_record(file)
        if files:
            shown = loaded.environment.get(path, text)
            found[path] = {"path": shown, "files": {name: records[file] for name, file in files}}
    return found


def file_record(file: Path) -> dict[str, Any]:
    """Size and SHA-256 of a file; of the header only for safetensors files over 1 GiB, and then called so."""
    size = file.stat().st_size
    if size > WHOLE_FILE_LIMIT and file.suffix == ".safetensors":
        # a damaged one is reported when the model is opened
        with suppress(InputError):
            return {"bytes": size, "safetensors_header_sha256": hashlib.sha256(header_bytes(file)).hexdigest()}
    found = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(_CHUNK):
            found.update(chunk)
    return {"bytes": size, "sha256": found.hexdigest()}


def versions() -> dict[str, str]:
    """Versions of Python, of the packages that matter and of those that bring plug-ins, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | plugins.packages()


def git_state() -> dict[str, Any] | None:
    """Commit of the source tree llmcompress runs from and whether it has changes; None outside a git checkout."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return None
    commit = _git(root, "rev-parse", "HEAD")
    if commit is None:
        return None
    changes = _git(root, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed": bool(changes)}


def hardware() -> dict[str, Any]:
    """Processor, cores, memory and GPUs, without importing torch."""
    import psutil

    return {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "ram_bytes": int(psutil.virtual_memory().total),
        "system": f"{platform.system()} {platform.machine()}",
        "gpus": _gpus(),
    }


def _files(text: str) -> Iterator[tuple[str, Path]]:
    """Name and path of each file that a recipe value stands for, sorted."""
    for path in matches(text):
        if path.is_file():
            yield path.name, path
        elif path == resolve_path(text):
            patterns = MODEL_FILES if (path / "config.json").exists() else ("**/*",)
            for file in sorted({f for pattern in patterns for f in path.glob(pattern) if f.is_file()}):
                yield file.relative_to(path).as_posix(), file


def _name(file: Path) -> str:
    """A recipe file without the folders above the project or the package."""
    from llmcompress.recipe.catalog import ROOT

    root = ROOT.resolve()
    return file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def processor() -> str:
    """Name of the processor, as far as the system tells it."""
    if CPUINFO.exists():
        for line in CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    elif found := shutil.which("sysctl", path="/usr/sbin:/sbin"):
        # macOS; platform.processor() says "arm" there
        done = subprocess.run([found, "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """Model names of NVIDIA devices, from the driver's files."""
    found = []
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                found.append(line.partition(":")[2].strip())
    return found
