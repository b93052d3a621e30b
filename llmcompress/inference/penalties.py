"""Logits changed by what has been written: penalties for repetition, and biases of single tokens.

Definitions and order are vLLM's (``vllm/v1/sample/sampler.py``): biases first, then the penalty of repetition, which
counts the prompt too (CTRL, arXiv:1909.05858, section 4.1), then those of frequency and presence, which count what is
new only, as OpenAI defines them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """How strongly; the defaults change nothing.

    Attributes:
        presence: Taken from the logit of every token that has been written.
        frequency: The same, for each time.
        repetition: Logits of tokens in the prompt or the answer are divided by it where positive, else multiplied.
        bias: Token id and what is added to its logit.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()

    @property
    def idle(self) -> bool:
        """Whether they change nothing."""
        return self.presence == self.frequency == 0 and self.repetition == 1 and not self.bias


class Tally:
    """What one sequence has written, and its penalties.

    Args:
        penalties: How strongly.
        prompt: Token ids.
        vocabulary: Number of logits.
    """

    def __init__(self, penalties: Penalties, prompt: Sequence[int], vocabulary: int) -> None:
        self._penalties = penalties
        self._counts = torch.zeros(vocabulary)
        self._seen = torch.zeros(vocabulary, dtype=torch.bool)
        self._seen[torch.tensor(list(prompt), dtype=torch.long)] = True
        self._ids = torch.tensor([token for token, _ in penalties.bias], dtype=torch.long)
        self._biases = torch.tensor([value for _, value in penalties.bias], dtype=torch.float32)

    def take(self, token: int) -> None:
        """Count a token that has been written."""
        self._counts[token] += 1
        self._seen[token] = True

    def apply(self, logits: Tensor) -> Tensor:
        """Logits float32 ``[V]`` with biases and penalties; a new tensor."""
        how = self._penalties
        changed = logits.clone()
        if len(self._ids):
            changed[self._ids] += self._biases
        if how.repetition != 1:
            held = changed[self._seen]
            changed[self._seen] = torch.where(held > 0, held / how.repetition, held * how.repetition)
        if how.frequency:
            changed -= how.frequency * self._counts
        if how.presence:
            changed -= how.presence * (self._counts > 0)
        return changed
