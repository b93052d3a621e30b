from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llmcompress.errors import ExportError
from llmcompress.export.readers import SafetensorsFolder


def test_a_damaged_shard_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00notjson!")
    with pytest.raises(ExportError, match="does not read back"):
        SafetensorsFolder(tmp_path)


def test_no_files_and_doubled_names_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no safetensors files"):
        SafetensorsFolder(tmp_path)
    for name in ("a", "b"):
        save_file({"w": torch.zeros(1)}, tmp_path / f"{name}.safetensors")
    with pytest.raises(ExportError, match="w is in two files"):
        SafetensorsFolder(tmp_path)
