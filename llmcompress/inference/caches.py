"""What earlier tokens leave in caches: how much of a prompt is there already, and how transformers' modules take it.

A state stands at one length only. So that a prompt may begin with what another one left, engines with states give
:class:`Snapshot` objects between its parts, and :class:`Snapshots` keeps some of them.
"""

from __future__ import annotations

import inspect
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.registry import layout_from_config

if TYPE_CHECKING:
    from llmcompress_kernels.mamba2 import Carried
    from transformers import PreTrainedModel

# a prefix of fewer tokens costs as much to copy and to look after as to compute
LEAST_PREFIX = 16
# prompts that are remembered, to see where new ones part from them: a few bytes a token
REMEMBERED = 64


def shared_prefix(held: Sequence[int], prompt: Sequence[int]) -> int:
    """Tokens of a prompt that need not be computed.

    Args:
        held: Token ids that a cache holds, in order.
        prompt: Token ids. Its last one is always computed: the logits after it are wanted.

    Returns:
        How many of its first ones are held; 0 below :data:`LEAST_PREFIX`.
    """
    least, most = LEAST_PREFIX, min(len(held), len(prompt) - 1)
    if most < least or held[:least] != prompt[:least]:
        return 0
    # slices are compared in C: halving is many times as fast as a loop over tokens
    while least < most:
        half = (least + most + 1) // 2
        if held[least:half] == prompt[least:half]:
            least = half
        else:
            most = half - 1
    return least


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a model with states keeps of the first tokens of a prompt, from which another prompt may go on.

    States are those in float that the prompt itself goes on from, whatever a sequence stores: no bit changes.

    Attributes:
        count: Tokens.
        carried: States and inputs of convolutions; None without mixers.
        keys, values: Of the layers with attention, if there are any.
        inputs: The last ones of convolutions, likewise.
        states: States of delta rules, likewise.
    """

    count: int
    carried: Carried | None
    keys: Tensor | None = None
    values: Tensor | None = None
    inputs: Tensor | None = None
    states: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of all its parts."""
        kept = (self.carried, self.keys, self.values, self.inputs, self.states)
        return sum(part.nbytes for part in kept if part is not None)


class Snapshots:
    """Snapshots of prompts, those used last; not thread-safe.

    One is worth taking at the end of a prompt, where the next turn of a conversation goes on, and where a prompt parts
    from an earlier one, which is where what many have in common ends.

    Args:
        most_bytes: Bytes of all together.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        # from the one used longest ago to the one used last
        self._held: list[tuple[list[int], Snapshot]] = []
        self._prompts: deque[list[int]] = deque(maxlen=REMEMBERED)

    def find(self, prompt: Sequence[int]) -> Snapshot | None:
        """The longest that is a prefix of a prompt, but not all of it: the logits after its last token are wanted."""
        wanted, best = list(prompt), None
        for entry in self._held:
            tokens, found = entry
            longer = best is None or found.count > best[1].count
            if longer and found.count < len(wanted) and wanted[: found.count] == tokens:
                best = entry
        if best is None:
            return None
        self._held.remove(best)
        self._held.append(best)
        return best[1]

    def cuts(self, prompt: Sequence[int], start: int, piece: int) -> list[int]:
        """After which of its tokens a prompt's snapshots are worth taking, ascending; remembers the prompt.

        Args:
            prompt: Token ids.
            start: Tokens that are held already.
            piece: Prompts may be cut at multiples of it.
        """
        wanted = list(prompt)
        common = max((shared_prefix(held, wanted) for held in self._prompts), default=0)
        if wanted not in self._prompts:
            self._prompts.append(wanted)
        places = {count // piece * piece for count in (common, len(wanted) - 1)}
        return sorted(count for count in places if count > start)

    def keep(self, tokens: Sequence[int], snapshot: Snapshot) -> None:
        """Keep a snapshot of these tokens; those used longest ago make room. One that is too large is not kept."""
        if snapshot.nbytes > self._most:
            return
        self._held.append((list(tokens), snapshot))
        while self.nbytes > self._most:
            del self._held[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all snapshots."""
        return sum(snapshot.nbytes for _, snapshot in self._held)


class PromptReader:
    """Reads prompts into an engine in parts, beginning with what is kept of earlier ones.

    Args:
        engine: Native.
        snapshots: Where an engine with states keeps them; None without.
    """

    def __init__(self, engine: Any, snapshots: Snapshots | None) -> None:
        self._engine = engine
        self._snapshots = snapshots if engine.keeps_snapshots else None
        self._cuts: list[int] = []

    def begin(self, slot: int, prompt: Sequence[int]) -> int:
        """Take over what is kept of a prompt's first tokens; returns their number.

        Args:
            slot: Which sequence of the engine.
            prompt: Token ids. Until it has been read no other one may begin.
        """
        if self._snapshots is None:
            return 0
        found = self._snapshots.find(prompt)
        if found is not None:
            self._engine.resume(slot, found)
        start = 0 if found is None else found.count
        self._cuts = self._snapshots.cuts(prompt, start, self._engine.piece)
        return start

    def read(
        self, slot: int, prompt: Sequence[int], start: int, end: int | None = None, member: str | None = None
    ) -> Tensor:
        """Tokens of a prompt.

        Args:
            slot: As in :meth:`begin`.
            prompt: The whole.
            start: Its first tokens that have been read.
            end: Up to where to read: all by default, else a place where the engine may be cut.
            member: Member of a family.

        Returns:
            Logits float32 ``[V]`` at the end of the prompt, else ``[0]``.
        """
        stop = len(prompt) if end is None else min(end, len(prompt))
        for cut in [cut for cut in self._cuts if start < cut <= stop]:
            self._engine.prompt(slot, prompt[start:cut], member, start, last=False)
            assert self._snapshots is not None
            self._snapshots.keep(prompt[:cut], self._engine.snapshot(slot))
            start = cut
        if start == stop:
            return torch.empty(0)
        logits: Tensor = self._engine.prompt(slot, prompt[start:stop], member, start, last=stop == len(prompt))
        if stop == len(prompt):
            self._cuts = []
        return logits


def empty_cache(model: PreTrainedModel) -> Any:
    """A cache of transformers for a model.

    Raises:
        InputError: Its family has a cache of its own kind, which is not cut, copied or counted here.
    """
    if _decays(model):
        raise InputError(
            f"models of type {model.config.model_type} have a cache of their own, which only transformers' generate "
            "knows",
            "use llmcompress generate",
        )
    return _plain_cache(model)


def prompt_cache(model: PreTrainedModel) -> Any:
    """A cache of transformers that takes a whole prompt; of MiniMax-01 its own, which is read but not cut."""
    if not _decays(model):
        return _plain_cache(model)
    from transformers.models.minimax.modeling_minimax import MiniMaxCache

    return MiniMaxCache()


def _decays(model: PreTrainedModel) -> bool:
    return layout_from_config(model.config.to_dict()).decays


def _plain_cache(model: PreTrainedModel) -> Any:
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def rule_left(held: Any, block: int) -> tuple[Tensor | None, Any]:
    """What a layer with a delta rule or lightning attention has left in a cache of transformers, of a first sequence.

    Args:
        held: The cache, of :func:`prompt_cache`.
        block: Which layer.

    Returns:
        The last inputs of its convolution, ``[taps, C]`` of which no token needs the first any more, None without one;
        and its state ``[1, H, K, V]``, or packed.
    """
    if hasattr(held, "linear_cache"):
        return None, held.linear_cache[block]
    kept = held.layers[block]
    return kept.conv_states[0][0].mT, kept.recurrent_states[0]


def arguments(model: PreTrainedModel, cache: Any, positions: Tensor) -> dict[str, Any]:
    """Cache and positions under the names that a model's forward has for them.

    Args:
        model: Of transformers; those with states only know no positions. From 5.24 on a cache is called ``cache``;
            before, ``past_key_values``, or ``cache_params`` where there are states only.
        cache: A transformers cache.
        positions: int64 ``[B, L]``.
    """
    names = inspect.signature(model.forward).parameters
    word = next(word for word in ("cache", "past_key_values", "cache_params") if word in names)
    return {word: cache, **({"position_ids": positions} if "position_ids" in names else {})}
