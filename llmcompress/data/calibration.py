"""Calibration sets: fixed windows of tokens, chosen once, kept on disk, compared with held-out text."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from llmcompress.data.documents import read
from llmcompress.data.sources import SourceConfig, SyntheticSource, Template, describe
from llmcompress.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SPAN = 32
"""Tokens that must agree in a row before two texts count as sharing something."""


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """Windows of tokens and where they came from.

    Attributes:
        tokens: ``[S, L]`` int64.
        provenance: JSON-serialisable record of source, files, hashes, licence, seed and counts.
        hash: SHA-256 over shape and tokens.
    """

    tokens: Tensor
    provenance: dict[str, Any]
    hash: str

    @classmethod
    def of(cls, tokens: Tensor, provenance: dict[str, Any]) -> CalibrationSet:
        """Wrap ``tokens [S, L]`` int64 and compute the hash."""
        tokens = tokens.to(torch.int64).contiguous()
        digest = hashlib.sha256(repr(tuple(tokens.shape)).encode() + tokens.numpy().tobytes()).hexdigest()
        return cls(tokens, provenance, digest)

    def save(self, path: Path) -> None:
        """Write tokens and provenance as safetensors; equal sets give equal bytes."""
        from safetensors.torch import save

        from llmcompress.durable import write_durably

        # one metadata key: the order of several is not fixed by safetensors
        record = json.dumps({"provenance": self.provenance, "hash": self.hash}, sort_keys=True)
        write_durably(path, save({"tokens": self.tokens}, metadata={"calibration": record}))

    @classmethod
    def load(cls, path: Path) -> CalibrationSet:
        """Read what :meth:`save` wrote.

        Raises:
            InputError: The file is missing, damaged, or its tokens do not match their hash.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as handle:
                record = json.loads((handle.metadata() or {})["calibration"])
                tokens = handle.get_tensor("tokens")
            found = cls.of(tokens, record["provenance"])
            expected = record["hash"]
        except (SafetensorError, OSError, KeyError, ValueError) as error:
            raise InputError(f"{path}: cannot read the calibration set: {error}", "delete it and resume") from error
        if found.hash != expected:
            raise InputError(f"{path}: tokens do not match their hash", "delete it and resume")
        return found


def build(
    source: SourceConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    length: int,
    seed: int,
    *,
    template: Template = "none",
    allow_fewer: bool = False,
    vocabulary: int | None = None,
) -> CalibrationSet:
    """Read a source and choose ``samples`` windows of ``length`` tokens.

    Documents are tokenized without special tokens, each followed by the end-of-text token, joined, and cut into
    windows that do not overlap. The seed chooses which windows, none twice, in random order, so that a split of the
    set into first and last rows is a fair one.

    Args:
        source: Where the text comes from.
        tokenizer: The model's tokenizer; may be None for the synthetic source when ``vocabulary`` is given.
        samples: Number of windows S.
        length: Tokens per window L.
        seed: Seed of the choice, and of synthetic tokens.
        template: Chat template handling, see :mod:`llmcompress.data.sources`.
        allow_fewer: Take what there is when the text holds fewer than ``samples`` windows.
        vocabulary: Size of the model's vocabulary; tokens beyond it are refused.

    Raises:
        InputError: No samples asked for, text too short, or tokenizer and model do not fit.
    """
    if samples < 1:
        raise InputError("calibration with zero samples", "set samples to 1 or more")
    if isinstance(source, SyntheticSource):
        return _synthetic(source, tokenizer, samples, length, seed, vocabulary)
    documents = read(source, tokenizer, template)
    if tokenizer is None:
        raise InputError(
            f"{describe(source)}: the model has no tokenizer, so text cannot be turned into tokens",
            "put the tokenizer files beside the model or set model.tokenizer",
        )
    stream = _join(documents.texts, tokenizer)
    if vocabulary is not None and len(stream) and int(stream.max()) >= vocabulary:
        raise InputError(
            f"the tokenizer gives token {int(stream.max())}, but the model knows only {vocabulary}",
            "use the tokenizer that belongs to the model (model.tokenizer)",
        )
    available = len(stream) // length
    if available < samples and not (allow_fewer and available):
        raise InputError(
            f"{describe(source)}: {len(stream)} tokens make {available} windows of {length}, but samples is {samples}",
            f"give more text, a smaller length, or samples: {available} (allow_fewer: true takes what there is)"
            if available
            else f"give more text, or a length of at most {len(stream)}",
        )
    chosen = np.random.default_rng(seed).permutation(available)[:samples]
    windows = stream[: available * length].reshape(available, length)[chosen]
    provenance = documents.provenance | {
        "tokens_available": len(stream), "windows_available": available, "samples": len(chosen), "length": length,
        "seed": seed,
    }  # fmt: skip
    return CalibrationSet.of(torch.from_numpy(np.ascontiguousarray(windows)), provenance)


def _synthetic(
    source: SyntheticSource,
    tokenizer: PreTrainedTokenizerBase | None,
    samples: int,
    length: int,
    seed: int,
    vocabulary: int | None,
) -> CalibrationSet:
    size = vocabulary if vocabulary is not None else (len(tokenizer) if tokenizer is not None else 0)
    if size < 2:
        raise InputError("synthetic tokens need a vocabulary", "give the model a tokenizer or another source")
    generator = torch.Generator().manual_seed(seed + source.seed)
    tokens = torch.randint(0, size, (samples, length), generator=generator)
    provenance = {
        "kind": "synthetic", "seed": seed + source.seed, "samples": samples, "length": length,
        "note": "random tokens: for speed only",
    }  # fmt: skip
    return CalibrationSet.of(tokens, provenance)


def _join(texts: tuple[str, ...], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """All documents as one stream of token ids ``[T]`` int64, each followed by the end-of-text token."""
    end = tokenizer.eos_token_id
    if isinstance(end, list):
        end = end[0]
    pieces: list[np.ndarray] = []
    for start in range(0, len(texts), 256):
        batch = [text for text in texts[start : start + 256] if text.strip()]
        if not batch:
            continue
        for ids in tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]:
            pieces.append(np.asarray([*ids, end] if end is not None else ids, dtype=np.int64))
    return np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int64)


def overlap(calibration: Tensor, evaluation: Tensor) -> float:
    """Share of the evaluation tokens that lie in a span also found in the calibration tokens.

    A span is 32 equal tokens in a row. Calibration rows are cut into spans at every multiple of 32, evaluation text
    is looked at from every offset, so a shared passage of 63 tokens or more is always found.

    Args:
        calibration: ``[S, L]`` int64.
        evaluation: ``[T]`` or ``[S', L']`` int64; rows are separate texts.

    Returns:
        A fraction in [0, 1]; 0 when either is shorter than a span.
    """
    rows = np.atleast_2d(evaluation.numpy())
    source = np.atleast_2d(calibration.numpy())
    if rows.shape[1] < _SPAN or source.shape[1] < _SPAN:
        return 0.0
    whole = source.shape[1] // _SPAN * _SPAN
    known = np.unique(_hash_spans(source[:, :whole].reshape(-1, _SPAN)).ravel())
    covered = 0
    for row in rows:
        hit = np.isin(_hash_spans(row[None]).ravel(), known)
        # a token is covered when one of the spans that hold it is known
        covered += int((np.convolve(hit.astype(np.int64), np.ones(_SPAN, dtype=np.int64)) > 0).sum())
    return covered / rows.size


def _hash_spans(rows: np.ndarray) -> np.ndarray:
    """Polynomial hash modulo 2⁶⁴ of every span of 32 tokens: ``[R, C]`` to ``[R, C − 31]`` uint64."""
    values = rows.astype(np.uint64) + np.uint64(1)
    # mixing first makes the top bits depend on the token, or small ids would collide under the modulus
    values = (values * np.uint64(0x9E3779B97F4A7C15)) ^ (values << np.uint64(17))
    count = rows.shape[1] - _SPAN + 1
    total = np.zeros((rows.shape[0], count), dtype=np.uint64)
    for offset in range(_SPAN):
        total = total * np.uint64(0x100000001B3) + values[:, offset : offset + count]
    return total
