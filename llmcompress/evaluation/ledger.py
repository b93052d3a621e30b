"""Finished parts of a measurement, each a file of its own, so that a killed run continues."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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

    def keep_requests(self, side: str, samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        """Write what lm-eval asked and what came of it, one request a line, in the form of its ``--log_samples``.

        ``<side>.<task>.jsonl`` in the folder ``requests`` beside the parts; nothing without a folder.

        Args:
            side: Which model.
            samples: Samples of lm-eval's results, by task.
        """
        if self._folder is None:
            return
        from lm_eval.utils import handle_non_serializable, sanitize_list

        folder = self._folder.parent / "requests"
        folder.mkdir(exist_ok=True)
        for task, rows in samples.items():
            lines = []
            for row in rows:
                asked = {
                    f"gen_args_{i}": {f"arg_{j}": part for j, part in enumerate(parts)}
                    for i, parts in enumerate(row["arguments"])
                }
                answers = {key: sanitize_list(row[key]) for key in ("resps", "filtered_resps")}
                kept = {**row, **answers, "arguments": asked, "target": str(row["target"])}
                lines.append(json.dumps(kept, default=handle_non_serializable, ensure_ascii=False) + "\n")
            write_durably(folder / f"{part_name(f'{side}.{task}')}l", "".join(lines).encode())

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / part_name(key)
