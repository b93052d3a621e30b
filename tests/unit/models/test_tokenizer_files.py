"""Chat templates are found by the files alone as transformers finds them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from llmcompress.cli.app import invoke
from llmcompress.cli.look_ahead import require_tokenizer
from llmcompress.errors import InputError
from llmcompress.models.paths import assets_folder
from llmcompress.models.tokenizer_files import chat_template
from llmcompress.recipe.load import load_recipe

NAMED = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chats"}]


@pytest.mark.parametrize(
    ("settings", "file", "found"),
    [
        ({}, None, None),
        ({"chat_template": None}, None, None),
        ({"chat_template": "chats"}, None, "chats"),
        ({"chat_template": NAMED}, None, "chats"),
        ({"chat_template": {"default": "chats", "tool_use": "tools"}}, None, "chats"),
        ({"chat_template": NAMED[:1]}, None, None),
        ({"chat_template": "old"}, "chats", "chats"),
        ({}, "chats", "chats"),
    ],
)
def test_what_chats_are_written_by(
    settings: dict[str, Any], file: str | None, found: str | None, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    from llmcompress.models.handle import load_tokenizer

    tiny_tokenizer.save_pretrained(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    if file is not None:
        (tmp_path / "chat_template.jinja").write_text(file)
    assert chat_template(tmp_path) == found
    theirs = load_tokenizer(tmp_path)
    if found is None:
        with pytest.raises(ValueError, match="template"):
            theirs.get_chat_template()
    else:
        assert theirs.get_chat_template() == found


def test_no_settings_are_no_template(tmp_path: Path) -> None:
    assert chat_template(tmp_path) is None
    (tmp_path / "tokenizer_config.json").write_text("[broken")
    assert chat_template(tmp_path) is None


@pytest.mark.parametrize("words", [[], ["stages.calibrate.source={kind: synthetic}"]])
def test_a_model_without_a_tokenizer_is_refused_before_any_work(tmp_path: Path, words: list[str]) -> None:
    loaded = load_recipe("smoke/rtn_tiny", words)
    with pytest.raises(InputError, match="no usable tokenizer: none of"):
        require_tokenizer(loaded, tmp_path)
    silent = [*words, "stages.calibrate.source={kind: synthetic}", "stages.evaluate~"]
    require_tokenizer(load_recipe("smoke/rtn_tiny", silent), tmp_path)
    problems = "{type: s2r_evaluate, task: {kind: countdown}}"
    with pytest.raises(InputError, match="no usable tokenizer: none of"):
        require_tokenizer(load_recipe("smoke/rtn_tiny", [*silent, f"+stages.after@quantize={problems}"]), tmp_path)
    stages = load_recipe("smoke/s2r_tiny").stages()
    assert all(stage.reads_text() for stage in stages if stage.config.type.startswith("s2r_"))
    # any file that a vocabulary can be read from is left to transformers
    (tmp_path / "tekken.json").write_text("{}")
    require_tokenizer(loaded, tmp_path)


def test_another_folders_tokenizer_will_do(tmp_path: Path) -> None:
    loaded = load_recipe("smoke/rtn_tiny", [f"model.tokenizer={tmp_path}"])
    with pytest.raises(InputError, match="no usable tokenizer"):
        require_tokenizer(loaded, Path(loaded.recipe.model.path))
    (tmp_path / "tokenizer.json").write_text("{}")
    require_tokenizer(loaded, tmp_path / "model")


@pytest.mark.parametrize("command", ["plan", "validate"])
def test_what_needs_no_run_refuses_it_as_well(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = assets_folder() / "reference_moe"
    bare = shutil.copytree(source, tmp_path / "bare", ignore=shutil.ignore_patterns("token*"))
    assert invoke([command, "smoke/rtn_tiny", f"model.path={bare}"]) == 4
    assert "no usable tokenizer" in capsys.readouterr().err
    assert invoke([command, "smoke/rtn_tiny", f"model.path={bare}", f"model.tokenizer={source}"]) == 0
