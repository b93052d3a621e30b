"""The ``load`` stage: open the model of the recipe and refuse early what cannot be compressed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal

from llmcompress.errors import RecipeError
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from llmcompress.models.handle import ModelHandle
    from llmcompress.stages.state import RunContext, RunState


class LoadConfig(StageConfig):
    """Recipe section of the load stage. The model itself is named in the recipe's ``model`` section."""

    type: Literal["load"]

    check_finite: bool = True
    """Read every weight once and refuse a model that holds NaN or infinity."""


class Load(Stage):
    """Opens the model."""

    Config = LoadConfig
    produces = frozenset({Kind.MODEL})
    config: LoadConfig

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Weights are read one tensor at a time; the largest one is held."""
        layout = inputs.layout
        shapes = [shape for _, _, shape, _ in layout.quantizable()] + [view.shape for view in layout.outside]
        largest = max((math.prod(shape) for shape in shapes), default=0)
        return Estimate(ram=largest * inputs.weight_bytes if self.config.check_finite else 0)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Open the model, verify its files, look for values that are not finite.

        Raises:
            InputError: The model is missing, damaged, unsupported, already quantized, or holds NaN, or transformers
                cannot build its modules.
        """
        # opening checks the files themselves: names, shapes, sizes, quantized already or not
        handle = self._open(ctx)
        handle.require_modules()
        if self.config.check_finite:
            handle.checkpoint.verify(check_values=True)
        ctx.emit("note", text=f"{handle.layout.model_type}, {handle.parameters:,} parameters, {handle.path}")
        state.model = handle

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Open the model again; what ran before has verified it."""
        state.model = self._open(ctx)

    def _open(self, ctx: RunContext) -> ModelHandle:
        from llmcompress.models.handle import ModelHandle

        section = ctx.recipe.get("model") or {}
        if not section.get("path"):
            raise RecipeError("model.path: missing", "name the model folder under model: path:")
        return ModelHandle.open(section["path"], section.get("dtype", "auto"), section.get("tokenizer"))
