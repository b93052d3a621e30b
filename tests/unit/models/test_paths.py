from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.errors import InputError
from llmcompress.models.paths import assets_folder, matches, no_model_folder, resolve_path


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


def test_what_exists_under_the_very_name_is_no_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "model [a]"
    folder.mkdir()
    for name in ("b.txt", "a.txt"):
        (folder / name).touch()
    assert matches(str(folder)) == [folder]
    assert matches(str(folder / "a.txt")) == [folder / "a.txt"]
    assert matches(str(tmp_path / "*" / "*.txt")) == [folder / "a.txt", folder / "b.txt"]
    assert matches(str(tmp_path / "gone")) == matches(str(tmp_path / "*.gone")) == []


def test_a_path_that_is_no_model_folder_gets_the_step_that_helps(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert "a file, not a model folder" in str(no_model_folder(str(file)))
    assert "hf download org/Model-1B" in str(no_model_folder("org/Model-1B").hint)
    assert "hf download" not in str(no_model_folder("/models/m").hint)
