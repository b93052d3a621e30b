"""Measured error of every weight at every width, for ``auto`` bit plans. Imported by the engine only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.models.layout import Block, ExpertBank, LinearGroup
    from llmcompress.quant.rules import AutoUnit, Rule
    from llmcompress.quant.spec import QuantSpec
    from llmcompress.stages.state import RunContext, RunState


class ErrorMeter:
    """Visitor that measures and changes nothing: relative output error of rounding to nearest.

    Args:
        model: Skeleton whose block is materialised.
        wanted: Plan name → candidate specs, narrowest first.
    """

    affinity = False

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

        for linear in group.linears:
            if linear.name in self.wanted:
                weight = self.model.get_parameter(f"{linear.name}.weight").detach()[None].to(torch.float32)
                self._measure(linear.name, weight, None if gram is None else gram.hessian(), torch.ones(1))

    def router(self, bank: Any, router: Any, x: Any) -> None:
        """Nothing to do."""

    def routed(self, bank: Any, counts: Any) -> None:
        """Nothing to do."""

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, gram: Gram | None, shared: Callable[[int], Tensor]
    ) -> None:
        """Measure one projection of some experts; experts count by their tokens."""
        import torch

        from llmcompress.models.capture import expert_weight

        if name not in self.wanted:
            return
        weights = expert_weight(self.model.get_submodule(bank.module), bank, name, experts)
        share = torch.ones(weights.shape[0]) if gram is None else gram.tokens.to(torch.float32)
        self._measure(name, weights, None if gram is None else gram.hessian(), share)

    def measure_without_data(self, block: Block) -> None:
        """Measure a block's weights by their own squared error."""
        for sublayer in block.sublayers:
            for group in sublayer.groups:
                self.linears(group, None)
        bank = block.bank
        for name in (bank.gate_up, bank.down) if bank is not None else ():
            assert bank is not None
            for expert in range(bank.num_experts):
                self.experts(bank, name, slice(expert, expert + 1), None, lambda _: None)  # type: ignore[arg-type,return-value]

    def error(self, names: Sequence[str]) -> list[float]:
        """Relative error of a unit at each candidate width."""
        below = sum(self.below[name] for name in names)
        sums = [sum(values) for values in zip(*(self.above[name] for name in names))]
        return [value / below if below > 0 else 0.0 for value in sums]

    def _measure(self, name: str, weights: Tensor, hessian: Tensor | None, share: Tensor) -> None:
        from llmcompress.algorithms.gptq import output_error, round_to_nearest
        from llmcompress.quant.codecs.int_group import dequantize

        above = self.above.setdefault(name, [0.0] * len(self.wanted[name]))
        energy = None
        for position, spec in enumerate(self.wanted[name]):
            codes, scale, zero = round_to_nearest(weights, spec, "mse")
            quantized = dequantize(codes, scale, zero, spec)
            if hessian is None:
                error, energy = (weights - quantized).square().sum(-1), weights.square().sum(-1)
            else:
                error, energy = output_error(weights, quantized, hessian)
            above[position] += float((error.sum(-1).cpu() * share).sum())
        assert energy is not None
        self.below[name] = self.below.get(name, 0.0) + float((energy.sum(-1).cpu() * share).sum())


def choose_widths(
    units: Mapping[Rule, Sequence[AutoUnit]], state: RunState, ctx: RunContext, second_order: bool
) -> dict[str, int]:
    """Measure all units under auto plans and spend each rule's budget.

    Args:
        units: Rules with an auto plan and what they decide about.
        state: The model, and calibration data when ``second_order``.
        ctx: The run.
        second_order: Weigh errors by the inputs the full-precision model sees; otherwise plain weight error.

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
    model = handle.skeleton(getattr(torch, ctx.dtype))
    meter = ErrorMeter(model, wanted)
    walker, hidden = None, None
    if second_order:
        assert state.calibration is not None
        walker = Walker(model, state.calibration.tokens, ctx.device, ctx.seed)
        hidden = walker.embed([block.name for block in handle.layout.blocks])
    for block in handle.layout.blocks:
        handle.load_block(model, block.index, ctx.device)
        if walker is not None and hidden is not None:
            walker.forward(block, hidden, meter, advance=block.index + 1 < len(handle.layout.blocks))
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
