"""Chat templates are found by the files alone as transformers finds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.models.tokenizer_files import chat_template

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
