"""Block-by-block forward in stages, so that a visitor can change weights between them.

A sublayer is not run as a whole. The inputs of its first linears are seen, the linears may be changed,
the input of its output projection is computed with the changed linears, the projection may
be changed, and only then is the output added to the hidden states. So every large matrix product runs once, with the
final weights, and later linears see the error of earlier ones. Without a visitor the same
functions run in the same order, which makes recomputation after a resume exact.

Legend: S sequences, L length, T tokens, H hidden, B sequences of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmcompress.algorithms.hessian import Gram
from llmcompress.errors import InputError
from llmcompress.models.activation_cache import ActivationCache
from llmcompress.models.capture import first_output, replaced_layers
from llmcompress.models.group_steps import GroupSteps, Moments, names_of
from llmcompress.models.layout import Block, LinearGroup, Sublayer
from llmcompress.models.memory_limits import DEFAULT, Limits
from llmcompress.models.moe_step import MoeStep
from llmcompress.models.tensor_file import all_finite
from llmcompress.models.visitor import Tap, Visitor

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedModel

# activations of a batch should stay in a processor's caches; a GPU wants more at a time
BATCH_TOKENS = 512
CUDA_BATCH_TOKENS = 4096
# batches from which second moments may be formed by bf16 products
FAST_BATCHES = 8
# argument of layers that read the embedding beside the hidden states
EMBEDDING = "original_hidden_states"
# argument of attention that sees what an earlier layer's indexer chose
HANDED = "prev_topk_indices"


class Walker:
    """Runs blocks of a model on a fixed set of sequences.

    Args:
        model: Skeleton with real embedding; blocks are materialised by the caller.
        tokens: ``[S, L]`` int64.
        device: Where blocks run; hidden states stay on the CPU unless ``resident``.
        seed: For the random tokens of forced passes.
        limits: Memory it may take.
        folder: Where activations beyond their limit go; without one they stay in memory.
        shards: Rows of each part of ``tokens`` whose statistics are kept apart, to be summed by the visitor; by
            default there is one sum over everything. No batch spans two parts.
        resident: Hidden states and what is kept of a block lie where blocks run. Changes no bit of a result.

    Attributes:
        batches: Row ranges of the batches.
        parts: Row ranges of the shards.
        cache: Where activations lie.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Tensor,
        device: str = "cpu",
        seed: int = 0,
        *,
        limits: Limits = DEFAULT,
        folder: Path | None = None,
        shards: Sequence[int] | None = None,
        resident: bool = False,
    ) -> None:
        self.limits, self.cache = limits, ActivationCache(limits.activations, folder)
        self.model, self.tokens, self.device, self.seed = model, tokens, torch.device(device), seed
        self.home = self.device if resident else torch.device("cpu")
        rows = max(1, (CUDA_BATCH_TOKENS if self.device.type == "cuda" else BATCH_TOKENS) // tokens.shape[1])
        self.sharded = shards is not None
        ends = list(accumulate([tokens.shape[0]] if shards is None else shards))
        self.parts = [slice(start, end) for start, end in zip([0, *ends], ends)]
        self.batches = [
            slice(i, min(i + rows, part.stop)) for part in self.parts for i in range(part.start, part.stop, rows)
        ]
        self.tap: Tap | None = None
        # place of these tokens among those of all processes, and how many those have; 0 for no others
        self.first_token = self.all_tokens = 0
        self._calls: dict[int, list[dict[str, Any]]] = {}
        # the embedding, where later sublayers read it, and what sublayers lay aside within a block
        self._embedding: Tensor | None = None
        self._read_embedding = False
        self._aside: Tensor | None = None
        self._memory: Tensor | None = None

    @torch.no_grad()
    def embed(self, layers: Sequence[str]) -> Tensor:
        """Hidden states before the first block, and a record of how blocks are called.

        Args:
            layers: Run-time names of the decoder layers.

        Returns:
            ``[S, L, H]`` in the model's dtype, on the CPU or, of a resident walker, on the device.
        """
        hidden: Tensor | None = None
        # most families name the arguments of their layers
        first = type(self.model.get_submodule(layers[0]))
        positional = list(inspect.signature(first.forward).parameters)[2:]
        for rows in self.batches:
            calls: list[dict[str, Any]] = []

            def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
                kwargs = dict(zip(positional, args)) | kwargs
                self._read_embedding |= kwargs.pop(EMBEDDING, None) is not None
                nonlocal hidden
                if hidden is None:
                    shape = (*self.tokens.shape, hidden_states.shape[-1])
                    hidden = self.cache.empty(shape, hidden_states.dtype, self.home)
                if not calls:  # noqa: B023 - used within this iteration
                    hidden[rows] = hidden_states  # noqa: B023
                    self.cache.drop(hidden)
                calls.append(kwargs)  # noqa: B023
                return hidden_states

            with replaced_layers(self.model, layers, record):
                self.model.base_model(input_ids=self.tokens[rows], use_cache=False)
            self._calls.setdefault(rows.stop - rows.start, [_call_arguments(call, self.device) for call in calls])
        assert hidden is not None
        self._embedding = self.cache.copy(hidden) if self._read_embedding else None
        return hidden

    @torch.no_grad()
    def forward(
        self,
        block: Block,
        hidden: Tensor,
        visitor: Visitor | None = None,
        advance: bool = True,
        tap: Tap | None = None,
    ) -> None:
        """Run one materialised block on the hidden states, in place.

        Args:
            block: Which block.
            hidden: ``[S, L, H]``.
            visitor: Sees the block and may change it; None for a plain forward pass.
            advance: With false the output of the last sublayer is not needed and not computed.
            tap: Sees inputs of weights; only together with a visitor.

        Raises:
            InputError: NaN or infinity appeared.
        """
        self.tap, self._aside = tap, None
        source = hidden
        for number, sublayer in enumerate(block.sublayers):
            following = block.sublayers[number + 1 :]
            if not sublayer.parallel:
                # parallel sublayers after this one read what it reads, and it writes in place
                source = self.cache.copy(hidden) if following and following[0].parallel else hidden
            needed = advance or any(not later.parallel for later in following)
            if sublayer.keeps is not None:
                self._norm(sublayer, hidden)
            if tap is not None:
                tap.residual(sublayer, hidden)
            if sublayer.kind == "moe":
                MoeStep(self, block, sublayer, source, hidden, visitor).run(needed)
            else:
                self._plain(block, sublayer, source, hidden, visitor, needed)
        self.tap = self._aside = None
        if block.scale is not None and advance:
            factor = self.model.get_buffer(block.scale).to(hidden.device)
            for rows in self.batches:
                hidden[rows] *= factor
                self.cache.drop(hidden)
        # on a GPU at once: every answer from there waits for all work before it
        for rows in [slice(None)] if hidden.is_cuda else self.batches:
            finite = all_finite(hidden[rows])
            self.cache.drop(hidden)
            if not finite:
                raise InputError(
                    f"{block.name}: hidden states contain NaN or infinity",
                    "check the weights of this block, or use run.compute_dtype=float32",
                )

    @torch.no_grad()
    def lay_aside(self, block: Block, hidden: Tensor) -> None:
        """Run what a block lays aside, for :meth:`normed` of its mixer on the same hidden states ``[S, L, H]``."""
        self._aside = None
        for sublayer in block.sublayers:
            if sublayer.writes == "aside":
                self._plain(block, sublayer, hidden, hidden, None, True)

    def memory(self, size: int) -> Tensor:
        """Uninitialised bytes beside the hidden states, the same at every call; what was there may be overwritten.

        One large tensor for all blocks: new memory of this size costs a page fault per 4 KiB each time, and
        many small tensors would leave the allocator fragmented.
        """
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # given back before the larger one is taken
            self._memory = torch.empty(size, dtype=torch.uint8, device=self.home)
        return self._memory[:size]

    def expert_memory(self, sublayer: Sublayer, size: int) -> Tensor | None:
        """Twice so many bytes for the inputs and outputs of a bank of experts, in :meth:`memory`; None where others use
        that or its size is not to be trusted, and it is given back.
        """
        lent = self.tap is None and not sublayer.groups and self.limits.activations is None and self.home == self.device
        if not lent or (self._memory is not None and self._memory.numel() > 2 * size):
            self._memory = None
        return self.memory(2 * size) if lent else None

    def arguments(self, block: Block, rows: slice) -> dict[str, Any]:
        """Keyword arguments that the model passes to this block for a batch of this size."""
        return self._calls[rows.stop - rows.start][block.index]

    def normed(self, sublayer: Sublayer, hidden: Tensor, rows: slice | list[int]) -> Tensor:
        """Input of a sublayer's module for one batch, ``[B, L, K]``; of one that keeps it, hidden states are normed."""
        read = self._read(sublayer, hidden, rows)
        # what was read changes in place when the output is added, and a tap may keep what it was shown
        if sublayer.pre_norm is None or sublayer.keeps is not None:
            result = read.clone()
        else:
            result = self.model.get_submodule(sublayer.pre_norm)(read)
        return result if sublayer.input_scale == 1.0 else result * sublayer.input_scale

    def _read(self, sublayer: Sublayer, hidden: Tensor, rows: slice | list[int]) -> Tensor:
        """What a sublayer reads, before its norm."""
        read = {"hidden": (hidden,), "hidden|embedding": (hidden, self._embedding), "aside": (self._aside,)}
        tensors = read.get(sublayer.reads, (hidden, self._aside))
        parts = [tensor[rows].to(self.device) for tensor in tensors if tensor is not None]
        assert len(parts) == len(tensors), "nothing was laid aside, or the model's layers read no embedding"
        self.cache.drop(*(tensor for tensor in tensors if tensor is not None))
        if len(parts) == 1:
            return parts[0]
        return parts[0] + parts[1] if sublayer.reads == "hidden+aside" else torch.cat(parts, -1)

    def add(self, sublayer: Sublayer, hidden: Tensor, rows: slice, output: Tensor) -> None:
        """Apply the sublayer's post norm, if any, and add to the hidden states in place, or lay the output aside."""
        if sublayer.post_norm is not None:
            output = self.model.get_submodule(sublayer.post_norm)(output)
        if sublayer.output_scale != 1.0:
            output = output * sublayer.output_scale
        if sublayer.writes == "aside":
            if self._aside is None:
                self._aside = self.cache.empty(hidden.shape, hidden.dtype, hidden.device)
            self._aside[rows] = output.to(hidden.device)
            self.cache.drop(self._aside)
            return
        if sublayer.joins is not None:
            assert self._aside is not None, "nothing was laid aside"
            output = self.model.get_submodule(sublayer.joins)(output + self._aside[rows].to(output.device))
        if sublayer.keeps is not None:
            hidden[rows] *= sublayer.keeps
        hidden[rows] += output.to(hidden.device)
        self.cache.drop(hidden)

    def _norm(self, sublayer: Sublayer, hidden: Tensor) -> None:
        """Put the input of a sublayer in the place of the hidden states that it is made of."""
        assert sublayer.pre_norm is not None
        module = self.model.get_submodule(sublayer.pre_norm)
        for rows in self.batches:
            hidden[rows] = module(hidden[rows].to(self.device)).to(hidden.device)
            self.cache.drop(hidden)

    def tapped(self, names: Sequence[str]) -> Tap | None:
        """The tap, if it wants to see the inputs of these weights."""
        return self.tap if self.tap is not None and self.tap.wants(names) else None

    def shard_of(self, rows: slice) -> int:
        """Number of the shard a batch belongs to."""
        return next(number for number, part in enumerate(self.parts) if rows.start < part.stop)

    def new_moments(self, experts: int, width: int, fast: bool = True) -> Moments:
        """Zeros to add inputs to; ``fast`` allows products in bf16 where many batches come."""
        # a long run of batches allows products in bf16, and no other shard's length may decide that
        longest = [sum(self.shard_of(rows) == number for rows in self.batches) for number in range(len(self.parts))]
        return Moments(
            [Gram(experts, width, self.device, fast and count >= FAST_BATCHES) for count in longest],
            self.sharded,
        )

    def statistics(self, group: LinearGroup, inputs: Iterator[Tensor], counted: bool) -> Gram | Moments | None:
        """Second moments of a group's inputs, which the tap sees too.

        Args:
            group: The group whose inputs they are.
            inputs: Batches.
            counted: Whether moments are needed; otherwise only the tap sees the inputs.

        Raises:
            InputError: They contain NaN or infinity.
        """
        tap = self.tapped(names_of(group))
        if not counted and tap is None:
            return None
        moments = self.new_moments(1, group.linears[0].in_features) if counted else None
        for rows, x in zip(self.batches, inputs):
            shard = self.shard_of(rows)
            if moments is not None:
                moments.shards[shard].add(x.flatten(0, -2))
            if tap is not None:
                tap.shard = shard
                tap.linears(group, x.flatten(0, -2))
        return None if moments is None else moments.checked(group.linears[0].name)

    def _plain(
        self,
        block: Block,
        sublayer: Sublayer,
        source: Tensor,
        hidden: Tensor,
        visitor: Visitor | None,
        needed: bool,
    ) -> None:
        """Attention, dense MLP or state-space mixer; reads ``source``, adds to ``hidden``."""
        module = self.model.get_submodule(sublayer.module)

        def call(rows: slice, x: Tensor) -> Tensor:
            if sublayer.kind == "attention":
                handed = _everything(sublayer, x) if sublayer.handed else {}
                return first_output(module(hidden_states=x, **_of_attention(self.arguments(block, rows)), **handed))
            if sublayer.kind == "ssm":
                # calibration windows have no padding, so the mask is always None
                return first_output(module(x, cache_params=None, attention_mask=None))
            if sublayer.activation is not None:
                first, last = (self.model.get_submodule(group.linears[0].name) for group in sublayer.groups)
                return last(getattr(module, sublayer.activation)(first(x)))
            return first_output(module(x, block.index) if sublayer.numbered else module(x))

        steps = GroupSteps(self, sublayer.groups, visitor, call, lambda rows: self.normed(sublayer, source, rows))
        for rows, output in steps.outputs(needed):
            self.add(sublayer, hidden, rows, output)


def _call_arguments(call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments for the attention module: caches dropped, tensors moved."""
    return {key: _moved(value, device) for key, value in call.items() if key not in _CACHE_KEYS}


def _of_attention(arguments: dict[str, Any]) -> dict[str, Any]:
    """What an attention module takes of the arguments of its layer."""
    found = {key: value for key, value in arguments.items() if key not in _NOT_ATTENTION}
    # a layer that is called with two masks keeps the name for that of its mixer
    return found | {"attention_mask": arguments["causal_mask"]} if "causal_mask" in arguments else found


def _everything(sublayer: Sublayer, x: Tensor) -> dict[str, Tensor]:
    """Positions that an earlier layer chooses for each token of ``x [B, L, H]``: all, where there are no more of them.

    Raises:
        InputError: There are more, and what was chosen is not kept from block to block.
    """
    length = x.shape[1]
    if length > sublayer.handed:
        raise InputError(
            f"{sublayer.module}: sequences of {length} tokens, and an earlier layer chooses {sublayer.handed} for it",
            f"give calibrate and evaluate a length of at most {sublayer.handed}",
        )
    return {HANDED: torch.arange(length, dtype=torch.int32, device=x.device).expand(len(x), length, length)}


_NOT_ATTENTION = ("mamba_attention_mask", "causal_mask", HANDED)
_CACHE_KEYS = ("past_key_values", "layer_past", "cache", "cache_params", "use_cache")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
