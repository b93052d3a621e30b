"""Token rows for training: right-padded batches of prompt and response, built the same way for SFT and RL."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Padded:
    """A right-padded batch.

    Attributes:
        ids, mask: ``[B, T]`` int64, right-padded.
        places: ``[B, R]`` int64: positions whose logits predict the response tokens, R the longest response.
        targets: ``[B, R]`` int64 response tokens.
        inside: ``[B, R]`` bool, False where a response is shorter.
    """

    ids: Tensor
    mask: Tensor
    places: Tensor
    targets: Tensor
    inside: Tensor

    def select(self, logits: Tensor, width: int | None = None) -> Tensor:
        """Logits that predict the response tokens, or the first ``width`` of them: ``[B, T, V]`` → ``[B, R, V]``.

        Whole rows are taken, not single entries: the gradient of ``gather`` along the positions would sort every entry
        of the logits where deterministic algorithms are asked for, tens of gigabytes on a GPU.
        """
        count, length, vocab = logits.shape
        places = self.places[:, :width]
        first = torch.arange(count, device=places.device)[:, None] * length
        return logits.reshape(-1, vocab).index_select(0, (places + first).flatten()).view(count, -1, vocab)


def pad_rows(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad: int, device: torch.device | str
) -> Padded:
    """Pad prompts with their responses to one length.

    Args:
        prompts: Token ids of each row.
        responses: Token ids of each row, at least one.
        pad: Id for padding.
        device: Where to put the batch.
    """
    count, longest = len(prompts), max(len(p) + len(r) for p, r in zip(prompts, responses))
    width = max(map(len, responses))
    ids = torch.full((count, longest), pad)
    mask = torch.zeros(count, longest, dtype=torch.int64)
    places = torch.zeros(count, width, dtype=torch.int64)
    targets = torch.full((count, width), pad)
    inside = torch.zeros(count, width, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        whole = torch.tensor([*prompt, *response])
        ids[row, : len(whole)] = whole
        mask[row, : len(whole)] = 1
        places[row, : len(response)] = torch.arange(len(prompt) - 1, len(whole) - 1)
        targets[row, : len(response)] = whole[len(prompt) :]
        inside[row, : len(response)] = True
    return Padded(*(t.to(device) for t in (ids, mask, places, targets, inside)))


def flags(rows: Sequence[Sequence[int]], width: int, device: torch.device | str, fill: int = 0) -> Tensor:
    """Per-token integers of each row as ``[B, width]`` int64, filled up with ``fill``."""
    found = torch.full((len(rows), width), fill, dtype=torch.int64)
    for place, row in enumerate(rows):
        found[place, : len(row)] = torch.tensor(list(map(int, row)), dtype=torch.int64)
    return found.to(device)


def by_length(lengths: Sequence[int], size: int, tokens: int | None = None) -> list[list[int]]:
    """Places of rows in parts of similar length, so that little padding is computed.

    Args:
        lengths: Tokens of each row.
        size: Rows of a part, at most.
        tokens: Tokens of a part with its padding, at most; a longer row has a part of its own.
    """
    parts: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        # the row at hand is the longest so far
        full = not parts or len(parts[-1]) == size
        if full or (tokens is not None and (len(parts[-1]) + 1) * lengths[place] > tokens):
            parts.append([])
        parts[-1].append(place)
    return parts
