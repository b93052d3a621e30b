"""What stages that go block by block have in common; ``engine.py`` does their work."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING

from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.stages.blockwise.rules import RulesField

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.blockwise.method import Method
    from llmcompress.stages.state import RunContext, RunState


class BlockStage(Stage):
    """Keeps what it makes of each block in ``ctx.stage_dir / "blocks"``, a store on top of that of the stage before."""

    produces = frozenset({Kind.PACKED})

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Re-attach the store of finished blocks."""
        from llmcompress.stages.blockwise.engine import attach_store

        attach_store(state, ctx)


class QuantizerConfig(StageConfig):
    """Recipe section of a stage that quantizes by rules."""

    rules: RulesField
    """Which weights are quantized and how; the first matching rule decides."""

    @abstractmethod
    def method(self) -> Method:
        """How the weights that the rules choose get their codes."""


class Quantizer(BlockStage):
    """Rounds the weights that its ``rules`` choose, each block with the activations of the quantized ones before it.

    One whose method does not look at activations consumes no ``CALIBRATION``, and is estimated without statistics.
    """

    distributed = True
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION})

    def check(self, layout: ModelLayout) -> list[str]:
        """Rules that match nothing."""
        from llmcompress.stages.blockwise.engine import check_rules

        return check_rules(self.name, self.config.rules, layout)

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One block of weights, its Hessians and the activation streams."""
        from llmcompress.stages.blockwise.estimate import estimate_blockwise

        return estimate_blockwise(self.config, inputs, hessians=Kind.CALIBRATION in self.consumes)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Quantize the blocks that are not finished yet."""
        from llmcompress.stages.blockwise.engine import run_blockwise

        run_blockwise(self.config, state, ctx)
