"""The ``calibrate`` stage: tokens that later stages measure activations on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from llmcompress.data.sources import SourceConfig, Template, require_window
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState

TOKENS = "tokens.safetensors"


class CalibrateConfig(StageConfig):
    """Recipe section of the calibrate stage."""

    type: Literal["calibrate"]

    source: SourceConfig
    """Where the text comes from."""

    samples: Annotated[int, Field(ge=1)] = 128
    """Number of windows."""

    length: Annotated[int, Field(ge=2)] = 2048
    """Tokens in a window."""

    template: Template = "auto"
    """``auto`` renders chat rows (``messages``, ShareGPT, ``prompt`` and ``response``, Alpaca) through the tokenizer's
    chat template; ``none`` takes the source's field of every row."""

    allow_fewer: bool = False
    """Go on with the windows there are when the text is too short for ``samples``."""


class CalibrationStage(Stage):
    """Leaves windows of its config's ``length`` in ``tokens.safetensors``; later stages run them block by block."""

    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.CALIBRATION})

    def check(self, layout: ModelLayout) -> list[str]:
        """Windows too long for layers that take over an earlier one's choice of positions."""
        if layout.longest is None or self.config.length <= layout.longest:
            return []
        return [
            f"stages.{self.name}.length: {self.config.length} tokens, but layers are told by earlier ones which "
            f"{layout.longest} positions a token sees, and that is not kept from block to block: "
            f"set it to {layout.longest} or less"
        ]

    def require_source(self, folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> None:
        """Refuse windows longer than the model's context; arguments as the stage interface has them.

        Raises:
            InputError: They are.
        """
        require_window(f"stages.{self.name}.length", self.config.length, config.get("max_position_embeddings"))

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Read the chosen windows back."""
        from llmcompress.data.calibration import CalibrationSet

        state.calibration = CalibrationSet.load(ctx.stage_dir / TOKENS)


class Calibrate(CalibrationStage):
    """Chooses windows of tokens."""

    Config = CalibrateConfig
    config: CalibrateConfig

    def reads_text(self) -> bool:
        """All but random tokens is text."""
        return self.config.source.kind != "synthetic"

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Token windows in memory and on disk."""
        size = self.config.samples * self.config.length * 8
        return Estimate(ram=size, disk=size)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Read the text, tokenize, choose windows and keep them on disk.

        Raises:
            InputError: The text is missing, too short, or does not fit the model.
        """
        from llmcompress.data.calibration import CalibrationSet, build

        path = ctx.stage_dir / TOKENS
        if path.exists():
            state.calibration = CalibrationSet.load(path)
            return
        assert state.model is not None, "the pipeline checks that a load stage comes first"
        config, handle = self.config, state.model
        self.require_source(handle.path, handle.config)
        state.calibration = build(
            config.source,
            None if config.source.kind == "synthetic" else handle.tokenizer(),
            config.samples,
            config.length,
            ctx.seed,
            template=config.template,
            allow_fewer=config.allow_fewer,
            vocabulary=handle.layout.vocab,
        )
        state.calibration.save(path)
        rows, length = state.calibration.tokens.shape
        if rows < config.samples:
            ctx.emit("warning", text=f"only {rows} of {config.samples} calibration windows could be had")
        if config.source.kind == "synthetic":
            ctx.emit("warning", text="calibrated on random tokens: use this for timing, not for a model")
        ctx.emit("note", text=f"{rows} windows of {length} tokens, {state.calibration.hash[:12]}")
