"""The ``load`` stage: open the model of the recipe and refuse early what cannot be compressed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from llmcompress.errors import InputError, RecipeError
from llmcompress.quant.store import write_durably
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from llmcompress.models.handle import ModelHandle
    from llmcompress.stages.state import RunContext, RunState


class LoadConfig(StageConfig):
    """Recipe section of the load stage. The model itself is named in the recipe's ``model`` section."""

    type: Literal["load"]

    verify: bool = True
    """Check that every expected tensor is in the checkpoint with its shape, and that no file is cut short."""

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
        largest = max((_count(shape) for shape in shapes), default=0)
        return Estimate(ram=largest * inputs.weight_bytes if self.config.check_finite else 0)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Open the model, verify its files, look for values that are not finite.

        Raises:
            InputError: The model is missing, damaged, unsupported, already quantized, or holds NaN.
        """
        handle = self._open(ctx)
        checked = ctx.stage_dir / "checked.json"
        if not checked.exists():
            if self.config.verify:
                handle.checkpoint.verify()
            if self.config.check_finite:
                check_finite(handle)
            write_durably(checked, b"{}")
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
        handle = ModelHandle.open(section["path"], section.get("dtype", "auto"), section.get("tokenizer"))
        refuse_quantized(handle.config, str(section["path"]))
        return handle


def refuse_quantized(config: dict[str, Any], name: str) -> None:
    """Refuse a checkpoint that is quantized already.

    Raises:
        InputError: ``config`` holds a quantization section.
    """
    section = config.get("quantization_config")
    if section:
        method = section.get("quant_method", "unknown") if isinstance(section, dict) else "unknown"
        raise InputError(
            f"{name}: already quantized ({method}); compressing it again would add up the errors",
            "start from the original checkpoint"
            + (" (llmcompress export can write the dense format)" if method == "llmcompress" else ""),
        )


def check_finite(handle: ModelHandle) -> None:
    """Read every tensor of the layout and refuse NaN and infinity.

    Raises:
        InputError: Names the first tensors with values that are not finite.
    """
    import torch

    layout = handle.layout
    names = [name for name, _, _, _ in layout.quantizable()]
    names = [_stored(handle, name) for name in names]
    names += [view.name for block in layout.blocks for view in block.kept] + [view.name for view in layout.outside]
    bad = []
    for name in dict.fromkeys(names):
        # buffers that a family computes are listed as kept but not stored
        if not handle.checkpoint.has(name):
            continue
        tensor = handle.checkpoint.tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            count = int((~torch.isfinite(tensor)).sum())
            bad.append(f"{name}: {count} of {tensor.numel()} values are NaN or infinite")
            if len(bad) == 5:
                break
    if bad:
        raise InputError(
            f"{handle.path}: weights are not finite\n" + "\n".join(bad), "the checkpoint is damaged; fetch it again"
        )


def _stored(handle: ModelHandle, name: str) -> str:
    """Run-time tensor name of a plan name: linears are modules, expert stacks are parameters themselves."""
    return name if handle.checkpoint.has(name) else f"{name}.weight"


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count
