"""Measured error of every weight at every width, for ``auto`` bit plans. Imported by the engine only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from llmcompress.models.visitor import DenseVisitor

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.models.layout import Block, ExpertBank, LinearGroup
    from llmcompress.models.memory_limits import Limits
    from llmcompress.quant.rules import AutoUnit, Rule
    from llmcompress.quant.spec import QuantSpec
    from llmcompress.stages.state import RunContext, RunState


class ErrorMeter(DenseVisitor):
    """Visitor that measures and changes nothing: relative output error of rounding to nearest.

    Args:
        model: Skeleton whose block is materialised.
        wanted: Plan name → candidate specs, narrowest first.
    """

    def __init__(self, model: PreTrainedModel, wanted: Mapping[str, Sequence[QuantSpec]]) -> None:
        self.model, self.wanted = model, wanted
        self.above: dict[str, list[float]] = {}
        self.below: dict[str, float] = {}

    def wants(self, names: Sequence[str]) -> bool:
        """Statistics are needed for weights under an auto plan."""
        return any(name in self.wanted for name in names)

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """Measure a group's linears."""
        import torch

        names = [linear.name for linear in group.linears if linear.name in self.wanted]
        hessian = gram.take_hessian() if gram is not None and names else None
        for name in names:
            weight = self.model.get_parameter(f"{name}.weight").detach()[None].to(torch.float32)
            self._measure(name, weight, hessian, torch.ones(1))

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, gram: Gram | None, shared: Callable[[int], Tensor]
    ) -> None:
        """Measure one projection of some experts, a few at a time; experts count by their tokens."""
        import torch

        from llmcompress.algorithms.gptq import solved_together
        from llmcompress.models.capture import expert_weight

        if name not in self.wanted:
            return
        module, (_, rows, columns) = self.model.get_submodule(bank.module), bank.shape(name)
        hessian = None if gram is None else gram.take_hessian()
        count = experts.stop - experts.start
        share = torch.ones(count) if gram is None else gram.tokens.to(torch.float32)
        for turn in solved_together((count, rows, columns), hessian is not None and hessian.is_cuda):
            own = slice(experts.start + turn.start, experts.start + turn.stop)
            weights = expert_weight(module, bank, name, own)
            self._measure(name, weights, None if hessian is None else hessian[turn], share[turn])

    def measure_without_data(self, block: Block) -> None:
        """Measure a block's weights by their own squared error."""
        for sublayer in block.sublayers:
            for group in sublayer.groups:
                self.linears(group, None)
        bank = block.bank
        for name in (bank.gate_up, bank.down) if bank is not None else ():
            assert bank is not None
            self.experts(bank, name, slice(0, bank.num_experts), None, lambda _: None)  # type: ignore[arg-type,return-value]

    def error(self, names: Sequence[str]) -> list[float]:
        """Relative error of a unit at each candidate width."""
        below = sum(self.below[name] for name in names)
        sums = [sum(values) for values in zip(*(self.above[name] for name in names))]
        return [value / below if below > 0 else 0.0 for value in sums]

    def _measure(self, name: str, weights: Tensor, hessian: Tensor | None, share: Tensor) -> None:
        """Add the errors and the energy of ``weights [E, N, K]`` fp32, matrix by matrix times ``share [E]``."""
        from llmcompress.algorithms.grids import round_to_nearest
        from llmcompress.algorithms.hessian import output_energy
        from llmcompress.quant.codecs.int_group import dequantize

        def size(values: Tensor) -> float:
            rows = values.square().sum(-1) if hessian is None else output_energy(values, hessian)
            return float((rows.sum(-1).cpu() * share).sum())

        above = self.above.setdefault(name, [0.0] * len(self.wanted[name]))
        for position, spec in enumerate(self.wanted[name]):
            above[position] += size(weights - dequantize(*round_to_nearest(weights, spec, "mse"), spec))
        self.below[name] = self.below.get(name, 0.0) + size(weights)


def choose_widths(
    units: Mapping[Rule, Sequence[AutoUnit]], state: RunState, ctx: RunContext, second_order: bool, limits: Limits
) -> dict[str, int]:
    """Measure all units under auto plans and spend each rule's budget.

    Args:
        units: Rules with an auto plan and what they decide about.
        state: The model, and calibration data when ``second_order``.
        ctx: The run.
        second_order: Weigh errors by the inputs the full-precision model sees; otherwise plain weight error.
        limits: Memory that activations and statistics may take, as when the blocks are quantized.

    Returns:
        Plan name → width.
    """
    import torch

    from llmcompress.algorithms.bit_allocation import allocate
    from llmcompress.models.walker import Walker
    from llmcompress.quant.rules import AutoBits

    assert state.model is not None
    handle = state.model
    wanted: dict[str, list[QuantSpec]] = {}
    for rule, own in units.items():
        assert isinstance(rule.bits, AutoBits)
        specs = [rule.spec(bits) for bits in rule.bits.choices]
        wanted.update({name: specs for unit in own for name in unit.names})
    ctx.emit("note", text=f"measuring {len(wanted)} weights at every candidate width")
    model = handle.skeleton(getattr(torch, ctx.dtype), head=False)
    meter = ErrorMeter(model, wanted)
    blocks, last = handle.layout.blocks, max((unit.block for own in units.values() for unit in own), default=-1)
    walker, hidden = None, None
    if second_order:
        assert state.calibration is not None
        folder = ctx.stage_dir / "activations"
        walker = Walker(model, state.calibration.tokens, ctx.device, ctx.seed, limits=limits, folder=folder)
        hidden = walker.embed([block.name for block in blocks])
    handle.free_embeddings(model)
    for block in blocks[: last + 1]:
        handle.load_block(model, block.index, ctx.device)
        if walker is not None and hidden is not None:
            walker.forward(block, hidden, meter, advance=block.index < last)
        else:
            meter.measure_without_data(block)
        handle.free_block(model, block.index)
    chosen: dict[str, int] = {}
    for rule, own in units.items():
        assert isinstance(rule.bits, AutoBits)
        errors = [meter.error(unit.names) for unit in own]
        widths = allocate(errors, [unit.parameters for unit in own], rule.bits.choices, rule.bits.average)
        for unit, bits in zip(own, widths):
            chosen.update(dict.fromkeys(unit.names, bits))
    return chosen
