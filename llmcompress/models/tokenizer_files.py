"""What a tokenizer's files say beside its vocabulary, read without loading it. Torch-free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llmcompress.errors import InputError

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
# those that single families have instead of them
_OTHERS = ("*.model", "*.tiktoken", "tekken.json")


def has_tokenizer(folder: Path) -> bool:
    """Whether a folder has any file that a vocabulary can be read from."""
    known = any((folder / name).is_file() for name in TOKENIZER_FILES)
    return known or any(True for pattern in _OTHERS for _ in folder.glob(pattern))


def no_tokenizer(folder: Path, why: str | None = None) -> InputError:
    """The refusal of a folder without a tokenizer.

    Args:
        folder: The folder.
        why: What is wrong with the one that is there; None where there is none.
    """
    why = why or f"none of {', '.join(TOKENIZER_FILES)} is there"
    return InputError(f"{folder}: no usable tokenizer: {why}", "copy tokenizer.json here or set model.tokenizer")


def tokenizer_settings(folder: Path) -> dict[str, Any]:
    """``tokenizer_config.json`` of a folder; nothing where it is missing or cannot be read."""
    path = folder / "tokenizer_config.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def chat_template(folder: Path) -> str | None:
    """The template, Jinja text, by which the tokenizer of a folder writes chats; None where it has none."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = tokenizer_settings(folder).get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
    if isinstance(template, Mapping):
        # several by name: chats take the default one
        template = template.get("default")
    return template if isinstance(template, str) else None
