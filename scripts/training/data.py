"""Training text: sources, tokenizer, token files, and windows drawn by step.

A batch depends only on the seed and the step, so a killed run that resumes sees the same
batches. The ``recall`` source is made here: windows of the first source into which short
statements ("The word of Anna is river.") are inserted and repeated at growing distance, so that
memory over hundreds of tokens pays. Every repetition after the first is predictable only from
memory.
"""

from __future__ import annotations

import gzip
import json
import lzma
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = [
    "Anna",
    "Tom",
    "Mary",
    "John",
    "Alice",
    "Henry",
    "Clara",
    "George",
    "Emma",
    "Peter",
    "Lucy",
    "James",
    "Sarah",
    "Robert",
    "Helen",
    "Arthur",
    "Jane",
    "Edward",
    "Rose",
    "Frank",
    "Ellen",
    "Hugh",
    "Kate",
    "Martin",
]


@dataclass(frozen=True)
class Source:
    """One domain of the training mix: its file and its share of the sampled windows."""

    name: str
    path: Path
    share: float

    @classmethod
    def parse(cls, text: str) -> Source:
        """Parse ``name=path:share``."""
        name, _, rest = text.partition("=")
        path, _, share = rest.rpartition(":")
        return cls(name, Path(path), float(share))


def read_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of a plain, gzip or xz file of JSON lines."""
    opener = {".gz": gzip.open, ".xz": lzma.open}.get(path.suffix, open)
    with opener(path, "rt", encoding="utf-8") as handle:
        yield from map(json.loads, handle)


def read_texts(path: Path) -> Iterator[str]:
    """Yield the text of each row: its ``text``, or question and answer."""
    for row in read_rows(path):
        yield row["text"] if "text" in row else f"{row['question']}\n{row['answer']}"


def train_tokenizer(sources: list[Source], out: Path, vocab_size: int) -> None:
    """Train a byte-level BPE tokenizer on the mix and save it as a transformers folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )

    def sample() -> Iterator[str]:
        for source in sources:
            budget = int(12e6 * source.share)
            for text in read_texts(source.path):
                piece = text[: min(len(text), 200_000)]
                yield piece
                budget -= len(piece)
                if budget <= 0:
                    break

    tokenizer.train_from_iterator(sample(), trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(out)


def encode(sources: list[Source], out: Path) -> dict[str, Path]:
    """Tokenise each source once into a flat uint16 file; documents are joined by ``</s>``."""
    import numpy as np
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(out)
    files = {}
    for source in sources:
        target = out / "tokens" / f"{source.name}.npy"
        if not target.exists():
            target.parent.mkdir(exist_ok=True)
            pieces = [[*tokenizer.encode(text), tokenizer.eos_token_id] for text in read_texts(source.path)]
            np.save(target, np.concatenate([np.array(p, dtype=np.uint16) for p in pieces]))
        files[source.name] = target
    return files


class Recall:
    """Statements that repeat inside a window of running text.

    Args:
        tokenizer: Its single-token lower-case words are the values.
        values: How many different values.
        longest: Largest distance in tokens between two occurrences of a statement.
    """

    def __init__(self, tokenizer: Any, values: int = 128, longest: int = 900) -> None:
        words = sorted(
            token[1:]
            for token in tokenizer.get_vocab()
            if token.startswith("Ġ") and token[1:].isascii() and token[1:].isalpha() and token[1:].islower()
        )
        words = [word for word in words if len(word) >= 5]
        self.values = words[:: len(words) // values][:values]
        self.longest = longest
        self._tokenizer = tokenizer
        self._cache: dict[tuple[str, str], tuple[list[int], int]] = {}

    def statement(self, name: str, value: str) -> tuple[list[int], int]:
        """Token ids of one statement, and the index of the token that answers it."""
        key = (name, value)
        if key not in self._cache:
            head = self._tokenizer.encode(f"\n\nThe word of {name} is")
            self._cache[key] = (head + self._tokenizer.encode(f" {value}.\n\n"), len(head))
        return self._cache[key]

    def insert(self, text: Any, rng: Any, length: int, pairs: int | None = None) -> tuple[Any, Any, Any]:
        """Insert repeated statements into a window.

        Args:
            text: Token ids of running text, at least ``length`` long.
            rng: numpy generator.
            length: Length of the window made.
            pairs: Number of different names; None draws 1 to 4.

        Returns:
            ids ``[length]`` int64; answer positions ``[n]`` (index into ids of each repeated
            value); the distance of each to its previous occurrence ``[n]``.
        """
        import numpy as np

        pairs = int(rng.integers(1, 5)) if pairs is None else pairs
        places: list[tuple[int, int]] = []
        for which in range(pairs):
            at = int(rng.integers(0, max(2, length // 3)))
            while at < length:
                places.append((at, which))
                at += int(16 * math.exp(rng.uniform(0.0, math.log(self.longest / 16))))
        names = rng.choice(len(NAMES), size=pairs, replace=False)
        chosen = rng.choice(len(self.values), size=pairs, replace=False)
        out: list[int] = []
        answers, distances, last = [], [], dict[int, int]()
        taken = 0
        for at, which in sorted(places):
            out.extend(int(t) for t in text[taken:at])
            taken = max(taken, at)
            ids, answer = self.statement(NAMES[names[which]], self.values[chosen[which]])
            position = len(out) + answer
            if which in last:
                answers.append(position)
                distances.append(position - last[which])
            last[which] = position
            out.extend(ids)
            if len(out) >= length:
                break
        out.extend(int(t) for t in text[taken : taken + max(0, length - len(out))])
        kept = [i for i, a in enumerate(answers) if a < length]
        return (
            np.asarray(out[:length], dtype=np.int64),
            np.asarray([answers[i] for i in kept], dtype=np.int64),
            np.asarray([distances[i] for i in kept], dtype=np.int64),
        )


class Batches:
    """Random windows from the token files; batch ``step`` depends only on seed and step."""

    def __init__(
        self, files: dict[str, Path], sources: list[Source], rows: int, length: int, seed: int,
        recall: Recall | None = None, recall_share: float = 0.0, answer_weight: float = 4.0,
    ) -> None:  # fmt: skip
        import numpy as np

        self.streams = [np.load(files[s.name], mmap_mode="r") for s in sources]
        total = sum(s.share for s in sources)
        self.shares = [s.share / total for s in sources]
        self.rows, self.length, self.seed = rows, length, seed
        self.recall, self.recall_share, self.answer_weight = recall, recall_share, answer_weight

    def __call__(self, step: int) -> tuple[Any, Any]:
        """Token ids ``[rows, length + 1]`` of one batch and the weight of each target ``[rows, length]``."""
        import numpy as np
        import torch

        rng = np.random.default_rng((self.seed, step))
        picks = rng.choice(len(self.streams), size=self.rows, p=self.shares)
        rows = []
        weights = np.ones((self.rows, self.length), dtype=np.float32)
        for index, pick in enumerate(picks):
            stream = self.streams[pick]
            start = rng.integers(0, len(stream) - self.length - 1)
            row = np.asarray(stream[start : start + self.length + 1], dtype=np.int64)
            if self.recall is not None and rng.random() < self.recall_share:
                row, answers, _ = self.recall.insert(row, rng, self.length + 1)
                weights[index, answers - 1] = self.answer_weight
            rows.append(row)
        return torch.from_numpy(np.stack(rows)), torch.from_numpy(weights)
