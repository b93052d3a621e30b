"""Tokenizer metadata of a GGUF file, for byte-level BPE tokenizers.

llama.cpp knows a tokenizer by a name for its pre-tokenization, not by its rules, so only
tokenizers whose rules match a known name can be written; others are refused.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llmcompress.errors import ExportError
from llmcompress.models.tokenizer_files import chat_template, tokenizer_settings

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

# pre-tokenizer rules that llama.cpp implements under a name; the expressions are part of the tokenizers
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
_QWEN2 = _WORDS + r"\p{N}" + _REST
_SPLITS = {_LLAMA3: "llama-bpe", _QWEN2: "qwen2"}
# under some names words that are tokens are taken whole (``ignore_merges``), under others merges alone make them
_WHOLE_WORDS = {"llama-bpe": "dbrx"}


@dataclass(frozen=True, slots=True)
class TokenizerFacts:
    """What a GGUF file says about a tokenizer.

    Attributes:
        pre: llama.cpp's name of the pre-tokenization.
        tokens, types, merges: The vocabulary in id order, llama.cpp's token types, merge rules.
        special: ``bos``, ``eos``, ``unk``, ``pad`` → id, those that exist.
        add_bos, add_eos: Whether the tokenizer puts these around a text.
        chat_template: Jinja text or None.
    """

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def tokenizer_problems(folder: Path | None, vocab: int | None = None) -> list[str]:
    """Why the tokenizer in ``folder`` cannot be written; empty when it can.

    Args:
        folder: Holds ``tokenizer.json``; None where the model has no tokenizer.
        vocab: Rows of the embedding, None to leave ids unchecked.
    """
    if folder is None or not (folder / "tokenizer.json").is_file():
        return ["the model has no tokenizer.json, and a GGUF file without tokenizer is of no use"]
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"tokenizer.json cannot be read: {error}"]
    model = data.get("model") or {}
    if model.get("type") != "BPE" or model.get("byte_fallback"):
        return [
            "the tokenizer is not byte-level BPE (SentencePiece tokenizers are not written here); "
            "export the dense format and run llama.cpp's own converter on it"
        ]
    if model.get("continuing_subword_prefix") or model.get("end_of_word_suffix"):
        return ["the tokenizer marks where words go on or end, which llama.cpp's byte-level BPE does not"]
    if data.get("normalizer") not in (None, {"type": "NFC"}):
        return ["the tokenizer normalises text in a way that llama.cpp does not"]
    if pre_tokenization(data.get("pre_tokenizer") or {}, bool(model.get("ignore_merges"))) is None:
        return ["llama.cpp has no name for the tokenizer's pre-tokenization rules that this exporter knows"]
    last = max(_tokens(data), default=-1)
    if vocab is not None and last >= vocab:
        return [f"the tokenizer has token {last}, but the embedding only {vocab} rows"]
    return []


def _tokens(data: Mapping[str, Any]) -> dict[int, str]:
    """Id → token of a ``tokenizer.json``; an added token takes the place of one of the vocabulary."""
    found = {index: token for token, index in data["model"].get("vocab", {}).items()}
    return found | {entry["id"]: entry["content"] for entry in data.get("added_tokens") or []}


def pre_tokenization(rules: Mapping[str, Any], whole_words: bool = False) -> str | None:
    """llama.cpp's name for a tokenizer's rules, None when there is none.

    Args:
        rules: ``pre_tokenizer`` of a ``tokenizer.json``.
        whole_words: Its ``ignore_merges``: a word that is a token becomes that one, whatever merges would make of it.
    """
    name = _split_name(rules)
    if name in _WHOLE_WORDS:
        return name if whole_words else _WHOLE_WORDS[name]
    return None if whole_words else name


def _split_name(rules: Mapping[str, Any]) -> str | None:
    steps = list(rules.get("pretokenizers") or [rules])
    byte_level = [step for step in steps if step.get("type") == "ByteLevel"]
    others = [step for step in steps if step.get("type") != "ByteLevel"]
    if len(byte_level) != 1 or byte_level[0].get("add_prefix_space"):
        return None
    if not others:
        return "gpt-2" if byte_level[0].get("use_regex", True) else None
    if len(others) > 1:
        return None
    if others[0].get("type") == "Digits":
        return "smollm" if others[0].get("individual_digits") and byte_level[0].get("use_regex", True) else None
    pattern = str((others[0].get("pattern") or {}).get("Regex"))
    isolated = others[0].get("type") == "Split" and others[0].get("behavior") == "Isolated"
    return _SPLITS.get(pattern) if isolated and not byte_level[0].get("use_regex", True) else None


def read_tokenizer(folder: Path, vocab: int, config: Mapping[str, Any]) -> TokenizerFacts:
    """Read a byte-level BPE tokenizer.

    Args:
        folder: Holds ``tokenizer.json``.
        vocab: Rows of the embedding; ids beyond the tokenizer's are filled with unused tokens.
        config: The model's config, used where the tokenizer does not name its special tokens.

    Raises:
        ExportError: See :func:`tokenizer_problems`.
    """
    problems = tokenizer_problems(folder, vocab)
    if problems:
        raise ExportError("\n".join(problems))
    data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    added = {entry["id"]: entry for entry in data.get("added_tokens") or []}
    by_id = _tokens(data)
    tokens, types = [], []
    for index in range(vocab):
        tokens.append(by_id.get(index, f"[PAD{index}]"))
        if index in added:
            types.append(CONTROL if added[index].get("special") else USER_DEFINED)
        else:
            types.append(NORMAL if index in by_id else UNUSED)
    merges = [rule if isinstance(rule, str) else " ".join(rule) for rule in data["model"]["merges"]]
    settings = tokenizer_settings(folder)
    special = _special_ids(settings, {token: index for index, token in by_id.items()}, config)
    first, last = _template_ends(data.get("post_processor") or {})
    return TokenizerFacts(
        pre=str(pre_tokenization(data["pre_tokenizer"], bool(data["model"].get("ignore_merges")))),
        tokens=tokens,
        types=types,
        merges=merges,
        special=special,
        add_bos=first is not None and first == _content(settings.get("bos_token")),
        add_eos=last is not None and last == _content(settings.get("eos_token")),
        chat_template=chat_template(folder),
    )


def _content(value: Any) -> str | None:
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _special_ids(settings: Mapping[str, Any], ids: Mapping[str, int], config: Mapping[str, Any]) -> dict[str, int]:
    found = {}
    for key in ("bos", "eos", "unk", "pad"):
        content = _content(settings.get(f"{key}_token"))
        if content is not None and content in ids:
            found[key] = ids[content]
        else:
            value = config.get(f"{key}_token_id")
            value = value[0] if isinstance(value, list) and value else value
            if isinstance(value, int) and not isinstance(value, bool):
                found[key] = value
    return found


def _template_ends(processor: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Special tokens that the post-processor puts before and after a single text."""
    for step in processor.get("processors") or [processor]:
        if step.get("type") == "TemplateProcessing":
            names = [next(iter(piece.values())).get("id") for piece in step.get("single") or [{"Sequence": {}}]]
            kinds = [next(iter(piece)) for piece in step.get("single") or []]
            if not kinds:
                return None, None
            first = names[0] if kinds[0] == "SpecialToken" else None
            return first, names[-1] if kinds[-1] == "SpecialToken" else None
    return None, None
