"""Stage ``esr``: ESR-style reconstruction of state-space blocks to the states they will really have (Q-Mamba).

The paper's own procedure was not to be had; this one is the project's (``algorithms/state_reconstruction.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmcompress.errors import RecipeError
from llmcompress.section import Section
from llmcompress.stages.base import Estimate, Kind, PlanInputs, StageConfig
from llmcompress.stages.blockwise.quantizer import BlockStage

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState

Trained = Literal["selective", "projections"]


class LearningRates(Section):
    """Learning rates of AdamW at the start; each falls to a tenth along a cosine."""

    selective: Annotated[float, Field(gt=0)] = 1e-3
    """Decay, skip, convolution and gated norm."""
    dt_bias: Annotated[float, Field(gt=0)] = 1e-3
    """Bias of the time steps."""
    projections: Annotated[float, Field(gt=0)] = 1e-4
    """in_proj and out_proj."""


class EsrConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["esr"] = "esr"
    engine: Literal["auto", "inject", "fused"] = "auto"
    """How the quantized recurrence is simulated: step by step with a hand-written adjoint (``fused``), or as a parallel
    scan over injected errors (``inject``). Both give the same values and gradients; ``auto`` is ``fused``."""
    train: list[Trained] = Field(default=["selective", "projections"], min_length=1)
    """What is tuned; projections only where they are not quantized."""
    target: Literal["fp_trajectory", "fp_block"] = "fp_trajectory"
    """Match the full-precision model's hidden states, or what the full-precision block makes of the quantized input."""
    epochs: Annotated[int, Field(ge=1)] = 6
    """Passes over the calibration sequences."""
    batch_size: Annotated[int, Field(ge=1)] = 4
    """Sequences of one step."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.125
    """Share of the calibration sequences on which a block is judged."""
    lr: LearningRates = LearningRates()
    """Learning rates."""
    bound: Annotated[float, Field(gt=0)] = 0.1
    """Largest change of a selective parameter, relative to its value or absolute, whichever allows more."""
    lambda_ssm: Annotated[float, Field(ge=0)] = 0.1
    """Weight of the scan's error beside the block's."""
    token_warmup: Annotated[int, Field(ge=0)] = 32
    """Tokens at the start of a sequence that count a quarter: errors need time to build up."""
    patience: Annotated[int, Field(ge=1)] = 2
    """Stop after this many epochs without a better held-out loss."""
    rollback: bool = True
    """Keep a block as it was where its held-out loss did not fall."""
    memory_mb: Annotated[int, Field(ge=1)] = 1024
    """Memory for the states of a block of heads; fewer heads at a time need less."""


class Esr(BlockStage):
    """Tune block after block against the full-precision model, with states stored as the ``dsq`` stage says."""

    Config: ClassVar[type[StageConfig]] = EsrConfig
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION, Kind.POLICY})

    def check(self, layout: ModelLayout) -> list[str]:
        """A model without Mamba-2 layers."""
        if any(block.scan is not None and block.scan.kind == "mamba2" for block in layout.blocks):
            return []
        return [f"stages.{self.name}: {layout.model_type} has no Mamba-2 layers to reconstruct: remove this stage"]

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Two streams, the targets of a block, one block in fp32 and what training it holds."""
        from llmcompress.stages.blockwise.reconstruction import estimate_reconstruction

        return estimate_reconstruction(self.config, inputs)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Reconstruct the blocks that are not finished yet."""
        from llmcompress.quant.store import PackedStore
        from llmcompress.stages.blockwise.reconstruction import Reconstructor

        assert state.model is not None
        calibration = state.calibrated(ctx.stage)
        if calibration.tokens.shape[0] < 2:
            raise RecipeError(f"stages.{ctx.stage}: needs two or more calibration samples: one is held out")
        policy = state.policies.get("state_cache")
        if policy is None:
            raise RecipeError(f"stages.{ctx.stage}: no stage before it quantizes states", "put a dsq stage before it")
        store = PackedStore(ctx.stage_dir / "blocks", state.packed)
        Reconstructor(self.config, state.model, calibration, policy, store, ctx).run()
        state.packed = store
