"""Recall at growing distance: what a model still knows after this many tokens of other text.

A statement ("The word of Anna is river.") is followed by running text and then by its beginning; the model must put the
stated word above other words. Short perplexity windows hide damage to states, a fact to be remembered does not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.evaluation.perplexity import refuse_nan
from llmcompress.evaluation.scores import Score

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmcompress.evaluation.config import RecallConfig

NAMES = ("Anna", "Tom", "Mary", "John", "Alice", "Henry", "Clara", "George", "Emma", "Peter", "Lucy", "James")
# letters from which a word of the vocabulary is long enough to be a value
LETTERS = 5
VALUES = 128


def values(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of lower-case words with a space before them, spread over the vocabulary.

    Raises:
        InputError: The vocabulary has fewer than two.
    """
    words: dict[str, int] = {}
    for token, number in tokenizer.get_vocab().items():
        if token[:1] in ("Ġ", "▁") and token[1:].isascii() and token[1:].isalpha() and token[1:].islower():
            words[token[1:]] = number
    chosen = sorted(word for word in words if len(word) >= LETTERS)
    chosen = chosen[:: max(1, len(chosen) // VALUES)][:VALUES]
    if len(chosen) < 2:
        raise InputError("recall: the vocabulary holds no whole words to remember", "remove the recall section")
    return [words[word] for word in chosen]


def prompts(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, distance: int, config: RecallConfig
) -> tuple[Tensor, Tensor]:
    """Build the prompts of one distance.

    Args:
        tokenizer: The model's tokenizer.
        text: int64 ``[T]`` running text to put in between.
        distance: Tokens between the stated word and the place where it is asked for.
        config: Number of prompts, candidates and seed.

    Returns:
        ids ``[n, L]`` and candidates ``[n, c]`` with the right one first, both int64.

    Raises:
        InputError: The text is too short.
    """
    generator = torch.Generator().manual_seed(config.seed * 1_000_003 + distance)
    words = torch.tensor(values(tokenizer))
    rows, candidates = [], []

    def draw(limit: int) -> int:
        return int(torch.randint(limit, (), generator=generator))

    for _ in range(config.samples):
        name = NAMES[draw(len(NAMES))]
        head = tokenizer.encode(f"\n\nThe word of {name} is", add_special_tokens=False)
        tail = tokenizer.encode(".\n\n", add_special_tokens=False)
        filler = distance - len(head) - len(tail)
        if filler < 0 or filler + 1 > len(text):
            raise InputError(
                f"recall.distances: {distance} does not fit: the question takes {len(head) + len(tail)} tokens, "
                f"the text has {len(text)}",
                "use distances in between",
            )
        order = torch.randperm(len(words), generator=generator)[: config.candidates]
        start = draw(len(text) - filler)
        rows.append(torch.tensor([*head, int(words[order[0]]), *tail, *text[start : start + filler].tolist(), *head]))
        candidates.append(words[order])
    width = min(len(row) for row in rows)
    # names may differ in length by a token: the longest prompts lose tokens of the statement's beginning
    return torch.stack([row[len(row) - width :] for row in rows]), torch.stack(candidates)


@torch.inference_mode()
def recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: Tensor, config: RecallConfig, batch: int = 8
) -> list[dict[str, Any]]:
    """Share of statements that are remembered, per distance.

    Args:
        model: A causal language model in evaluation mode; low-bit states are rounded after every token.
        tokenizer: Its tokenizer.
        text: int64 ``[T]`` running text.
        config: What to ask.
        batch: Prompts per forward pass.

    Returns:
        Per distance: ``distance``, ``accuracy``, ``stderr``, ``n``, and ``rows`` (1 where remembered).

    Raises:
        InputError: The model's output has a NaN.
    """
    found = []
    for distance in config.distances:
        ids, candidates = prompts(tokenizer, text, distance, config)
        rows: list[float] = []
        for start in range(0, len(ids), batch):
            part = ids[start : start + batch].to(model.device)
            last = model(input_ids=part, use_cache=False).logits[:, -1].float()
            refuse_nan(last)
            scores = last.gather(-1, candidates[start : start + batch].to(last.device))
            # a tie is not a memory
            rows += (scores[:, 0] > scores[:, 1:].amax(-1)).float().tolist()
        accuracy = math.fsum(rows) / len(rows)
        spread = math.sqrt(accuracy * (1 - accuracy) / max(1, len(rows) - 1))
        found.append({"distance": distance, "accuracy": accuracy, "stderr": spread, "n": len(rows), "rows": rows})
    return found


def scores(parts: list[dict[str, Any]]) -> list[Score]:
    """Recall figures as scores: ``recall.at_256`` and so on."""
    return [
        Score("recall", f"at_{p['distance']}", p["accuracy"], p["stderr"], p["n"], True, tuple(p["rows"]))
        for p in parts
    ]
