"""Finished parts of a measurement, each a file of its own, so that a killed run continues."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmcompress.durable import write_durably


def part_name(key: str) -> str:
    """File name of a part. Keys hold names from recipes: what a file name cannot hold is escaped, injectively."""
    safe = "".join(c if c.isalnum() or c in "-_." else f"%{ord(c):x}" for c in key)
    return f"{safe}.json"


class Ledger:
    """Finished parts by key, in a folder or, without one, in memory.

    Args:
        folder: Where each part becomes one JSON file, durably; None keeps parts in memory only.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._memory: dict[str, Any] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Any | None:
        """The part, or None when it is not finished."""
        if self._folder is None:
            return self._memory.get(key)
        path = self._path(key)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def put(self, key: str, value: Any) -> Any:
        """Keep a finished part and return it."""
        if self._folder is None:
            self._memory[key] = value
        else:
            write_durably(self._path(key), json.dumps(value, sort_keys=True).encode())
        return value

    def has(self, key: str) -> bool:
        """Whether the part is finished."""
        return self.get(key) is not None

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / part_name(key)
