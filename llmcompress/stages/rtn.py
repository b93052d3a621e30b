"""Stage ``rtn``: round every weight to the nearest point of its grid. No data needed; the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.stages.schemes import RulesField

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState


class RtnConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["rtn"] = "rtn"
    rules: RulesField
    """Which weights are quantized and how; the first matching rule decides."""
    grid: Literal["minmax", "mse"] = "minmax"
    """How scale and zero point are chosen: from the extremes, or by searching for the least squared error."""
    diagnose_experts: bool = True
    """Measure on MoE models how many tokens change experts (needs a calibrate stage before)."""


class Rtn(Stage):
    """Quantize block by block, without looking at activations."""

    Config: ClassVar[type[StageConfig]] = RtnConfig
    distributed = True
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.PACKED})

    def check(self, layout: ModelLayout) -> list[str]:
        """Rules that match nothing."""
        from llmcompress.stages.blockwise import check_rules

        return check_rules(self.name, self.config.rules, layout)

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One block of weights at a time, and activations when experts are diagnosed."""
        from llmcompress.stages.blockwise_estimate import estimate_blockwise

        return estimate_blockwise(self.config, inputs, hessians=False)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Quantize the blocks that are not finished yet."""
        from llmcompress.stages.blockwise import run_blockwise

        run_blockwise(self.config, state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Re-attach the store of finished blocks."""
        from llmcompress.stages.blockwise import attach_store

        attach_store(state, ctx)
