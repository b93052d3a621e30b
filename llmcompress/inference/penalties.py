"""Logits changed by what has been written: penalties for repetition, and biases of single tokens.

Definitions and order are vLLM's (``vllm/v1/sample/sampler.py``): biases and least lengths first, then the penalty of
repetition, which counts the prompt too (CTRL, arXiv:1909.05858, section 4.1), then those of frequency and presence,
which count what is new only, as OpenAI defines them.
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
        least: Tokens that must be written before one of ``ends`` may come, where any other may.
        ends: Token ids that end a text.
    """

    presence: float = 0.0
    frequency: float = 0.0
    repetition: float = 1.0
    bias: tuple[tuple[int, float], ...] = ()
    least: int = 0
    ends: tuple[int, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether they change nothing."""
        return self.presence == self.frequency == self.least == 0 and self.repetition == 1 and not self.bias


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
        self._ends = torch.tensor([token for token in penalties.ends if 0 <= token < vocabulary], dtype=torch.long)
        self._written = 0

    def take(self, token: int) -> None:
        """Count a token that has been written."""
        self._written += 1
        self._counts[token] += 1
        self._seen[token] = True

    def apply(self, logits: Tensor) -> Tensor:
        """Logits float32 ``[V]`` with biases and penalties; a new tensor."""
        how = self._penalties
        changed = logits.clone()
        if len(self._ids):
            changed[self._ids] += self._biases
        if self._written < how.least and len(self._ends):
            longer = changed.index_fill(0, self._ends, -torch.inf)
            # a format may allow nothing but the end
            changed = longer if bool(longer.isfinite().any()) else changed
        if how.repetition != 1:
            held = changed[self._seen]
            changed[self._seen] = torch.where(held > 0, held / how.repetition, held * how.repetition)
        if how.frequency:
            changed -= how.frequency * self._counts
        if how.presence:
            changed -= how.presence * (self._counts > 0)
        return changed
