from __future__ import annotations

from pathlib import Path

import pytest

from llmcompress.errors import InputError
from llmcompress.models.checkpoint import read_config
from llmcompress.models.paths import (
    assets_folder,
    cached_snapshot,
    matches,
    model_folder,
    no_model_folder,
    resolve_path,
)


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


def test_the_hubs_cache_is_read_and_a_folder_here_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.delenv("HUGGINGFACE_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "models--org--Model-1B"
    assert str(folder.parent) in str(no_model_folder("org/Model-1B"))
    for commit in ("aaa", "bbb"):
        (folder / "snapshots" / commit).mkdir(parents=True)
    # two snapshots and nothing that says which
    assert cached_snapshot("org/Model-1B") is None and resolve_path("org/Model-1B") == Path("org/Model-1B")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("bbb\n")
    assert resolve_path("org/Model-1B") == folder / "snapshots" / "bbb"
    (folder / "snapshots" / "bbb" / "config.json").write_text("{}")
    assert model_folder("org/Model-1B") == folder / "snapshots" / "bbb"
    (folder / "refs" / "main").write_text("../../elsewhere")
    assert cached_snapshot("org/Model-1B") is None
    (folder / "snapshots" / "aaa").rmdir()
    assert cached_snapshot("org/Model-1B") == folder / "snapshots" / "bbb"
    assert cached_snapshot("org/Other") is None and cached_snapshot("./org/Model-1B") is None
    (tmp_path / "org" / "Model-1B").mkdir(parents=True)
    assert resolve_path("org/Model-1B") == Path("org/Model-1B")


def test_a_path_that_is_no_model_folder_gets_the_step_that_helps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.touch()
    assert "a file, not a model folder" in str(no_model_folder(str(file)))
    assert "GGUF is written, not read" in str(no_model_folder(str(file)).hint)
    folder = tmp_path / "whole"
    folder.mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).touch()
    assert no_model_folder(str(folder / "model.safetensors")).hint == f"give the folder: {folder}"
    assert "hf download org/Model-1B" in str(no_model_folder("org/Model-1B").hint)
    assert "hf download" not in str(no_model_folder("/models/m").hint)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    assert "hf download" not in str(no_model_folder("runs/gone").hint)


def test_checkpoints_of_a_trainer_are_named(tmp_path: Path) -> None:
    for number in ("90", "500", "best"):
        (tmp_path / f"checkpoint-{number}").mkdir()
    for read in (lambda: model_folder(str(tmp_path)), lambda: read_config(tmp_path)):
        with pytest.raises(InputError) as refused:
            read()
        assert refused.value.hint == f"name one of the checkpoints in it, such as {tmp_path / 'checkpoint-500'}"
