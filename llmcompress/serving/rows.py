"""Sequences that decode together: they join with a prompt, take a token each step, and leave at any time.

Three ways to hold them, the first that a model can run:

- :class:`NativeRows`: the native engine's cache or states, several sequences to a step;
- :class:`~llmcompress.serving.mixed_rows.MixedRows`: transformers' modules on all sequences at once, keys and values
  row by row, and members of a family side by side;
- :class:`SeparateRows`: transformers' modules sequence by sequence, for models whose caches cannot be put together.

Greedy tokens do not depend on who else is in the batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from llmcompress.inference.caches import arguments

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.inference.native import NativeEngine
    from llmcompress.nn.tree_linear import BatchRows


class Rows(Protocol):
    """What the scheduler asks of a batch. Not thread-safe: one thread uses it.

    Attributes:
        kind: Name of the way, for people.
        longest: Tokens that one sequence may reach.
        limit: Sequences at once.
    """

    kind: str
    longest: int
    limit: int

    def join(self, key: int, prompt: Sequence[int], member: str | None, total: int) -> Tensor:
        """Start a sequence.

        Args:
            key: Its name; unused so far.
            prompt: Token ids, at least one.
            member: Of a family.
            total: Tokens that it will reach at most, at most ``longest``.

        Returns:
            Logits float32 ``[V]`` after the prompt.
        """
        ...

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """Append one token to each sequence named; returns logits float32 ``[V]`` of each."""
        ...

    def leave(self, key: int) -> None:
        """Forget a sequence; unknown ones are none of our business."""
        ...

    def held_bytes(self) -> int:
        """Bytes of keys, values and states of all sequences."""
        ...

    def full_bytes(self, tokens: int) -> int:
        """Bytes of keys, values and states at most; only an empty batch can tell.

        Args:
            tokens: Of all sequences together.
        """
        ...


TRIAL = 3
"""Tokens of a sequence that shows what caches take; :func:`~llmcompress.serving.mixed_rows.disagrees` has as many."""


def trial_bytes(rows: Rows, member: str | None, tokens: int) -> int:
    """:meth:`Rows.full_bytes` where caches grow: from two sequences, one a token longer than the other.

    Args:
        rows: The batch, empty.
        member: Of a family.
        tokens: Of all sequences together.
    """
    held = []
    for count in (TRIAL, TRIAL + 1):
        rows.join(0, [0] * count, member, count)
        held.append(rows.held_bytes())
        rows.leave(0)
    token = held[1] - held[0]
    # what does not grow are states, one for each place
    return tokens * token + rows.limit * (held[0] - TRIAL * token)


class Decisions:
    """What an expert-skipping policy decided on each sequence's prompt, where it acts on the tokens after it too.

    Without that a sequence would be decoded by what was decided on whichever prompt came last.

    Args:
        model: With or without such a policy.
    """

    def __init__(self, model: Any) -> None:
        policy = getattr(model, "llmcompress_skipping", None)
        self._policy = None if policy is None or policy.policy.decode == "off" else policy
        self._held: dict[int, Any] = {}

    def keep(self, key: int) -> None:
        """The last prompt was this sequence's."""
        if self._policy is not None:
            self._held[key] = self._policy.decisions()

    def use(self, keys: Sequence[int]) -> None:
        """The next step is of these sequences, in this order."""
        if self._policy is not None:
            self._policy.recall([self._held[key] for key in keys])

    def forget(self, key: int) -> None:
        """The sequence has left."""
        self._held.pop(key, None)


class NativeRows:
    """Sequences in the native engine.

    Args:
        engine: With ``limit`` slots.
        limit: Sequences at once.
        longest: Tokens of one.
    """

    kind = "native"

    def __init__(self, engine: NativeEngine, limit: int, longest: int) -> None:
        self._engine, self.limit, self.longest = engine, limit, longest
        self._slots: dict[int, int] = {}
        self._free = list(range(limit))[::-1]

    def join(self, key: int, prompt: Sequence[int], member: str | None, total: int) -> Tensor:
        """See :meth:`Rows.join`."""
        slot = self._free.pop()
        self._slots[key] = slot
        return self._engine.prompt(slot, prompt, member)

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """See :meth:`Rows.step`."""
        found: dict[int, Tensor] = {}
        # the tokens of one member side by side
        keys = sorted(tokens, key=lambda key: (self._engine.owner(self._slots[key]), key))
        most = self._engine.max_batch
        for first in range(0, len(keys), most):
            part = keys[first : first + most]
            logits = self._engine.step(torch.tensor([tokens[k] for k in part]), [self._slots[k] for k in part])
            found.update(zip(part, logits.clone()))
        return found

    def leave(self, key: int) -> None:
        """See :meth:`Rows.leave`."""
        slot = self._slots.pop(key, None)
        if slot is not None:
            self._free.append(slot)

    def held_bytes(self) -> int:
        """Bytes of the positions in use, or of the states."""
        return self._engine.held_bytes(list(self._slots.values()))

    def full_bytes(self, tokens: int) -> int:
        """See :meth:`Rows.full_bytes`; everything is reserved from the start."""
        return self._engine.reserved_bytes


class SeparateRows:
    """Sequences that are computed one after the other, each with a cache of its own.

    Args:
        model: Any causal language model.
        limit, longest: See :class:`Rows`.
        batch: Of a family: which member the rows of the next call belong to.
        members: Of a family.
    """

    kind = "separate"

    def __init__(
        self, model: PreTrainedModel, limit: int, longest: int, batch: BatchRows | None = None,
        members: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._model: Any = model
        self._batch, self.limit, self.longest = batch, limit, longest
        self._member = members[0] if members else None
        self._held: dict[int, tuple[Any, str | None, int]] = {}
        self._decisions = Decisions(model)

    def _forward(self, ids: list[int], member: str | None, cache: Any, start: int) -> Tensor:
        if self._batch is not None and member is not None:
            self._batch.assign([member])
        device = self._model.device
        positions = torch.arange(start, start + len(ids), device=device).unsqueeze(0)
        with torch.inference_mode():
            out = self._model(
                input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1,
                **arguments(self._model, cache, positions),
            )  # fmt: skip
        logits: Tensor = out.logits[0, -1].float().cpu()
        return logits

    def join(self, key: int, prompt: Sequence[int], member: str | None, total: int) -> Tensor:
        """See :meth:`Rows.join`."""
        from transformers import DynamicCache

        cache = DynamicCache(config=self._model.config)
        logits = self._forward(list(prompt), member, cache, 0)
        self._decisions.keep(key)
        self._held[key] = (cache, member, len(prompt))
        return logits

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """See :meth:`Rows.step`."""
        found: dict[int, Tensor] = {}
        for key, token in tokens.items():
            cache, member, length = self._held[key]
            self._decisions.use([key])
            found[key] = self._forward([token], member, cache, length)
            self._held[key] = (cache, member, length + 1)
        return found

    def leave(self, key: int) -> None:
        """See :meth:`Rows.leave`."""
        self._held.pop(key, None)
        self._decisions.forget(key)

    def held_bytes(self) -> int:
        """Bytes of all caches."""
        from llmcompress.nn.states import cache_bytes

        return sum(cache_bytes(cache).total for cache, _, _ in self._held.values())

    def full_bytes(self, tokens: int) -> int:
        """See :meth:`Rows.full_bytes`."""
        return trial_bytes(self, self._member, tokens)
