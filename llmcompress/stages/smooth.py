"""Stage ``smooth``: even out the channels of linears' inputs before they are rounded (SmoothQuant, arXiv 2211.10438).

It measures the largest value of each channel on calibration text and keeps a factor per channel. Stages after it see a
model whose norms and weights are rescaled by them as they are read, and which computes the same.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmcompress.models.smoothable import smoothable
from llmcompress.quant.store import BlockPatch, PackedStore
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, ModelLayout
    from llmcompress.models.smoothable import Smoothable
    from llmcompress.stages.state import RunContext, RunState


class SmoothConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["smooth"] = "smooth"
    alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How much of the inputs' spread goes into the weights; the paper's is 0.5, and more where outliers are large."""


class Smooth(Stage):
    """Measure channels, keep factors, put the rescaled model into the place of ``state.model``."""

    Config: ClassVar[type[StageConfig]] = SmoothConfig
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION})
    produces = frozenset({Kind.MODEL})
    refuses = frozenset({Kind.PACKED})
    config: SmoothConfig

    def check(self, layout: ModelLayout) -> list[str]:
        """Refuse models with nothing to smooth."""
        if any(True for _ in smoothable(layout)):
            return []
        return [f"stages.{self.name}: no input of {layout.model_type} can be rescaled exactly: remove this stage"]

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One block of weights and one stream of activations."""
        from llmcompress.stages.blockwise.estimate import estimate_blockwise

        # inputs are looked at as for statistics, which here take no memory
        return estimate_blockwise(self.config, inputs, hessians=True)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Measure the blocks that are not measured yet.

        Raises:
            RecipeError: There is nothing to smooth, or no calibration data.
            InputError: Activations contain NaN or infinity.
        """
        assert state.model is not None
        self.require_model(state.model.layout)
        assert state.packed is None and state.adapter is None, "the chain refuses this stage behind those"
        state.calibrated(ctx.stage)
        store = self._store(ctx)
        self._measure(state, store, ctx)
        records = [row for _, patch in store.blocks() for row in patch.record["spread"].values()]
        before, after = (sum(row[side] for row in records) / len(records) for side in (0, 1))
        text = f"{len(records)} inputs smoothed: the largest channel over the middle one {before:.1f}, now {after:.1f}"
        ctx.emit("note", text=text)
        self.restore(state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Put the rescaled model into the run state."""
        assert state.model is not None
        factors = {name: tensor for _, patch in self._store(ctx).blocks() for name, tensor in patch.replaced.items()}
        scales: dict[str, list[tuple[int, Tensor]]] = {}
        for _, found in smoothable(state.model.layout):
            factor = factors[found.key]
            for maker in found.makers:
                scales.setdefault(maker, []).append((0, 1 / factor))
            for linear in found.linears:
                scales.setdefault(f"{linear.name}.weight", []).append((1, factor))
        state.model = state.model.rescaled(scales)

    def _store(self, ctx: RunContext) -> PackedStore:
        """Where factors are kept, block by block."""
        return PackedStore(ctx.stage_dir / "factors")

    def _measure(self, state: RunState, store: PackedStore, ctx: RunContext) -> None:
        import torch

        from llmcompress.models.walker import Walker
        from llmcompress.stages.blockwise.engine import plan_inputs
        from llmcompress.stages.blockwise.estimate import limits_for

        assert state.model is not None
        assert state.calibration is not None
        handle: ModelHandle = state.model
        todo = set(range(len(handle.layout.blocks))) - store.finished()
        if not todo:
            return
        places: dict[int, list[Smoothable]] = {}
        for block, found in smoothable(handle.layout):
            places.setdefault(block.index, []).append(found)
        model = handle.skeleton(getattr(torch, ctx.dtype), head=False)
        limits = limits_for(self.config, plan_inputs(state, ctx), hessians=True)
        folder = ctx.stage_dir / "activations"
        walker = Walker(model, state.calibration.tokens, ctx.device, ctx.seed, limits=limits, folder=folder)
        hidden = walker.embed([block.name for block in handle.layout.blocks])
        handle.free_embeddings(model)
        total, last = len(handle.layout.blocks), max(todo)
        for block in handle.layout.blocks[: last + 1]:
            started = time.monotonic()
            handle.load_block(model, block.index, ctx.device)
            if block.index in todo:
                ctx.emit("block_start", index=block.index, total=total)
                factors, record = self._block(walker, block, hidden, places.get(block.index, []), block.index < last)
                seconds = round(time.monotonic() - started, 3)
                store.write_block(block.index, BlockPatch({}, factors, {"spread": record, "seconds": seconds}))
                ctx.emit("block_end", index=block.index, total=total, seconds=seconds)
            else:
                walker.forward(block, hidden)
            handle.free_block(model, block.index)

    def _block(
        self, walker: Any, block: Block, hidden: Tensor, places: list[Smoothable], advance: bool
    ) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
        """Factors of one block, and how far its inputs' channels are spread before and after."""
        from llmcompress.algorithms.smoothing import smoothing_factors, spread
        from llmcompress.models.input_range import InputRange
        from llmcompress.models.visitor import Onlooker

        seen = InputRange([found.key for found in places])
        walker.forward(block, hidden, Onlooker(), advance, seen)
        factors, record = {}, {}
        for found in places:
            weights = [walker.model.get_parameter(f"{linear.name}.weight").detach() for linear in found.linears]
            largest = seen.largest[found.key]
            factor = smoothing_factors(largest, weights, self.config.alpha)
            factors[found.key] = factor.cpu()
            record[found.key] = [round(spread(largest), 3), round(spread(largest / factor), 3)]
        return factors, record
