from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llmcompress.errors import ExportError
from llmcompress.export.gguf import GGUFExporter
from llmcompress.export.gguf_tokenizer import _LLAMA3, _QWEN2, CONTROL, NORMAL, UNUSED, pre_tokenization, read_tokenizer

MODEL = {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}


def split(pattern: str) -> dict[str, Any]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"type": "Sequence", "pretokenizers": [step, {**BYTE_LEVEL, "use_regex": False}]}


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        (BYTE_LEVEL, "gpt-2"),
        ({**BYTE_LEVEL, "add_prefix_space": True}, None),
        # without the word the step splits by its own rules
        ({"type": "ByteLevel", "add_prefix_space": False}, "gpt-2"),
        ({"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}, None),
        ({"type": "Sequence", "pretokenizers": [split(_QWEN2)["pretokenizers"][0], BYTE_LEVEL]}, None),
        ({"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": False}, BYTE_LEVEL]}, None),
        (split(_LLAMA3), "dbrx"),
        (split(_QWEN2), "qwen2"),
        (split(r"\s+"), None),
        (
            {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]},
            "smollm",
        ),
        ({"type": "Metaspace"}, None),
        ({}, None),
    ],
)
def test_pre_tokenization_is_known_by_its_rules(rules: dict[str, Any], name: str | None) -> None:
    assert pre_tokenization(rules) == name


@pytest.mark.parametrize(("rules", "name"), [(split(_LLAMA3), "llama-bpe"), (split(_QWEN2), None), (BYTE_LEVEL, None)])
def test_words_that_are_tokens_are_taken_whole_under_other_names(rules: dict[str, Any], name: str | None) -> None:
    assert pre_tokenization(rules, whole_words=True) == name


def write_tokenizer(folder: Path, **changes: Any) -> None:
    data = {
        "model": MODEL,
        "pre_tokenizer": BYTE_LEVEL,
        "added_tokens": [{"id": 3, "content": "<s>", "special": True}],
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        },
        **changes,
    }
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}}))


def test_vocabulary_types_and_special_tokens(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    facts = read_tokenizer(tmp_path, 5, {"eos_token_id": [2, 3]})
    assert facts.tokens == ["a", "b", "ab", "<s>", "[PAD4]"]
    assert facts.types == [NORMAL, NORMAL, NORMAL, CONTROL, UNUSED]
    assert facts.merges == ["a b"]
    assert facts.special == {"bos": 3, "eos": 2}
    assert (facts.add_bos, facts.add_eos) == (True, False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": {"type": "Unigram", "vocab": []}}, "not byte-level BPE"),
        ({"model": {"type": "BPE", "byte_fallback": True, "vocab": {}}}, "not byte-level BPE"),
        ({"model": {**MODEL, "end_of_word_suffix": "</w>"}}, "where words go on or end"),
        ({"model": {**MODEL, "continuing_subword_prefix": "##"}}, "where words go on or end"),
        ({"model": {**MODEL, "ignore_merges": True}}, "pre-tokenization"),
        ({"normalizer": {"type": "Lowercase"}}, "normalises"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre-tokenization"),
    ],
)
def test_other_tokenizers_are_refused(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    write_tokenizer(tmp_path, **changes)
    with pytest.raises(ExportError, match=words):
        read_tokenizer(tmp_path, 5, {})


def test_a_tokenizer_larger_than_the_embedding_is_refused(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    with pytest.raises(ExportError, match="has token 3, but the embedding only 3 rows"):
        read_tokenizer(tmp_path, 3, {})
    # known from the config, before any work
    pytest.importorskip("gguf")
    assert GGUFExporter().source_refusals(tmp_path, {"vocab_size": 4}) == []
    (problem,) = GGUFExporter().source_refusals(tmp_path, {"vocab_size": 3})
    assert "only 3 rows" in problem


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ messages }}", "{{ messages }}"),
        ([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "chat"}], "chat"),
        ([{"name": "tool_use", "template": "tools"}], None),
        (None, None),
    ],
)
def test_the_chat_template_is_the_default_one(tmp_path: Path, template: Any, expected: str | None) -> None:
    write_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "chat_template": template}))
    assert read_tokenizer(tmp_path, 4, {}).chat_template == expected
