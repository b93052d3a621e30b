"""Token ids as ``tokenizer.json`` says them, and how two models' differ."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.models.vocabulary import token_ids, vocabulary_difference

Words = dict[str, int] | list[list[Any]]


def folder(path: Path, vocab: Words, added: tuple[tuple[int, str], ...] = ()) -> Path:
    path.mkdir()
    tokens = [{"id": place, "content": word} for place, word in added]
    data = {"model": {"vocab": vocab}, "added_tokens": tokens}
    (path / "tokenizer.json").write_text(json.dumps(data), encoding="utf-8")
    return path


@pytest.mark.parametrize("vocab", [{"a": 0, "b": 1}, [["a", -1.0], ["b", -2.0]]])
def test_ids_of_objects_and_lists_with_added_tokens(tmp_path: Path, vocab: Words) -> None:
    assert token_ids(folder(tmp_path / "x", vocab, ((1, "<end>"), (2, "<pad>")))) == {0: "a", 1: "<end>", 2: "<pad>"}


def test_differences_are_counted_by_id(tmp_path: Path) -> None:
    first = folder(tmp_path / "first", {"a": 0, "b": 1, "c": 2, "d": 3})
    second = folder(tmp_path / "second", {"b": 0, "a": 1, "c": 2}, ((9, "<new>"),))
    found = vocabulary_difference(first, second)
    assert found is not None
    assert (found.changed, found.missing, found.added) == (2, 1, 1)
    assert str(found) == "2 token ids stand for other tokens, 1 token ids are missing, 1 token ids are new"
    assert vocabulary_difference(first, folder(tmp_path / "same", {"d": 3, "c": 2, "b": 1, "a": 0})) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"model": {"vocab": 3}}', '{"model": {"vocab": [1]}}'])
def test_what_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    first = folder(tmp_path / "first", {"a": 0})
    second = folder(tmp_path / "second", {"b": 0})
    assert vocabulary_difference(first, second) is not None
    (second / "tokenizer.json").write_text(text, encoding="utf-8")
    assert vocabulary_difference(first, second) is None
    (second / "tokenizer.json").unlink()
    assert vocabulary_difference(first, second) is None
