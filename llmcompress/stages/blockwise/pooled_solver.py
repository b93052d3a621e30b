"""The solver of a block whose statistics come in shards: sums in order on an owner, solves there, results to all.

Every rank runs its own windows through the block, so every rank needs the quantized weights, but each Hessian is summed
and factored on one rank only. Linears that share an input follow one another and have one owner each; experts are many
and dealt out by greedy bin packing. What is sent back are codes and grids, never dense weights; all ranks, the owner
too, go on with the decoded values. Experts are solved one at a time, so a result does not depend on who else lives
where. Imported by the engine only.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmcompress.algorithms.hessian import Gram, blend_rare
from llmcompress.distributed.balance import greedy_bin_packing, solve_cost
from llmcompress.distributed.world import World, each_owner
from llmcompress.models.capture import write_expert_weight
from llmcompress.models.orientation import canonical
from llmcompress.quant.codecs import int_group
from llmcompress.quant.packed import PackedWeight
from llmcompress.stages.blockwise.block_solver import BlockSolver, check_finite, cpu

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.group_steps import Moments
    from llmcompress.models.layout import ExpertBank, LinearGroup
    from llmcompress.models.router import Router
    from llmcompress.quant.spec import QuantSpec


class PooledSolver(BlockSolver):
    """A :class:`BlockSolver` on several ranks, or on one that sums as several would.

    Args:
        world: The ranks and their shards.
        arguments: Those of :class:`BlockSolver`.
        options: Likewise.
    """

    def __init__(self, world: World, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.world = world
        groups = [group for sublayer in self.block.sublayers for group in sublayer.groups]
        costs = [
            solve_cost(sum(linear.out_features for linear in group.linears), group.linears[0].in_features)
            for group in groups
        ]
        owners = greedy_bin_packing(costs, world.size)
        self._owners = {group.linears[0].name: owner for group, owner in zip(groups, owners)}

    def router(self, bank: ExpertBank, router: Router, x: Tensor) -> None:
        """Let the hook see all tokens, on rank 0, and tell everyone what it made of the router."""
        if self.hook is None:
            return
        everything = self.world.gather_rows(x)
        before = set(self.replaced)
        if everything is not None:
            super().router(bank, router, everything)
        new = {name: tensor for name, tensor in self.replaced.items() if name not in before}
        for name, tensor in self.world.share_tensors(new, 0).items():
            self.replaced[name] = tensor
            place = self.model.get_parameter(name)
            place.data.copy_(tensor.to(place))

    def routed(self, bank: ExpertBank, counts: list[int]) -> None:
        """Note tokens per expert, over all ranks."""
        super().routed(bank, self.world.add_counts(counts))

    def linears(self, group: LinearGroup, gram: Moments | None) -> None:  # type: ignore[override]
        """Sum, solve on the owner, share."""
        names = [linear.name for linear in group.linears if linear.name in self.plan]
        if not names:
            return
        first = group.linears[0].name
        owner, whole = self._owners[first], None
        if gram is not None:
            whole = self._summed(gram, owner)
            if self.pairs is not None:
                parts = self.pairs.take_shards(first, len(gram.shards), gram.shards[0].total)
                cross = self.world.sum_in_order(parts, owner)
                if cross is not None:
                    self.pairs.put(first, cross)
        if self.world.rank == owner:
            super().linears(group, whole)
        own = {
            f"{name}|{key}": t for name in names if name in self.packed for key, t in self.packed[name].tensors.items()
        }
        found = self.world.share_tensors(own if self.world.rank == owner else None, owner)
        errors = self.world.tell({name: self.record["errors"].get(name) for name in names}, owner)
        self.record["errors"].update(errors)
        if self.world.rank != owner:
            for name in names:
                place = self.model.get_parameter(f"{name}.weight")
                tensors = {key.rpartition("|")[2]: t for key, t in found.items() if key.startswith(f"{name}|")}
                self.packed[name] = PackedWeight(tuple(place.shape), self.plan[name], tensors)
                place.data.copy_(int_group.decode(self.packed[name]).to(place))

    def experts(  # type: ignore[override]
        self,
        bank: ExpertBank,
        name: str,
        experts: slice,
        gram: Moments | None,
        shared: Callable[[int], Moments],
    ) -> None:
        """Deal some experts out, solve each where it lives, share."""
        spec = self.plan.get(name)
        if spec is None:
            return
        if self.pairs is not None and name == bank.gate_up:
            self.pairs.keep_original(bank, experts)
        _, rows, columns = bank.shape(name)
        count = experts.stop - experts.start
        tokens, usable = None, [False] * count
        if gram is not None:
            tokens = self.world.add_counts([sum(c) for c in zip(*(g.tokens.tolist() for g in gram.shards))])
            usable = self._usable(name, experts.start, tokens, self.rare.needed(columns))
        costs = [solve_cost(rows, columns) if use else float(rows * columns) for use in usable]
        owners = greedy_bin_packing(costs, self.world.size)
        hessians = self._dealt(bank, name, experts, gram, shared, owners, tokens)
        own: dict[str, Tensor] = {}
        figures: dict[str, list[float]] = {}
        for item in (item for item, owner in enumerate(owners) if owner == self.world.rank):
            expert = experts.start + item
            packed, above, below = self._one(bank, name, expert, spec, hessians.get(item), usable[item])
            own.update({f"{expert}|{key}": tensor for key, tensor in packed.tensors.items()})
            weight = float(hessians[item][0].mass) if item in hessians else 1.0
            figures[str(expert)] = [above * weight, below * weight]
        self._collect(bank, name, experts, spec, owners, own, figures)

    def _dealt(
        self, bank: ExpertBank, name: str, experts: slice, gram: Moments | None, shared: Callable[[int], Moments],
        owners: list[int], tokens: list[int] | None,
    ) -> dict[int, tuple[Gram, Tensor | None, Tensor | None]]:  # fmt: skip
        """Bring the sums of each expert to its owner: moments, cross moments, and the layer's Hessian for rare ones."""
        import torch

        if gram is None or tokens is None:
            return {}
        found: dict[int, tuple[Gram, Tensor | None, Tensor | None]] = {}
        needed = self.rare.needed(bank.shape(name)[2])
        cross_parts = None
        if self.pairs is not None:
            cross_parts = self.pairs.take_shards(name, len(gram.shards), gram.shards[0].total)

        def bring(owner: int, items: list[int]) -> None:
            for item in items:
                total = self.world.sum_in_order([g.total[item : item + 1] for g in gram.shards], owner)
                cross, layer, mass = None, None, None
                if self.affinity:
                    mass = self.world.sum_in_order([g.mass[item : item + 1].float() for g in gram.shards], owner)
                if cross_parts is not None:
                    cross = self.world.sum_in_order([part[item : item + 1] for part in cross_parts], owner)
                if 0 < tokens[item] < needed and self.rare.blend:
                    layer = self._summed(shared(experts.start + item), owner)
                if total is not None:
                    whole = Gram.of(total, torch.tensor([tokens[item]]), mass)
                    if cross is not None and tokens[item] < needed:
                        cross.zero_()
                    found[item] = (whole, cross, None if layer is None else layer.hessian()[0])

        each_owner(owners, self.world.size, bring)
        for moments in gram.shards:
            moments.release()
        return found

    def _one(
        self, bank: ExpertBank, name: str, expert: int, spec: QuantSpec,
        sums: tuple[Gram, Tensor | None, Tensor | None] | None, usable: bool,
    ) -> tuple[PackedWeight, float, float]:  # fmt: skip
        """Solve one expert; its packed weight ``[1, N, K]``, error and energy."""
        import torch

        place = self.model.get_parameter(name)
        source = self._source(name)[expert : expert + 1].to(place.device)
        weights = canonical(bank, name, source).to(torch.float32)
        check_finite(weights, name)
        hessian = None
        if sums is not None:
            gram, cross, layer = sums
            if cross is not None:
                weights = self._fitted(weights, gram.hessian(), cross.to(weights.device), gram)
            hessian = gram.hessian().to(weights.device)
            if layer is not None:
                hessian = blend_rare(hessian, gram.tokens, layer, self.rare.needed(hessian.shape[-1]))
        use = None if hessian is None else [usable]
        solved = self._solve(weights, hessian, spec, use, None)
        packed = int_group.encode(solved.codes.cpu(), solved.scale.cpu(), cpu(solved.zero), spec)
        return packed, float(solved.error.sum()), float(solved.energy.sum())

    def _collect(
        self, bank: ExpertBank, name: str, experts: slice, spec: QuantSpec, owners: list[int],
        own: dict[str, Tensor], figures: dict[str, list[float]],
    ) -> None:  # fmt: skip
        """Share what all owners have made, put it into the block, join the chunks at the last one."""
        import torch

        tensors: dict[str, Tensor] = {}
        totals: dict[str, list[float]] = {}

        def share(owner: int, _items: list[int]) -> None:
            mine = self.world.rank == owner
            tensors.update(self.world.share_tensors(own if mine else None, owner))
            totals.update(self.world.tell(figures if mine else None, owner))

        each_owner(owners, self.world.size, share)
        keys = sorted({key.partition("|")[2] for key in tensors})
        stacked = {
            key: torch.cat([tensors[f"{expert}|{key}"] for expert in range(experts.start, experts.stop)])
            for key in keys
        }
        _, rows, columns = bank.shape(name)
        chunk = PackedWeight((experts.stop - experts.start, rows, columns), spec, stacked)
        write_expert_weight(self.model.get_submodule(bank.module), bank, name, experts, int_group.decode(chunk))
        above, below = (sum(pair[side] for pair in totals.values()) for side in range(2))
        self._stack(bank, name, experts, chunk, above, below)

    def _summed(self, moments: Moments, owner: int) -> Gram | None:
        """The moments of a single matrix over all shards, on the owner."""
        import torch

        counts = self.world.add_counts([sum(int(g.tokens[0]) for g in moments.shards)])
        total = self.world.sum_in_order([gram.total for gram in moments.shards], owner)
        return None if total is None else Gram.of(total, torch.tensor(counts))
