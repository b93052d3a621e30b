"""Read access to a folder of safetensors shards, for comparing what was written."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmcompress.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor


class SafetensorsFolder:
    """All tensors of the ``*.safetensors`` files in a folder, mapped one at a time: mapped pages are resident memory.

    Raises:
        ExportError: There are no such files, one is damaged, or two hold the same name.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self._where: dict[str, Path] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ExportError(f"{folder}: no safetensors files")
        for path in files:
            try:
                with safe_open(path, framework="pt") as handle:
                    names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                raise ExportError(f"{path}: does not read back: {error}") from error
            for name in names:
                if name in self._where:
                    raise ExportError(f"{path}: {name} is in two files")
                self._where[name] = path

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._where = {}

    def names(self) -> set[str]:
        """Names of all tensors."""
        return set(self._where)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor.

        Raises:
            ExportError: There is none of this name.
        """
        if name not in self._where:
            raise ExportError(f"{self.folder}: {name} is missing from what was written")
        from safetensors import safe_open

        with safe_open(self._where[name], framework="pt") as handle:
            found: Tensor = handle.get_tensor(name)
            return found
