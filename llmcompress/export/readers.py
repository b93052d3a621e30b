"""Read access to a folder of safetensors shards, for comparing what was written."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from llmcompress.errors import ExportError

if TYPE_CHECKING:
    from pathlib import Path
    from types import TracebackType

    from torch import Tensor


class SafetensorsFolder:
    """All tensors of the ``*.safetensors`` files in a folder, opened lazily through mmap.

    Raises:
        ExportError: There are no such files, one is damaged, or two hold the same name.
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        self.folder = folder
        self._stack = ExitStack()
        self._where: dict[str, Any] = {}
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise ExportError(f"{folder}: no safetensors files")
        for path in files:
            try:
                handle = self._stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ExportError(f"{path}: does not read back: {error}") from error
            for name in handle.keys():  # noqa: SIM118 - not a dict
                if name in self._where:
                    raise ExportError(f"{path}: {name} is in two files")
                self._where[name] = handle

    def __enter__(self) -> SafetensorsFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

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
        return self._where[name].get_tensor(name)
