from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.errors import InputError
from llmcompress.models.paths import assets_folder, resolve_path


def test_plain_paths(tmp_path: Path) -> None:
    assert resolve_path("models/a") == Path("models/a")
    assert resolve_path("models/a", tmp_path) == tmp_path / "models/a"
    assert resolve_path("/models/a", tmp_path) == Path("/models/a")
    assert resolve_path("~/a") == Path.home() / "a"


def test_assets() -> None:
    assert resolve_path("asset:text").is_dir()
    assert resolve_path("asset:text/heldout.jsonl.gz").parent.parent == assets_folder().absolute()


@pytest.mark.parametrize("name", ["asset:nothing", "asset:../base", "asset:/etc/passwd"])
def test_unknown_assets_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="no such asset") as caught:
        resolve_path(name)
    assert "asset:text" in str(caught.value.hint)
