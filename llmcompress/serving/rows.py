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

from llmcompress.inference.caches import PromptReader, Snapshots, arguments, empty_cache
from llmcompress.inference.coverage import turns
from llmcompress.inference.decoder import members_of
from llmcompress.inference.engine import batch_of
from llmcompress.serving.slots import Slot, Slots

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
        model: Model whose modules compute what no engine gives.
    """

    kind: str
    longest: int
    limit: int
    model: Any

    def join(
        self, key: int, prompt: Sequence[int], member: str | None, total: int, most: int | None = None
    ) -> Tensor | None:
        """Start a sequence, or go on with the prompt of the one that was started last.

        Args:
            key: Its name; unused so far, or that of the prompt that goes on, the rest being as it was.
            prompt: Token ids, at least one.
            member: Member of a family.
            total: Tokens that it will reach at most, at most ``longest``.
            most: Tokens to read now, more or less, where a prompt can be read in parts; all of it by default.

        Returns:
            Logits float32 ``[V]`` after the prompt, None while there is more of it.
        """
        ...

    def reused(self, key: int) -> int:
        """First tokens of a sequence's prompt that need not be read, because they were held already."""
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
            tokens: Tokens of all sequences together.
        """
        ...


def prompt_logits(model: Any, prompt: Sequence[int], member: str | None) -> Tensor:
    """Logits float32 ``[n, V]`` after each of a prompt's n tokens, by transformers' modules at once.

    Args:
        model: What batches hold of it stays as it is.
        prompt: Token ids, at least one.
        member: Member of a family.
    """
    if members_of(model):
        batch_of(model).assign([member or ""])
    with torch.inference_mode():
        out = model(input_ids=torch.tensor([list(prompt)], device=model.device), use_cache=False)
    logits: Tensor = out.logits[0].float().cpu()
    return logits


TRIAL = 3
"""Tokens of a sequence that shows what caches take; :func:`~llmcompress.serving.mixed_rows.disagrees` has as many."""


def trial_bytes(rows: Rows, member: str | None, tokens: int) -> int:
    """:meth:`Rows.full_bytes` where caches grow: from two sequences, one a token longer than the other.

    Args:
        rows: The batch, empty.
        member: Member of a family.
        tokens: Tokens of all sequences together.
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
        prefixes: Whether prompts begin with what other sequences hold or have left, where the engine can do that.
        snapshots: Bytes of snapshots that an engine with states may keep for that, at most.
    """

    kind = "native"

    def __init__(
        self, engine: NativeEngine, limit: int, longest: int, prefixes: bool = True, snapshots: int = 1 << 30
    ) -> None:
        self._engine, self.limit, self.longest = engine, limit, longest
        self.model: Any = engine.model
        self._slots = Slots(limit, prefixes and engine.keeps_prefixes, engine.reusable)
        self._snapshots = 0
        if prefixes and engine.keeps_snapshots:
            # one for each sequence that runs and one for its next turn
            self._snapshots = min(snapshots, 2 * limit * engine.snapshot_bytes(longest))
        self._reader = PromptReader(engine, Snapshots(self._snapshots) if self._snapshots else None)
        self._taken: dict[int, Slot] = {}
        self._reused: dict[int, int] = {}

    def join(
        self, key: int, prompt: Sequence[int], member: str | None, total: int, most: int | None = None
    ) -> Tensor | None:
        """See :meth:`Rows.join`."""
        if key not in self._taken:
            self._begin(key, prompt, member)
        slot, piece = self._taken[key], self._engine.piece
        start = len(slot.tokens)
        size = len(prompt) if most is None or piece is None else max(piece, most // piece * piece)
        end = min(len(prompt), start + size)
        logits = self._reader.read(slot.number, prompt, start, end, member)
        slot.tokens += prompt[start:end]
        return logits if end == len(prompt) else None

    def _begin(self, key: int, prompt: Sequence[int], member: str | None) -> None:
        slot, source, count = self._slots.take(prompt, member)
        self._taken[key], self._reused[key] = slot, count
        if source is not None and source is not slot:
            self._engine.copy(source.number, slot.number, count)
            slot.tokens = list(prompt[:count])
        resumed = self._reader.begin(slot.number, prompt)
        if resumed:
            self._reused[key], slot.tokens = resumed, list(prompt[:resumed])

    def reused(self, key: int) -> int:
        """See :meth:`Rows.reused`."""
        return self._reused[key]

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """See :meth:`Rows.step`."""
        found: dict[int, Tensor] = {}
        # the tokens of one member side by side
        keys = sorted(tokens, key=lambda key: (self._engine.owner(self._taken[key].number), key))
        most = self._engine.max_batch
        for first in range(0, len(keys), most):
            part = keys[first : first + most]
            slots = [self._taken[key] for key in part]
            given = [tokens[key] for key in part]
            logits = self._engine.step(torch.tensor(given), [slot.number for slot in slots])
            found.update(zip(part, logits.clone()))
            for slot, token in zip(slots, given):
                slot.tokens.append(token)
        return found

    def leave(self, key: int) -> None:
        """See :meth:`Rows.leave`."""
        self._reused.pop(key, None)
        slot = self._taken.pop(key, None)
        if slot is not None:
            self._slots.give_back(slot)

    def held_bytes(self) -> int:
        """Bytes of the positions in use, or of the states; what sequences have left is nobody's."""
        return self._engine.held_bytes([slot.number for slot in self._taken.values()])

    def full_bytes(self, tokens: int) -> int:
        """See :meth:`Rows.full_bytes`; all but snapshots is reserved from the start."""
        return self._engine.reserved_bytes + self._snapshots


class SeparateRows:
    """Sequences that are computed one after the other, each with a cache of its own.

    Args:
        model: Any causal language model.
        limit, longest: See :class:`Rows`.
        batch: Batch of a family: which member the rows of the next call belong to.
        members: Members of a family.
    """

    kind = "separate"

    def __init__(
        self, model: PreTrainedModel, limit: int, longest: int, batch: BatchRows | None = None,
        members: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.model: Any = model
        self._batch, self.limit, self.longest = batch, limit, longest
        self._member = members[0] if members else None
        self._held: dict[int, tuple[Any, str | None, list[int]]] = {}
        self._decisions = Decisions(model)
        self._turns = turns(self.model.config.get_text_config().to_dict())

    def _forward(self, ids: list[int], member: str | None, cache: Any, start: int) -> Tensor:
        if self._batch is not None and member is not None:
            self._batch.assign([member])
        device = self.model.device
        positions = torch.arange(start, start + len(ids), device=device).unsqueeze(0)
        with torch.inference_mode():
            out = self.model(
                input_ids=torch.tensor([ids], device=device), use_cache=True, logits_to_keep=1,
                **arguments(self.model, cache, positions),
            )  # fmt: skip
        logits: Tensor = out.logits[0, -1].float().cpu()
        return logits

    def join(self, key: int, prompt: Sequence[int], member: str | None, total: int, most: int | None = None) -> Tensor:
        """See :meth:`Rows.join`; prompts are read whole."""
        cache = empty_cache(self.model)
        logits = self._forward(list(prompt), member, cache, 0)
        self._decisions.keep(key)
        self._held[key] = (cache, member, list(prompt))
        return logits

    def reused(self, key: int) -> int:
        """None: caches of transformers cannot be cut short in general."""
        return 0

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """See :meth:`Rows.step`."""
        found: dict[int, Tensor] = {}
        for key, token in tokens.items():
            cache, member, before = self._held[key]
            if len(before) == self._turns:
                # the keys so far were turned by the table of shorter sequences
                cache = empty_cache(self.model)
                found[key] = self._forward([*before, token], member, cache, 0)
                self._decisions.keep(key)
                self._held[key] = (cache, member, before)
            else:
                self._decisions.use([key])
                found[key] = self._forward([token], member, cache, len(before))
            before.append(token)
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
