"""Sequences of different lengths and members through transformers' modules at once.

Linear layers see one batch. Keys and values are kept per sequence, so a sequence joins and leaves without a copy of the
others' cache, nothing is padded, and attention of a row is the same computation whoever else is there. It hangs on two
hooks of transformers: an attention function of our own, and cache layers that hand over what they are given.
Recurrent states have no length: theirs are rows of one tensor, put together when sequences join and leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from llmcompress.inference.caches import arguments
from llmcompress.inference.coverage import turns
from llmcompress.nn.states import PackedState
from llmcompress.serving.rows import TRIAL, Decisions, trial_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from llmcompress.nn.tree_linear import BatchRows

NAME = "llmcompress_rows"
# positions by which a sequence's buffers grow
GROWTH = 64
# largest difference of logits, relative to their spread, between this way and sequence by sequence
TOLERANCE = 1e-3

_running: list[MixedRows] = []


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
    scaling: float | None = None, sliding_window: int | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    unknown = sorted(name for name in ("s_aux", "softcap") if rest.get(name) is not None)
    if unknown:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if sliding_window is None:
        _running[-1].refuse_masks()
    return _running[-1].attend(query, key, value, scaling, sliding_window), None


AttentionInterface.register(NAME, _attention)


class _Handover(DynamicLayer):
    """An attention layer of the cache that keeps nothing itself, but tells whose keys come next.

    The module cannot tell: one of Zamba2 belongs to several layers.
    """

    number = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        _running[-1].layer = self.number
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _StatesHandover(LinearAttentionAndFullAttentionLayer):
    """A layer with states and attention: keeps the states only."""

    number = 0

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        _running[-1].layer = self.number
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0


class _Sequence:
    """Keys and values of one sequence: per layer ``[heads, capacity, D]``."""

    def __init__(self, member: str | None, total: int) -> None:
        self.member, self.total, self.length = member, total, 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}

    def append(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``[heads, n, D]`` in; returns all of the layer's."""
        end = self.length + key.shape[1]
        for held, fresh in ((self.keys, key), (self.values, value)):
            old = held.get(layer)
            if old is None or old.shape[1] < end:
                room = min(-(-end // GROWTH) * GROWTH, max(self.total, end))
                held[layer] = fresh.new_empty((fresh.shape[0], room, fresh.shape[2]))
                if old is not None:
                    held[layer][:, : self.length] = old[:, : self.length]
            held[layer][:, self.length : end] = fresh
        return self.keys[layer][:, :end], self.values[layer][:, :end]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for held in (self.keys, self.values) for tensor in held.values())


class MixedRows:
    """See the module.

    Args:
        model: Its attention follows transformers' attention interface.
        limit, longest: See :class:`~llmcompress.serving.rows.Rows`.
        batch: Batch of a family: which member each row belongs to.
        members: Members of a family, in the order in which a batch must hold them.
    """

    kind = "mixed"

    def __init__(
        self,
        model: PreTrainedModel,
        limit: int,
        longest: int,
        batch: BatchRows | None = None,
        members: Sequence[str] = (),
    ) -> None:
        self.model: Any = model
        self.limit, self.longest = limit, longest
        self._batch, self._members = batch, list(members)
        self._sequences: dict[int, _Sequence] = {}
        # keys of the sequences in the order of the batch
        self._order: list[int] = []
        self._states: Cache | None = None
        self._decisions = Decisions(model)
        self._active: list[_Sequence] = []
        # whose attention runs now
        self.layer = 0

    def refuse_masks(self) -> None:
        """Layers whose bounds are in transformers' masks alone: these are not seen here, and short trials reach none.

        Raises:
            NotImplementedError: The running layer attends in chunks, or in a window that only masks are told.
        """
        config = self.model.config.get_text_config()
        kinds = getattr(config, "layer_types", None) or ()
        kind = kinds[self.layer] if self.layer < len(kinds) else ""
        bound = {"sliding_attention": "sliding_window", "chunked_attention": "attention_chunk_size"}.get(kind)
        if bound is not None and getattr(config, bound, None) is not None:
            raise NotImplementedError(f"{kind} by masks")

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        """Attention of the running batch; ``query [B, H, L, D]``, returns ``[B, L, H, Dv]``."""
        outputs = []
        for row, sequence in enumerate(self._active):
            keys, values = sequence.append(self.layer, key[row], value[row])
            if query.shape[2] == 1:
                outputs.append(_one(query[row], keys, values, scaling, window))
            else:
                outputs.append(_prompt(query[row], keys, values, scaling, window))
        return torch.stack(outputs)

    def _forward(self, ids: list[list[int]], active: list[_Sequence], cache: Any) -> Tensor:
        self._active = active
        if self._batch is not None:
            self._batch.assign([sequence.member or "" for sequence in active])
        device = self.model.device
        starts = torch.tensor([[sequence.length] for sequence in active], device=device)
        positions = starts + torch.arange(len(ids[0]), device=device)
        own = self.model.config._attn_implementation
        self.model.config._attn_implementation = NAME
        _running.append(self)
        try:
            with torch.inference_mode():
                out = self.model(
                    input_ids=torch.tensor(ids, device=device), use_cache=True, logits_to_keep=1,
                    **arguments(self.model, cache, positions),
                )  # fmt: skip
        finally:
            _running.pop()
            self.model.config._attn_implementation = own
        for sequence in active:
            sequence.length += len(ids[0])
        logits: Tensor = out.logits[:, -1].float().cpu()
        return logits

    def _fresh_cache(self) -> Any:
        cache: Any = DynamicCache(config=self.model.config)
        for index, layer in enumerate(cache.layers):
            if not isinstance(layer, CacheLayerMixin):
                continue
            states = layer.number_of_states if isinstance(layer, LinearAttentionLayer) else 0
            cache.layers[index] = _StatesHandover(states) if states else _Handover()
            cache.layers[index].number = index
        return cache

    def join(self, key: int, prompt: Sequence[int], member: str | None, total: int, most: int | None = None) -> Tensor:
        """See :meth:`~llmcompress.serving.rows.Rows.join`; prompts are read whole."""
        sequence = _Sequence(member, total)
        cache = self._fresh_cache()
        (logits,) = self._forward([list(prompt)], [sequence], cache)
        self._decisions.keep(key)
        place = [*self._order, key]
        self._sequences[key] = sequence
        if self._members:
            place.sort(key=lambda k: self._members.index(self._sequences[k].member or ""))
        if self._states is None:
            self._states = cache
        else:
            joined = [*self._order, key]
            index = torch.tensor([joined.index(k) for k in place], device=self.model.device)
            for mine, other in zip(self._states.layers, cache.layers):
                _put_together(mine, other, index)
        self._order = place
        return logits

    def reused(self, key: int) -> int:
        """None."""
        return 0

    def step(self, tokens: Mapping[int, int]) -> dict[int, Tensor]:
        """See :meth:`~llmcompress.serving.rows.Rows.step`; every sequence must be named."""
        assert set(tokens) == set(self._order), "recurrent states of all sequences advance together"
        if not tokens:
            return {}
        active = [self._sequences[key] for key in self._order]
        self._decisions.use(self._order)
        logits = self._forward([[tokens[key]] for key in self._order], active, self._states)
        return dict(zip(self._order, logits))

    def leave(self, key: int) -> None:
        """See :meth:`~llmcompress.serving.rows.Rows.leave`."""
        self._decisions.forget(key)
        if self._sequences.pop(key, None) is None or key not in self._order:
            return
        row = self._order.index(key)
        self._order.remove(key)
        if not self._order:
            self._states = None
            return
        kept = [i for i in range(len(self._order) + 1) if i != row]
        assert self._states is not None
        for layer in self._states.layers:
            _select(layer, torch.tensor(kept, device=self.model.device))

    def held_bytes(self) -> int:
        """Bytes of keys, values and states."""
        from llmcompress.nn.states import cache_bytes

        states = 0 if self._states is None else cache_bytes(self._states).total
        return states + sum(sequence.nbytes for sequence in self._sequences.values())

    def full_bytes(self, tokens: int) -> int:
        """See :meth:`~llmcompress.serving.rows.Rows.full_bytes`."""
        return trial_bytes(self, self._members[0] if self._members else None, tokens)


def _one(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """One token ``[H, 1, D]`` against ``[Hkv, n, D]``; query heads of one key head lie side by side like tokens."""
    if window is not None:
        keys, values = keys[:, -window:], values[:, -window:]
    grouped = query.view(keys.shape[0], -1, query.shape[-1])
    out = nn.functional.scaled_dot_product_attention(grouped[None], keys[None], values[None], scale=scaling)
    return out.reshape(1, query.shape[0], values.shape[-1])


def _prompt(query: Tensor, keys: Tensor, values: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """A prompt ``[H, n, D]`` against its own keys."""
    count, mask = query.shape[1], None
    if window is not None and count > window:
        place = torch.arange(count, device=query.device)
        apart = place[:, None] - place
        mask = (apart >= 0) & (apart < window)
    out = nn.functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return out[0].transpose(0, 1)


def _put_together(mine: Any, other: Any, index: Tensor) -> None:
    """Append the states of one more sequence and bring all into the order ``index``."""
    for held in ("conv_states", "recurrent_states"):
        for state in getattr(mine, held, {}):
            first, second = getattr(mine, held)[state], getattr(other, held)[state]
            if first is None:
                continue
            both = first.append(second) if isinstance(first, PackedState) else torch.cat([first, second])
            getattr(mine, held)[state] = both.index_select(0, index)


def _select(layer: Any, index: Tensor) -> None:
    for held in ("conv_states", "recurrent_states"):
        for state, tensor in getattr(layer, held, {}).items():
            if tensor is not None:
                getattr(layer, held)[state] = tensor.index_select(0, index)


def disagrees(mixed: MixedRows, separate: Any, members: Sequence[str], vocabulary: int) -> str | None:
    """Run three short prompts both ways, one of them joining late and one leaving early.

    Args:
        mixed: The batch on trial, empty.
        separate: What it must agree with, empty.
        members: Members of a family, or empty.
        vocabulary: Number of token ids.

    Returns:
        Why this model is better computed sequence by sequence, None if both ways agree.
    """
    end = turns(mixed.model.config.get_text_config().to_dict())
    if end is not None and end < mixed.longest:
        # transformers chooses one for a batch, by its longest sequence
        return f"sequences of more than {end} tokens have rotary tables of their own (longrope)"
    draws = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, vocabulary, (n,), generator=draws).tolist() for n in (TRIAL, 7, 5)]
    who: list[str | None] = [members[i % len(members)] if members else None for i in (1, 0, 2)]
    worst = 0.0
    try:
        alive: list[int] = []
        for turn in range(4):
            if turn < len(prompts):
                pair = [rows.join(turn, prompts[turn], who[turn], 16) for rows in (mixed, separate)]
                worst = max(worst, _apart(*pair))
                alive.append(turn)
            else:
                for rows in (mixed, separate):
                    rows.leave(alive[0])
                alive.pop(0)
            tokens = {key: (7 * key + turn) % vocabulary for key in alive}
            both = [rows.step(tokens) for rows in (mixed, separate)]
            worst = max(worst, *(_apart(both[0][key], both[1][key]) for key in alive))
    except (NotImplementedError, RuntimeError, AttributeError, TypeError, ValueError, IndexError, KeyError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    finally:
        for key in range(len(prompts)):
            mixed.leave(key)
            separate.leave(key)
    return None if worst <= TOLERANCE else f"logits differ by {worst:.1e} of their spread"


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.std().clamp(min=1e-6))
