"""Where models and texts named in a recipe are. Torch-free."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError, command_line
from llmcompress.models.lora_checkpoint import is_adapter, not_a_model

ASSET = "asset:"
# folder inside an artifact that holds low-rank adapters, in PEFT's format
ADAPTER = "adapter"
# keys of recipe sections whose value names a file or a folder that a run reads
PATH_KEYS = frozenset({"path", "test_path", "tasks_dir", "tokenizer"})
# what is read of a model folder; it also holds things that no run reads
MODEL_FILES = (
    "*.json", "*.safetensors", "*.model", "*.tiktoken", "merges.txt", "vocab.txt", "*.jinja", "chat_templates/*.jinja",
    "additional_chat_templates/*.jinja", f"{ADAPTER}/*.json", f"{ADAPTER}/*.safetensors",
)  # fmt: skip
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def assets_folder() -> Path:
    """Folder of the assets that ship with the package."""
    return Path(str(files("llmcompress"))) / "_recipes" / "assets"


def resolve_path(text: str, base: Path | None = None) -> Path:
    """Turn a path of a recipe into a path on disk.

    Args:
        text: ``asset:NAME`` for something shipped with the package, otherwise a path; ``~`` is expanded. ``ORG/NAME``
            that is no path here is looked up in the hub's cache on this machine; nothing is fetched.
        base: What relative paths are relative to; the current folder by default.

    Returns:
        The path; it need not exist unless it names an asset.

    Raises:
        InputError: There is no such asset.
    """
    if not text.startswith(ASSET):
        path = Path(text).expanduser()
        path = path if path.is_absolute() or base is None else base / path
        return path if path.exists() else (cached_snapshot(text) or path)
    root, name = assets_folder(), Path(text.removeprefix(ASSET))
    path = (root / name).absolute()
    if ".." in name.parts or name.is_absolute() or not path.exists():
        known = ", ".join(sorted(f"{ASSET}{p.name}" for p in root.iterdir())) if root.is_dir() else "none installed"
        raise InputError(f"{text}: no such asset", f"shipped assets: {known}")
    return path


def hub_cache() -> Path:
    """Where the hub's client keeps what it has downloaded, by its own environment variables."""
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "huggingface" / "hub"


def cached_snapshot(text: str) -> Path | None:
    """Folder of a model in the hub's cache, read only.

    Args:
        text: ``ORG/NAME``.

    Returns:
        The snapshot that the branch ``main`` points to, or the only one; None where there is none.
    """
    if not _HUB_NAME.fullmatch(text):
        return None
    folder = hub_cache() / f"models--{text.replace('/', '--')}"
    main = folder / "refs" / "main"
    try:
        found = folder / "snapshots" / main.read_text(encoding="ascii").strip()
        if found.is_dir() and found.parent == folder / "snapshots":
            return found
        there = [path for path in (folder / "snapshots").iterdir() if path.is_dir()]
    except FileNotFoundError:
        there = [path for path in folder.glob("snapshots/*") if path.is_dir()]
    except (OSError, ValueError):
        return None
    return there[0] if len(there) == 1 else None


def named_paths(data: Any, prefix: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    """Dotted path and text of every value of a recipe, as plain data, that names a file or folder."""
    if isinstance(data, Mapping):
        for name, value in data.items():
            yield from named_paths(value, f"{prefix}.{name}" if prefix else str(name), str(name))
    elif isinstance(data, list | tuple):
        for index, value in enumerate(data):
            yield from named_paths(value, f"{prefix}.{index}", key)
    elif isinstance(data, str) and key in PATH_KEYS and data:
        yield prefix, data


def matches(text: str) -> list[Path]:
    """Files and folders that a path of a recipe stands for, sorted; empty when there are none.

    Args:
        text: ``asset:NAME``, a path, or a pattern with ``*``. What exists under the very name is no pattern, also when
            the name has brackets in it.

    Raises:
        InputError: There is no such asset.
    """
    path = resolve_path(text)
    if path.exists():
        return [path]
    if not glob.has_magic(str(path)):
        return []
    return sorted(Path(found) for found in glob.glob(str(path), recursive=True))  # noqa: PTH207 - it may be absolute


def no_model_folder(text: str) -> InputError:
    """The error for a path that is not a folder, with the step that most likely helps."""
    hint = "give a folder with config.json and safetensors files"
    if (file := Path(text)).is_file():
        if (file.parent / "config.json").is_file():
            hint = f"give the folder: {file.parent}"
        elif file.suffix == ".gguf":
            hint = "GGUF is written, not read: give the folder that the file was made from (config.json, safetensors)"
        return InputError(f"{text}: a file, not a model folder", hint)
    # what stands in a folder that is here was meant as a path
    if _HUB_NAME.fullmatch(text) and not Path(text).parent.is_dir():
        what = f"{text}: no such model folder, and no model of that name in the hub's cache ({hub_cache()})"
        return InputError(what, f"nothing is fetched by itself; to put it there: hf download {text}")
    return InputError(f"{text}: no such model folder", hint)


def or_artifact(path: Path) -> Path:
    """The artifact of a run folder; any other folder as it is."""
    found = path / "artifact"
    return found if not (path / "config.json").exists() and (found / "config.json").exists() else path


def checkpoint_hint(folder: Path) -> str | None:
    """What to name instead of a trainer's folder that holds nothing but checkpoints; None for other folders."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]
    last = max(found, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)
    return None if last is None else f"name one of the checkpoints in it, such as {last}"


def model_folder(text: str) -> Path:
    """Folder of a model: the one named, or the artifact of the run it names.

    Args:
        text: A folder, or ``asset:NAME``.

    Raises:
        InputError: There is no model.
    """
    path = resolve_path(text)
    if not path.is_dir():
        raise no_model_folder(text)
    path = or_artifact(path)
    if not (path / "config.json").is_file():
        if is_adapter(path):
            raise not_a_model(path)
        hint = f"finish the run first: {command_line('resume', text)}" if (path / "run.json").exists() else None
        if hint is None and (ggufs := sorted(path.glob("*.gguf"))):
            hint = f"{ggufs[0].name} is for llama.cpp and the like; give the folder it was exported from"
        hint = hint or checkpoint_hint(path)
        raise InputError(f"{text}: no config.json there", hint or "give a folder in the Hugging Face layout")
    return path
