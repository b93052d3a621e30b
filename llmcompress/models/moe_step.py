"""Router, routed experts and shared experts of one block, in stages. See the walker.

Legend: T tokens, H hidden, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.algorithms.hessian import Gram
from llmcompress.models.alignment import CACHE_LINE, aligned
from llmcompress.models.capture import Routing, constant, down, first_output, gated, replaced_forward
from llmcompress.models.group_steps import GroupSteps, Moments
from llmcompress.models.memory_limits import FORCED_TOKENS
from llmcompress.models.router import Router

if TYPE_CHECKING:
    from llmcompress.models.layout import Block, ExpertBank, Sublayer
    from llmcompress.models.visitor import Visitor
    from llmcompress.models.walker import Walker

# rows that are summed or cleared at once
ROWS = 512


class MoeStep:
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
        self.router = Router(walker.model, self.bank.router)
        # all tokens' inputs in one tensor, because experts pick rows from all batches
        self.x = self._inputs(source)
        # what the router reads, which in one family has no norm yet
        self.routed_x = source.flatten(0, 1).to(walker.device) if self.bank.router.normed else self.x
        # what the experts read, which is narrower in some families
        self.inner = self._entered()
        self._layer_gram: Any = None
        # the router's results, batch by batch
        self._router_said: list[Any] = []

    def run(self, needed: bool) -> None:
        """Visit router, experts and shared experts, then add the module's output to the hidden states."""
        shared = self._shared_outputs(needed)
        if self.walker.tap is not None:
            self.walker.tap.moe(self.bank, self.inner)
        if self.visitor is not None:
            self.visitor.router(self.bank, self.router, self.routed_x)
        routing = self._route()
        if self.walker.tap is not None:
            self.walker.tap.routed(self._written(routing))
        if self.visitor is not None:
            counts = [sum(own) for own in zip(*(shard.counts for shard in routing))]
            self.visitor.routed(self.bank, counts or [0] * self.bank.num_experts)
        mixed = self._mix(routing, needed)
        if mixed is None:
            return
        for rows, said in zip(self.walker.batches, self._router_said):
            output = self._module_output(self._span(rows), said, mixed, shared)
            self.walker.add(self.sublayer, self.hidden, rows, output.unflatten(0, (rows.stop - rows.start, -1)))
            self.walker.cache.drop(self.x, mixed)

    def _module_output(self, span: slice, said: Any, mixed: Tensor, shared: list[tuple[nn.Module, Tensor]]) -> Tensor:
        """What the module makes of results that are known, ``[T, H]`` of some tokens."""
        if self.sublayer.module == self.block.name:
            # the block itself holds router and experts, and does no more with them
            return mixed[span]
        with ExitStack() as stack:
            stack.enter_context(replaced_forward(self.router.module, partial(constant, said)))
            stack.enter_context(replaced_forward(self.experts, partial(constant, mixed[span])))
            for module, outputs in shared:
                stack.enter_context(replaced_forward(module, partial(_rows_like, outputs[span])))
            x = self.x[span].unflatten(0, (-1, self.hidden.shape[1]))
            return first_output(self.module(x)).flatten(0, -2)

    def _inputs(self, source: Tensor) -> Tensor:
        walker, x = self.walker, None
        for rows in walker.batches:
            part = walker.normed(self.sublayer, source, rows).flatten(0, 1)
            if x is None:
                shape = (source.shape[0] * source.shape[1], part.shape[1])
                size = -(-shape[0] * shape[1] * part.itemsize // CACHE_LINE) * CACHE_LINE
                self._memory = walker.expert_memory(self.sublayer, size)
                x = self._view(0, shape, part.dtype)
                x = walker.cache.empty(shape, part.dtype, part.device) if x is None else x
            x[self._span(rows)] = part
            walker.cache.drop(x)
        assert x is not None
        return x

    def _view(self, half: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor | None:
        """A tensor in a half of the memory lent by the walker; None without."""
        if self._memory is None:
            return None
        return self._memory.view(2, -1)[half].view(dtype)[: prod(shape)].view(*shape)

    def _entered(self) -> Tensor:
        entry = self.bank.entry
        if entry is None:
            return self.x
        project = self.walker.model.get_submodule(entry.name)
        inner = self.walker.cache.empty((len(self.x), self.bank.hidden), self.x.dtype, self.x.device)
        for rows in self.walker.batches:
            span = self._span(rows)
            inner[span] = project(aligned(self.x[span]))
            self.walker.cache.drop(self.x, inner)
        return inner

    def _span(self, rows: slice) -> slice:
        length = self.hidden.shape[1]
        return slice(rows.start * length, rows.stop * length)

    def _batch(self, rows: slice) -> Tensor:
        return aligned(self.x[self._span(rows)]).unflatten(0, (rows.stop - rows.start, -1))

    def _route(self) -> list[Routing]:
        """Where the tokens of each shard go; token numbers count over all shards."""
        routed: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.walker.parts]
        for rows in self.walker.batches:
            said = self.router(self.routed_x[self._span(rows)])
            self._router_said.append(said)
            _, weights, index = said
            routed[self.walker.shard_of(rows)].append((index, weights))
            self.walker.cache.drop(self.x)
        found = []
        for part, own in zip(self.walker.parts, routed):
            index, weights = (torch.cat(parts) for parts in zip(*own))
            found.append(Routing.of(index, weights, self.bank.num_experts, self._span(part).start))
        return found

    def _pieces(self, routing: list[Routing], expert: int) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield shard, tokens and weights of one expert, at most ``PIECE`` rows at a time."""
        for number, shard in enumerate(routing):
            for tokens, weights in shard.pieces(expert):
                yield number, tokens, weights

    def _rows(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Inputs of some tokens that meet an expert with these weights, ``[n, H]``, a copy."""
        found = self.inner.index_select(0, tokens)
        self.walker.cache.drop(self.inner)
        return found.mul_(weights.unsqueeze(-1)) if self.bank.scales_inputs else found

    def _written(self, routing: list[Routing]) -> list[Routing]:
        """The same with the weights of what experts write."""
        if not self.bank.scales_inputs:
            return routing
        return [replace(shard, weight=torch.ones_like(shard.weight)) for shard in routing]

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

    def _mix(self, routing: list[Routing], needed: bool) -> Tensor | None:
        """Run all experts, chunk by chunk; return the weighted sum per token ``[T, H]``."""
        bank, visitor = self.bank, self.visitor
        mixed = self._zeros() if needed else None
        for experts in self._chunks():
            if visitor is not None:
                gram = self._gram(bank.gate_up, routing, experts) if visitor.wants([bank.gate_up]) else None
                visitor.experts(bank, bank.gate_up, experts, gram, self._shared_gate_up)
            kept: dict[int, list[Tensor]] = {}
            if visitor is not None:
                wanted = visitor.wants([bank.down])
                rows = sum(shard.bounds[experts.stop] - shard.bounds[experts.start] for shard in routing)
                size = rows * bank.intermediate
                keep = kept if needed and size * self.x.dtype.itemsize <= self.walker.limits.keep else None
                gram = self._gram(bank.down, routing, experts, keep) if wanted else None
                visitor.experts(bank, bank.down, experts, gram, self._shared_down)
            if mixed is not None:
                self._add_outputs(mixed, routing, experts, kept)
        return mixed

    def _zeros(self) -> Tensor:
        mixed = self._view(1, self.inner.shape, self.inner.dtype)
        if mixed is None:
            mixed = self.walker.cache.empty(self.inner.shape, self.inner.dtype, self.inner.device)
        for part in mixed.split(ROWS):
            part.zero_()
            self.walker.cache.drop(mixed)
        return mixed

    def _add_outputs(
        self, mixed: Tensor, routing: list[Routing], experts: slice, kept: dict[int, list[Tensor]]
    ) -> None:
        for expert in range(experts.start, experts.stop):
            for number, (_, tokens, weights) in enumerate(self._pieces(routing, expert)):
                inputs = kept.get(expert)
                z = inputs[number] if inputs else gated(self.experts, self.bank, expert, self._rows(tokens, weights))
                output = down(self.experts, self.bank, expert, z)
                if not self.bank.scales_inputs:
                    output *= weights.unsqueeze(-1)
                # a token meets an expert at most once, so the order of the additions is no matter
                mixed.index_add_(0, tokens, output.to(mixed.dtype))
                self.walker.cache.drop(mixed)
            kept.pop(expert, None)

    def _gram(
        self, name: str, routing: list[Routing], experts: slice, keep: dict[int, list[Tensor]] | None = None
    ) -> Gram | Moments:
        """Second moments of what some experts see; inputs of ``down`` are stored in ``keep``."""
        width = self.bank.shape(name)[2]
        # inputs that are scaled have their weights in them
        affinity = self.visitor is not None and self.visitor.affinity and not self.bank.scales_inputs
        tap = self.walker.tapped([name])
        moments = self.walker.new_moments(experts.stop - experts.start, width, fast=False)
        for expert in range(experts.start, experts.stop):
            for shard, tokens, weights in self._pieces(routing, expert):
                x = self._rows(tokens, weights)
                if name == self.bank.down:
                    x = gated(self.experts, self.bank, expert, x)
                    if keep is not None:
                        keep.setdefault(expert, []).append(x)
                used = weights if affinity else None
                moments.shards[shard].add(x, expert - experts.start, used)
                if tap is not None:
                    tap.shard = shard
                    tap.experts(
                        self.bank, name, experts, expert, tokens, x, weights if self.bank.scales_inputs else used
                    )
        return moments.checked(name)

    def _shared_gate_up(self, _expert: int) -> Any:
        if self._layer_gram is None:
            moments = self.walker.new_moments(1, self.bank.hidden, fast=False)
            for part, gram in zip(self.walker.parts, moments.shards):
                for piece in self.inner[self._span(part)].split(ROWS):
                    gram.add(piece)
                    self.walker.cache.drop(self.inner)
            self._layer_gram = moments if moments.apart else moments.shards[0].take_hessian()[0]
        return self._layer_gram

    def _shared_down(self, expert: int) -> Any:
        first, total = self.walker.first_token, self.walker.all_tokens or self.x.shape[0]
        generator = torch.Generator().manual_seed(self.walker.seed + self.block.index)
        chosen = torch.randperm(total, generator=generator)[:FORCED_TOKENS] - first
        moments = self.walker.new_moments(1, self.bank.intermediate, fast=False)
        for part, gram in zip(self.walker.parts, moments.shards):
            span = self._span(part)
            own = chosen[(chosen >= span.start) & (chosen < span.stop)].to(self.x.device)
            gram.add(gated(self.experts, self.bank, expert, self._rows(own, self._weights(expert, own))))
        return moments if moments.apart else moments.shards[0].take_hessian()[0]

    def _weights(self, expert: int, tokens: Tensor) -> Tensor:
        """What an expert's weights would be if it were the only one of these tokens, ``[n]``."""
        logits = torch.cat([said[0][:, expert] for said in self._router_said])
        own = logits[tokens].unsqueeze(-1)
        return self.router.rule(1).weigh(own, torch.zeros_like(own, dtype=torch.int64)).squeeze(-1)

    def _chunks(self) -> list[slice]:
        bank = self.bank
        if self.visitor is None:
            return [slice(0, bank.num_experts)]
        return self.walker.limits.chunks(bank.num_experts, bank.hidden, bank.intermediate)


def _rows_like(value: Tensor, x: Tensor) -> Tensor:
    return value.view_as(x)
