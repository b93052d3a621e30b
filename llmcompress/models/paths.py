"""Where models and texts named in a recipe are. Torch-free."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from llmcompress.errors import InputError

ASSET = "asset:"
# folder inside an artifact that holds low-rank adapters, in PEFT's format
ADAPTER = "adapter"


def assets_folder() -> Path:
    """Folder of the assets that ship with the package."""
    return Path(str(files("llmcompress"))) / "_recipes" / "assets"


def resolve_path(text: str, base: Path | None = None) -> Path:
    """Turn a path of a recipe into a path on disk.

    Args:
        text: ``asset:NAME`` for something shipped with the package, otherwise a path; ``~`` is expanded.
        base: What relative paths are relative to; the current folder by default.

    Returns:
        The path; it need not exist unless it names an asset.

    Raises:
        InputError: There is no such asset.
    """
    if not text.startswith(ASSET):
        path = Path(text).expanduser()
        return path if path.is_absolute() or base is None else base / path
    root, name = assets_folder(), Path(text.removeprefix(ASSET))
    path = (root / name).absolute()
    if ".." in name.parts or name.is_absolute() or not path.exists():
        known = ", ".join(sorted(f"{ASSET}{p.name}" for p in root.iterdir())) if root.is_dir() else "none installed"
        raise InputError(f"{text}: no such asset", f"shipped assets: {known}")
    return path
