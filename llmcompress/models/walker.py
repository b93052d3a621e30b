"""Block-by-block forward in stages, so that a visitor can change weights between them.

A sublayer is not run as a whole. The inputs of its first linears are seen, the linears may be changed,
the input of its output projection is computed with the changed linears, the projection may
be changed, and only then is the output added to the hidden states. So every large matrix product runs once, with the
final weights, and later linears see the error of earlier ones. Without a visitor the same
functions run in the same order, which makes recomputation after a resume exact.

Legend: S sequences, L length, T tokens, H hidden, B sequences of a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Gram
from llmcompress.errors import InputError
from llmcompress.models.capture import (
    Routing,
    down,
    first_output,
    gated,
    identity,
    recorded_inputs,
    replaced_forward,
)
from llmcompress.models.layout import Block, ExpertBank, LinearGroup, Sublayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# activations of a batch should stay in a processor's caches; a GPU wants more at a time
BATCH_TOKENS = 512
CUDA_BATCH_TOKENS = 4096
CACHE_LINE = 64
# inputs of output projections are kept between statistics and product up to this size, else recomputed
KEEP_BYTES = 1 << 30
# second moments of experts that are held at once
GRAM_BYTES = 1 << 30
FORCED_TOKENS = 2048
# batches from which second moments may be formed by bf16 products
FAST_BATCHES = 8
# families whose decoder layers return a tuple
TUPLES = frozenset({"bamba", "falcon_h1"})


class Visitor(Protocol):
    """What a quantizer sees of a block, in the order of the forward pass. Weights may be changed in place."""

    affinity: bool
    """Weight the tokens of an expert by their routing weights."""

    def wants(self, names: Sequence[str]) -> bool:
        """Whether second moments of the input of these weights are needed."""

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """A group of linears is about to be used; ``gram`` is None unless wanted."""

    def router(self, bank: ExpertBank, router: nn.Module, x: Tensor) -> None:
        """A router is about to be used on ``x [T, H]``."""

    def routed(self, bank: ExpertBank, counts: list[int]) -> None:
        """Tokens per expert are known."""

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, gram: Gram | None, shared: Callable[[int], Tensor]
    ) -> None:
        """Some experts' ``name`` projection is about to be used.

        ``shared(e)`` computes the Hessian ``[K, K]`` that expert e would have if it saw tokens of the whole layer.
        """


class Tap(Protocol):
    """Sees the very inputs that statistics are taken of, batch by batch, without changing anything."""

    def wants(self, names: Sequence[str]) -> bool:
        """Whether the inputs of these weights are to be shown."""

    def linears(self, group: LinearGroup, x: Tensor) -> None:
        """A batch of a group's inputs, ``[T, K]``."""

    def moe(self, bank: ExpertBank, x: Tensor) -> None:
        """Inputs of an expert bank, ``[T, H]``, before it is routed."""

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, expert: int, tokens: Tensor, x: Tensor, weight: Tensor | None
    ) -> None:
        """Inputs ``x [n, K]`` of one expert's projection for some tokens; ``experts`` is the chunk at work."""


class Walker:
    """Runs blocks of a model on a fixed set of sequences.

    Args:
        model: Skeleton with real embedding; blocks are materialised by the caller.
        tokens: ``[S, L]`` int64.
        device: Where blocks run; hidden states stay on the CPU.
        seed: For the random tokens of forced passes.

    Attributes:
        batches: Row ranges of the batches.
    """

    def __init__(self, model: PreTrainedModel, tokens: Tensor, device: str = "cpu", seed: int = 0) -> None:
        self.model, self.tokens, self.device, self.seed = model, tokens, torch.device(device), seed
        rows = max(1, (CUDA_BATCH_TOKENS if self.device.type == "cuda" else BATCH_TOKENS) // tokens.shape[1])
        self.batches = [slice(i, min(i + rows, tokens.shape[0])) for i in range(0, tokens.shape[0], rows)]
        self.tap: Tap | None = None
        self._calls: dict[int, list[dict[str, Any]]] = {}
        self._memory: Tensor | None = None

    @torch.no_grad()
    def embed(self, layers: Sequence[str]) -> Tensor:
        """Hidden states before the first block, and a record of how blocks are called.

        Args:
            layers: Run-time names of the decoder layers.

        Returns:
            ``[S, L, H]`` on the CPU in the model's dtype.
        """
        hidden: Tensor | None = None
        modules = [self.model.get_submodule(name) for name in layers]
        returns_tuple = self.model.config.model_type in TUPLES
        for rows in self.batches:
            calls: list[dict[str, Any]] = []

            def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, None]:
                assert not args, "decoder layers are called with keyword arguments"
                nonlocal hidden
                if hidden is None:
                    shape = (*self.tokens.shape, hidden_states.shape[-1])
                    hidden = torch.empty(shape, dtype=hidden_states.dtype)
                if not calls:  # noqa: B023 - used within this iteration
                    hidden[rows] = hidden_states  # noqa: B023
                calls.append(kwargs)  # noqa: B023
                return (hidden_states, None) if returns_tuple else hidden_states

            with ExitStack() as stack:
                for module in modules:
                    stack.enter_context(replaced_forward(module, record))
                self.model.base_model(input_ids=self.tokens[rows], use_cache=False)
            self._calls.setdefault(rows.stop - rows.start, [_call_arguments(call, self.device) for call in calls])
        assert hidden is not None
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
            block: Which.
            hidden: ``[S, L, H]``.
            visitor: Sees the block and may change it; None for a plain forward pass.
            advance: With false the output of the last sublayer is not needed and not computed.
            tap: Sees inputs of weights; only together with a visitor.

        Raises:
            InputError: NaN or infinity appeared.
        """
        self.tap = tap
        source = hidden
        for number, sublayer in enumerate(block.sublayers):
            following = block.sublayers[number + 1 :]
            if not sublayer.parallel:
                # parallel sublayers after this one read what it reads, and it writes in place
                source = hidden.clone() if following and following[0].parallel else hidden
            needed = advance or any(not later.parallel for later in following)
            if sublayer.kind == "moe":
                self._memory = None
                _MoeStep(self, block, sublayer, source, hidden, visitor).run(needed)
            else:
                self._plain(block, sublayer, source, hidden, visitor, needed)
        self.tap = None
        low, high = hidden.aminmax()
        if not (abs(float(low)) < float("inf") and abs(float(high)) < float("inf")):
            raise InputError(
                f"{block.name}: hidden states contain NaN or infinity",
                "check the weights of this block, or use run.compute_dtype=float32",
            )

    def memory(self, size: int) -> Tensor:
        """Uninitialised bytes on the CPU, the same at every call; what was there before may be overwritten.

        One large tensor for all blocks: new memory of this size costs a page fault per 4 KiB each time, and
        many small tensors would leave the allocator fragmented.
        """
        if self._memory is None or self._memory.numel() < size:
            self._memory = None  # given back before the larger one is taken
            self._memory = torch.empty(size, dtype=torch.uint8)
        return self._memory[:size]

    def arguments(self, block: Block, rows: slice) -> dict[str, Any]:
        """Keyword arguments that the model passes to this block for a batch of this size."""
        return self._calls[rows.stop - rows.start][block.index]

    def normed(self, sublayer: Sublayer, hidden: Tensor, rows: slice) -> Tensor:
        """Input of a sublayer's module for one batch, ``[B, L, H]``."""
        norm = self.model.get_submodule(sublayer.pre_norm)
        result: Tensor = norm(hidden[rows].to(self.device))
        return result if sublayer.input_scale == 1.0 else result * sublayer.input_scale

    def add(self, sublayer: Sublayer, hidden: Tensor, rows: slice, output: Tensor) -> None:
        """Apply the sublayer's post norm, if any, and add to the hidden states in place."""
        if sublayer.post_norm is not None:
            output = self.model.get_submodule(sublayer.post_norm)(output)
        if sublayer.output_scale != 1.0:
            output = output * sublayer.output_scale
        hidden[rows] += output.to(hidden.device)

    def tapped(self, names: Sequence[str]) -> Tap | None:
        """The tap, if it wants to see the inputs of these weights."""
        return self.tap if self.tap is not None and self.tap.wants(names) else None

    def statistics(self, group: LinearGroup, inputs: Iterator[Tensor], counted: bool) -> Gram | None:
        """Second moments of a group's inputs, which the tap sees too.

        Args:
            group: Whose inputs.
            inputs: Batches.
            counted: Whether moments are needed; otherwise only the tap sees the inputs.

        Raises:
            InputError: They contain NaN or infinity.
        """
        tap = self.tapped(_names(group))
        if not counted and tap is None:
            return None
        fast = len(self.batches) >= FAST_BATCHES
        gram = Gram(1, group.linears[0].in_features, self.device, fast) if counted else None
        for x in inputs:
            if gram is not None:
                gram.add(x.flatten(0, -2))
            if tap is not None:
                tap.linears(group, x.flatten(0, -2))
        if gram is not None:
            check_finite(gram, group.linears[0].name)
        return gram

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
                arguments = {k: v for k, v in self.arguments(block, rows).items() if k != "mamba_attention_mask"}
                return first_output(module(hidden_states=x, **arguments))
            if sublayer.kind == "ssm":
                # calibration windows have no padding, so the mask is always None
                return first_output(module(x, cache_params=None, attention_mask=None))
            return first_output(module(x))

        steps = GroupSteps(self, sublayer.groups, visitor, call, lambda rows: self.normed(sublayer, source, rows))
        for rows, output in steps.outputs(needed):
            self.add(sublayer, hidden, rows, output)


class GroupSteps:
    """The linears of one module in stages: first, inner, last.

    Args:
        walker: For batches and devices.
        groups: All groups of one module, in order.
        visitor: Sees each group before it is used.
        call: Runs the module on a batch and its input.
        inputs: The module's input for a batch.
    """

    def __init__(
        self,
        walker: Walker,
        groups: Sequence[LinearGroup],
        visitor: Visitor | None,
        call: Callable[[slice, Tensor], Tensor],
        inputs: Callable[[slice], Tensor],
    ) -> None:
        self.walker, self.visitor, self.call, self.inputs = walker, visitor, call, inputs
        self.first = [group for group in groups if group.position == "first"]
        self.inner = [group for group in groups if group.position == "inner"]
        self.last = next(group for group in groups if group.position == "last")
        # inputs of the module and of its last projection, each kept until it has been used for the last time
        self.held: Tensor | None = None
        self.kept: Tensor | None = None

    def outputs(self, needed: bool = True) -> Iterator[tuple[slice, Tensor]]:
        """Go through the stages, then yield each batch's output ``[B, L, H]``."""
        walker, visitor = self.walker, self.visitor
        projection = walker.model.get_submodule(self.last.linears[0].name)
        if visitor is not None:
            wanted = visitor.wants(_names(self.last))
            seen = wanted or walker.tapped(_names(self.last)) is not None
            self._take_memory(seen and needed)
            for number, group in enumerate(self.first):
                inputs = self._first_inputs() if number == 0 else (self._input(rows) for rows in walker.batches)
                visitor.linears(group, walker.statistics(group, inputs, visitor.wants(_names(group))))
            self._inner(projection, visitor)
            visitor.linears(self.last, walker.statistics(self.last, self._before(projection, True), wanted))
            self.held = None
        if not needed:
            return
        if self.kept is not None:
            for rows in walker.batches:
                yield rows, projection(_aligned(self.kept[rows].to(walker.device)))
            self.kept = None
        else:
            for rows, x in zip(walker.batches, self._before(projection, False)):
                yield rows, projection(x)

    def _take_memory(self, keep: bool) -> None:
        """Lay out what is kept for later in the walker's memory.

        Inputs of the last projection start at the front, inputs of the module end at the back. Both are used batch
        by batch from the front, so the former may overwrite those of the latter that have had their turn.
        """
        rows, length = self.walker.tokens.shape
        first, last = self.first[0].linears[0].in_features, self.last.linears[0].in_features
        item = self.walker.model.dtype.itemsize
        size = rows * length * item
        keep = keep and size * last <= KEEP_BYTES
        hold = self.walker.device.type == "cpu" and size * first <= KEEP_BYTES
        memory = self.walker.memory(size * max(last if keep else 0, first if hold else 0))
        if keep:
            self.kept = memory[: size * last].view(self.walker.model.dtype).view(rows, length, last)
        if hold:
            tail = memory[memory.numel() - size * first :]
            self.held = tail.view(self.walker.model.dtype).view(rows, length, first)

    def _first_inputs(self) -> Iterator[Tensor]:
        """Yield the module's input, batch by batch, for the first time."""
        for rows in self.walker.batches:
            x = self.inputs(rows)
            if self.held is not None:
                self.held[rows] = x
            yield x

    def _input(self, rows: slice) -> Tensor:
        """The module's input of one batch."""
        return self.inputs(rows) if self.held is None else _aligned(self.held[rows])

    def _before(self, projection: nn.Module, keep: bool) -> Iterator[Tensor]:
        """Yield the output projection's input, batch by batch."""
        for rows in self.walker.batches:
            with replaced_forward(projection, identity):
                before = self.call(rows, self._input(rows))
            if keep and self.kept is not None:
                self.kept[rows] = before
            yield before

    def _inner(self, projection: nn.Module, visitor: Visitor) -> None:
        """Groups in the middle of the module (MLA), all seen in one pass."""
        walker = self.walker
        counted = [visitor.wants(_names(group)) for group in self.inner]
        grams = [Gram(1, g.linears[0].in_features, walker.device) if c else None for g, c in zip(self.inner, counted)]
        taps = [walker.tapped(_names(group)) for group in self.inner]

        def seen(position: int, x: Tensor) -> None:
            gram, tap = grams[position], taps[position]
            if gram is not None:
                gram.add(x.flatten(0, -2))
            if tap is not None:
                tap.linears(self.inner[position], x.flatten(0, -2))

        if any(counted) or any(tap is not None for tap in taps):
            modules = [walker.model.get_submodule(group.linears[0].name) for group in self.inner]
            with recorded_inputs(modules, seen), replaced_forward(projection, identity):
                for rows in walker.batches:
                    self.call(rows, self._input(rows))
        for group, gram in zip(self.inner, grams):
            if gram is not None:
                check_finite(gram, group.linears[0].name)
            visitor.linears(group, gram)


class _MoeStep:
    """Router, routed experts and shared experts of one block."""

    def __init__(
        self,
        walker: Walker,
        block: Block,
        sublayer: Sublayer,
        source: Tensor,
        hidden: Tensor,
        visitor: Visitor | None,
    ) -> None:
        assert sublayer.experts is not None
        self.walker, self.block, self.sublayer, self.visitor = walker, block, sublayer, visitor
        self.bank: ExpertBank = sublayer.experts
        self.hidden = hidden
        self.module = walker.model.get_submodule(sublayer.module)
        self.experts = walker.model.get_submodule(self.bank.module)
        self.router = walker.model.get_submodule(self.bank.router.module)
        # all tokens' inputs in one tensor, because experts pick rows from all batches
        self.x = torch.cat([walker.normed(sublayer, source, rows).flatten(0, 1) for rows in walker.batches])
        self._layer_gram: Tensor | None = None

    def run(self, needed: bool) -> None:
        """Visit router, experts and shared experts, then add the module's output to the hidden states."""
        shared = self._shared_outputs(needed)
        if self.walker.tap is not None:
            self.walker.tap.moe(self.bank, self.x)
        if self.visitor is not None:
            self.visitor.router(self.bank, self.router, self.x)
        routing = self._route()
        if self.visitor is not None:
            self.visitor.routed(self.bank, routing.counts)
        mixed = self._mix(routing, needed)
        if mixed is None:
            return
        for rows in self.walker.batches:
            span = self._span(rows)
            with ExitStack() as stack:
                stack.enter_context(replaced_forward(self.experts, partial(_constant, mixed[span])))
                for module, outputs in shared:
                    stack.enter_context(replaced_forward(module, partial(_rows_like, outputs[span])))
                shape = (rows.stop - rows.start, *self.hidden.shape[1:])
                output = first_output(self.module(self.x[span].view(shape)))
            self.walker.add(self.sublayer, self.hidden, rows, output)

    def _span(self, rows: slice) -> slice:
        length = self.hidden.shape[1]
        return slice(rows.start * length, rows.stop * length)

    def _batch(self, rows: slice) -> Tensor:
        return _aligned(self.x[self._span(rows)]).unflatten(0, (rows.stop - rows.start, -1))

    def _route(self) -> Routing:
        routed = [self.router(self.x[self._span(rows)]) for rows in self.walker.batches]
        index = torch.cat([result[2] for result in routed])
        weights = torch.cat([result[1] for result in routed])
        return Routing.of(index, weights, self.bank.num_experts)

    def _shared_outputs(self, needed: bool) -> list[tuple[nn.Module, Tensor]]:
        """Shared experts, whose groups are staged like those of a dense MLP."""
        found = []
        for name in dict.fromkeys(group.module for group in self.sublayer.groups):
            groups = [group for group in self.sublayer.groups if group.module == name]
            module = self.walker.model.get_submodule(name)
            steps = GroupSteps(
                self.walker,
                groups,
                self.visitor,
                partial(self._call_shared, module),
                self._batch,
            )
            parts = [output.flatten(0, 1) for _, output in steps.outputs(needed)]
            if parts:
                found.append((module, torch.cat(parts)))
        return found

    @staticmethod
    def _call_shared(module: nn.Module, _rows: slice, x: Tensor) -> Tensor:
        output: Tensor = module(x)
        return output

    def _mix(self, routing: Routing, needed: bool) -> Tensor | None:
        """Run all experts, chunk by chunk; return the weighted sum per token ``[T, H]``."""
        bank, visitor = self.bank, self.visitor
        mixed = torch.zeros_like(self.x) if needed else None
        for experts in self._chunks():
            if visitor is not None:
                gram = self._gram(bank.gate_up, routing, experts) if visitor.wants([bank.gate_up]) else None
                visitor.experts(bank, bank.gate_up, experts, gram, self._shared_gate_up)
            kept: dict[int, list[Tensor]] = {}
            if visitor is not None:
                wanted = visitor.wants([bank.down])
                size = (routing.bounds[experts.stop] - routing.bounds[experts.start]) * bank.intermediate
                keep = kept if needed and size * self.x.dtype.itemsize <= KEEP_BYTES else None
                gram = self._gram(bank.down, routing, experts, keep) if wanted else None
                visitor.experts(bank, bank.down, experts, gram, self._shared_down)
            if mixed is not None:
                self._add_outputs(mixed, routing, experts, kept)
        return mixed

    def _add_outputs(self, mixed: Tensor, routing: Routing, experts: slice, kept: dict[int, list[Tensor]]) -> None:
        for expert in range(experts.start, experts.stop):
            for number, (tokens, weights) in enumerate(routing.pieces(expert)):
                inputs = kept.get(expert)
                z = inputs[number] if inputs else gated(self.experts, self.bank, expert, self.x[tokens])
                output = down(self.experts, self.bank, expert, z) * weights.unsqueeze(-1)
                # a token meets an expert at most once, so this is a plain scatter and deterministic
                mixed[tokens] += output.to(mixed.dtype)
            kept.pop(expert, None)

    def _gram(self, name: str, routing: Routing, experts: slice, keep: dict[int, list[Tensor]] | None = None) -> Gram:
        """Second moments of what some experts see; inputs of ``down`` are stored in ``keep``."""
        width = self.bank.shape(name)[2]
        affinity = self.visitor is not None and self.visitor.affinity
        tap = self.walker.tapped([name])
        gram = Gram(experts.stop - experts.start, width, self.walker.device)
        for expert in range(experts.start, experts.stop):
            for tokens, weights in routing.pieces(expert):
                x = self.x[tokens]
                if name == self.bank.down:
                    x = gated(self.experts, self.bank, expert, x)
                    if keep is not None:
                        keep.setdefault(expert, []).append(x)
                used = weights if affinity else None
                gram.add(x, expert - experts.start, used)
                if tap is not None:
                    tap.experts(self.bank, name, experts, expert, tokens, x, used)
        check_finite(gram, name)
        return gram

    def _shared_gate_up(self, _expert: int) -> Tensor:
        if self._layer_gram is None:
            gram = Gram(1, self.bank.hidden, self.walker.device)
            for piece in self.x.split(BATCH_TOKENS):
                gram.add(piece)
            self._layer_gram = gram.hessian()[0]
        return self._layer_gram

    def _shared_down(self, expert: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.walker.seed + self.block.index)
        chosen = torch.randperm(self.x.shape[0], generator=generator)[:FORCED_TOKENS].to(self.x.device)
        gram = Gram(1, self.bank.intermediate, self.walker.device)
        gram.add(gated(self.experts, self.bank, expert, self.x[chosen]))
        return gram.hessian()[0]

    def _chunks(self) -> list[slice]:
        bank = self.bank
        one = (bank.hidden**2 + bank.intermediate**2) * 4
        step = bank.num_experts if self.visitor is None else max(1, GRAM_BYTES // one)
        return [slice(i, min(i + step, bank.num_experts)) for i in range(0, bank.num_experts, step)]


def check_finite(gram: Gram, name: str) -> None:
    """Refuse statistics with NaN or infinity.

    Raises:
        InputError: Naming the weight whose input is damaged.
    """
    if not bool(torch.isfinite(gram.total.diagonal(dim1=-2, dim2=-1)).all()):
        raise InputError(
            f"{name}: its calibration inputs contain NaN or infinity",
            "check the model's weights, or use run.compute_dtype=float32",
        )


def _aligned(x: Tensor) -> Tensor:
    """``x``, or a copy of it: the last bits of a product may depend on how its inputs are aligned."""
    return x if x.is_cuda or x.data_ptr() % CACHE_LINE == 0 else x.clone()


def _constant(value: Tensor, *_args: Any) -> Tensor:
    return value


def _rows_like(value: Tensor, x: Tensor) -> Tensor:
    return value.view_as(x)


def _names(group: LinearGroup) -> list[str]:
    return [linear.name for linear in group.linears]


def _call_arguments(call: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Arguments for the attention module: caches dropped, tensors moved."""
    return {key: _moved(value, device) for key, value in call.items() if key not in _CACHE_KEYS}


_CACHE_KEYS = ("past_key_values", "cache_params", "use_cache")


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple | list):
        return type(value)(_moved(item, device) for item in value)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    return value
