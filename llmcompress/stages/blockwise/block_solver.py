"""The visitor that quantizes a block while the walker runs it. Imported by the engine only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llmcompress.errors import InputError
from llmcompress.models.memory_limits import DEFAULT, Limits
from llmcompress.quant.codecs import int_group
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantPlan, QuantSpec

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.algorithms.rounding import Rounded
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ExpertBank, LinearGroup
    from llmcompress.models.router import Router
    from llmcompress.models.stream_pairs import StreamPairs
    from llmcompress.stages.blockwise.engine import RouterHook
    from llmcompress.stages.blockwise.method import Method
    from llmcompress.stages.blockwise.shared_statistics import SharedMoments


@dataclass
class _Stack:
    """Parts of one expert projection, in expert order."""

    parts: list[PackedWeight] = field(default_factory=list)
    above: float = 0.0
    below: float = 0.0


class BlockSolver:
    """Quantizes every planned weight of one block at the moment the walker is about to use it.

    Args:
        handle: The source model, for weights in full precision.
        model: The skeleton whose block is materialised.
        block: Which block.
        plan: Plan name → spec; weights that are absent stay dense.
        method: How to quantize.
        hook: Sees, and may change, the router.
        pairs: Inputs paired with the full-precision stream's; then weights are fitted to it first.
        warn: Where warnings go.

    Attributes:
        limits: Memory that may be taken.
        shared: Statistics of weights that several blocks run, in the place of this block's own.
    """

    def __init__(
        self,
        handle: ModelHandle,
        model: PreTrainedModel,
        block: Block,
        plan: QuantPlan,
        method: Method,
        *,
        hook: RouterHook | None = None,
        pairs: StreamPairs | None = None,
        warn: Callable[[str], None] = lambda _text: None,
    ) -> None:
        self.limits: Limits = DEFAULT
        self.shared: SharedMoments | None = None
        self.handle, self.model, self.block, self.plan = handle, model, block, plan
        self.method, self.rare, self.hook = method, method.rare, hook
        self.pairs, self.target_ridge = pairs, method.target_ridge
        self.warn = warn
        self.affinity = method.rare.affinity
        self.packed: dict[str, PackedWeight] = {}
        self.replaced: dict[str, Tensor] = {}
        self.record: dict[str, Any] = {"errors": {}}
        self._stacks: dict[str, _Stack] = {}
        self._sources: dict[str, Tensor] = {}
        self._runs = True

    def wants(self, names: Sequence[str]) -> bool:
        """Second moments are needed for weights that are quantized by them."""
        return self.method.hessians and any(name in self.plan and not self._is_shared(name) for name in names)

    def router(self, bank: ExpertBank, router: Router, x: Tensor) -> None:
        """Let the hook calibrate the router, then make it what the artifact will hold."""
        if self.hook is None:
            return
        update = self.hook.calibrate(self.block, router, x)
        if update.record:
            self.record["router"] = update.record
        for name, tensor in update.replaced.items():
            # the artifact stores it in its type in the checkpoint; route with exactly that
            stored = tensor.detach().to(self.handle.checkpoint.dtype_of(name)).cpu()
            self.replaced[name] = stored
            place = self.model.get_parameter(name)
            place.data.copy_(stored.to(place))

    def routed(self, bank: ExpertBank, counts: list[int]) -> None:
        """Note tokens per expert."""
        self.record["tokens_per_expert"] = counts

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """Quantize the planned linears of a group; those with equal specs in one solve."""
        names = [linear.name for linear in group.linears if linear.name in self.plan]
        cross = None if self.pairs is None else self.pairs.take(group.linears[0].name)
        own = [name for name in names if not self._is_shared(name)]
        hessian = None
        if gram is not None and own:
            hessian = gram.take_hessian()
        self._solve_linears(own, hessian, cross, gram)
        lent = [name for name in names if name not in own]
        if lent:
            assert self.shared is not None
            summed = self.shared.gram(lent[0], str(self.model.get_parameter(f"{lent[0]}.weight").device))
            self._solve_linears(lent, summed.take_hessian(), None, summed)

    def _is_shared(self, name: str) -> bool:
        return self.shared is not None and name in self.shared.first

    def _solve_linears(self, names: list[str], hessian: Tensor | None, cross: Tensor | None, gram: Gram | None) -> None:
        """Quantize linears that have one Hessian."""
        import torch

        for spec in dict.fromkeys(self.plan[name] for name in names):
            mine = [name for name in names if self.plan[name] == spec]
            weights = [self._source(f"{name}.weight").to(torch.float32) for name in mine]
            for name, weight in zip(mine, weights):
                check_finite(weight, f"{name}.weight")
            kept = [weight[weight.shape[0] - spec.dense_rows :] for weight in weights]
            weights = [weight[: weight.shape[0] - spec.dense_rows] for weight in weights]
            stacked = torch.cat(weights)[None]
            if hessian is not None and cross is not None:
                stacked = self._fitted(stacked, hessian, cross, gram)
            found = self._solve(stacked, hessian, spec, None, self._place(f"{mine[0]}.weight"))
            start = 0
            for name, weight, last in zip(mine, weights, kept):
                rows = slice(start, start + weight.shape[0])
                start = rows.stop
                part = None if found.zero is None else found.zero[0, rows]
                dense = last.to(torch.float16) if spec.dense_rows else None
                self.packed[name] = int_group.encode(
                    found.codes[0, rows].cpu(), found.scale[0, rows].cpu(), cpu(part), spec, cpu(dense)
                )
                if found.quantized is not None:
                    place = self.model.get_parameter(f"{name}.weight")
                    place.data[: weight.shape[0]].copy_(found.quantized[0, rows].to(place))
                    if dense is not None:
                        place.data[weight.shape[0] :].copy_(dense.to(place))
                self.record["errors"][name] = ratio(
                    float(found.error[0, rows].sum()), float(found.energy[0, rows].sum())
                )

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, gram: Gram | None, shared: Callable[[int], Tensor]
    ) -> None:
        """Quantize one projection of some experts, all in one batched solve."""
        import torch

        from llmcompress.models.capture import write_expert_weight
        from llmcompress.models.orientation import canonical

        spec = self.plan.get(name)
        if spec is None:
            return
        module = self.model.get_submodule(bank.module)
        if self.pairs is not None and name == bank.gate_up:
            self.pairs.keep_original(bank, experts)
        source = self._source(name)[experts]
        weights = canonical(bank, name, source.to(self.model.get_parameter(name).device))
        hessian, usable, counts = None, None, torch.ones(weights.shape[0])
        if gram is not None:
            weights = weights.to(torch.float32)
            check_finite(weights, name)
            cross = None if self.pairs is None else self.pairs.take(name)
            if cross is not None:
                cross[gram.tokens < self.rare.needed(cross.shape[-1])] = 0
                weights = self._fitted(weights, gram.hessian(), cross, gram)
            hessian, usable = self._expert_hessians(name, experts, gram, shared)
            counts = gram.mass.to(torch.float32)
        found = self._solve(weights, hessian, spec, usable, self._place(name))
        if gram is None and not bool(found.energy.isfinite().all()):
            check_finite(weights, name)
        if found.quantized is not None:
            write_expert_weight(module, bank, name, experts, found.quantized)
        packed = int_group.encode(found.codes.cpu(), found.scale.cpu(), cpu(found.zero), spec)
        above, below = (float((sums.sum(-1).cpu() * counts).sum()) for sums in (found.error, found.energy))
        self._stack(bank, name, experts, packed, above, below)

    def _stack(
        self, bank: ExpertBank, name: str, experts: slice, packed: PackedWeight, above: float, below: float
    ) -> None:
        """Keep some experts of a projection with their error and energy; the last ones complete it."""
        import torch

        stack = self._stacks.setdefault(name, _Stack())
        stack.parts.append(packed)
        stack.above += above
        stack.below += below
        if experts.stop == bank.num_experts:
            parts = [part.tensors for part in stack.parts]
            tensors = {key: torch.cat([part[key] for part in parts]) for key in packed.tensors}
            self.packed[name] = PackedWeight(bank.shape(name), packed.spec, tensors)
            self.record["errors"][name] = ratio(stack.above, stack.below)
            del self._stacks[name]
            self._sources.pop(name, None)

    def visit_without_data(self) -> None:
        """Quantize everything that is planned without running the block (round to nearest).

        Nothing reads the block's weights afterwards, so what the codes stand for is not put into it.
        """
        self._runs = False
        for sublayer in self.block.sublayers:
            for group in sublayer.groups:
                self.linears(group, None)
        bank = self.block.bank
        for name in (bank.gate_up, bank.down) if bank is not None else ():
            assert bank is not None
            step = max(1, self.limits.rounded // (bank.hidden * bank.intermediate))
            for start in range(0, bank.num_experts, step):
                chunk = slice(start, min(start + step, bank.num_experts))
                self.experts(bank, name, chunk, None, _no_statistics)

    def _fitted(self, weights: Tensor, hessian: Tensor, cross: Tensor, gram: Gram | None) -> Tensor:
        """Weights fitted to the full-precision stream; ``cross`` is a sum (of :meth:`StreamPairs.take`), ``hessian`` a
        mean times two.
        """
        from llmcompress.algorithms.reference_targets import fit_to_reference

        assert gram is not None
        assert self.target_ridge is not None
        inputs, drift = (cross * gram.share().to(cross)[:, None, None]).tensor_split([cross.shape[-1]], -2)
        return fit_to_reference(weights, hessian, inputs, self.target_ridge, drift if drift.shape[-2] else None)

    def _solve(
        self, weights: Tensor, hessian: Tensor | None, spec: QuantSpec, usable: list[bool] | None, place: Tensor | None
    ) -> Rounded:
        """What the method makes of a stack of weights; values only for a place that is given."""

        def warn(text: str) -> None:
            self.warn(f"{self.block.name}: {text}")

        return self.method.solve(weights, hessian, spec, usable, None if place is None else place.dtype, warn)

    def _expert_hessians(
        self, name: str, experts: slice, gram: Gram, shared: Callable[[int], Tensor]
    ) -> tuple[Tensor, list[bool]]:
        """Hessians of some experts under the policy for rare ones, and which of them can be used."""
        from llmcompress.algorithms.hessian import blend_rare

        hessian = gram.take_hessian()
        needed = self.rare.needed(hessian.shape[-1])
        tokens = gram.tokens.tolist()
        usable = self._usable(name, experts.start, tokens, needed)
        for position, seen in enumerate(tokens):
            if 0 < seen < needed and self.rare.blend:
                own = slice(position, position + 1)
                blend_rare(hessian[own], gram.tokens[own], shared(experts.start + position), needed)
        return hessian, usable

    def _usable(self, name: str, start: int, tokens: list[int], needed: int) -> list[bool]:
        """Which experts have a Hessian to solve with, by the policy for rare ones; notes the others.

        Args:
            name: Plan name of the projection.
            start: The first expert.
            tokens: That it and those after it have seen.
            needed: From how many on an expert stands on its own.
        """
        for expert, seen in enumerate(tokens, start):
            if seen == 0:
                self.warn(f"{name}: expert {expert} saw no calibration token; rounded to nearest")
                self.record.setdefault("unseen_experts", {}).setdefault(name, []).append(expert)
            elif seen < needed:
                self.record.setdefault("rare_experts", {}).setdefault(name, []).append(expert)
        return [seen > 0 and (seen >= needed or self.rare.blend) for seen in tokens]

    def _place(self, name: str) -> Tensor | None:
        """Where the block's next pass looks for a weight, None when there is no such pass."""
        return self.model.get_parameter(name) if self._runs else None

    def _source(self, name: str) -> Tensor:
        """A weight in the family's orientation, from the checkpoint where the block's type does not hold it exactly."""
        import torch

        place = self.model.get_parameter(name).detach()
        # sizes do not tell: bfloat16 has three bits less than float16 of the same size
        if torch.promote_types(self.handle.checkpoint.dtype_of(name), place.dtype) == place.dtype:
            return place
        if name not in self._sources:
            tensor = self.handle.checkpoint.tensor(name).to(place.device)
            if place.dim() == 2:
                return tensor
            self._sources[name] = tensor
        return self._sources[name]


def _no_statistics(_expert: int) -> Tensor:
    raise AssertionError("rounding to nearest needs no statistics")


def check_finite(weight: Tensor, name: str) -> None:
    """Refuse a weight with NaN or infinity.

    Raises:
        InputError: Naming it.
    """
    from llmcompress.models.tensor_file import all_finite

    if not all_finite(weight):
        raise InputError(f"{name}: the weight contains NaN or infinity", "download the model again")


def cpu(tensor: Tensor | None) -> Tensor | None:
    """A tensor on the CPU; None stays."""
    return None if tensor is None else tensor.cpu()


def ratio(above: float, below: float) -> float:
    """Relative error, 0 where there is no energy."""
    return above / below if below > 0 else 0.0
