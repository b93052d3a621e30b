"""Vocabularies as files say them: whether two models mean the same by a token id, without loading a tokenizer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class VocabularyDifference:
    """How the token ids of one model differ from another's.

    Attributes:
        changed: Ids that both have and that stand for different tokens.
        missing: Ids that only the first has.
        added: Ids that only the second has.
    """

    changed: int
    missing: int
    added: int

    def __str__(self) -> str:
        words = {"stand for other tokens": self.changed, "are missing": self.missing, "are new": self.added}
        return ", ".join(f"{count} token ids {what}" for what, count in words.items() if count)


def token_ids(folder: Path) -> dict[int, str] | None:
    """Token of each id, from a folder's ``tokenizer.json``; None where there is none, or none that can be read so.

    Models of Hugging Face's ``tokenizers`` hold an object (BPE, WordPiece, WordLevel) or a list (Unigram); added tokens
    replace what the list says of their ids.
    """
    try:
        data = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
        words = data["model"]["vocab"]
        if isinstance(words, dict):
            found = {int(place): str(word) for word, place in words.items()}
        else:
            found = {place: str(word) for place, (word, _) in enumerate(words)}
        return found | {int(token["id"]): str(token["content"]) for token in data.get("added_tokens", [])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def vocabulary_difference(first: Path, second: Path) -> VocabularyDifference | None:
    """How the vocabulary in folder ``second`` differs from that in ``first``.

    Returns:
        None where they are the same, and where either folder has no vocabulary that can be read.
    """
    ours, theirs = token_ids(first), token_ids(second)
    if ours is None or theirs is None or ours == theirs:
        return None
    both = ours.keys() & theirs.keys()
    changed = sum(ours[place] != theirs[place] for place in both)
    return VocabularyDifference(changed, len(ours) - len(both), len(theirs) - len(both))
