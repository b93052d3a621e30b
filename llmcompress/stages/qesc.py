"""Stage ``qesc``: quantization with expert-selection calibration (EAC-MoE, arXiv 2508.01625, section 4).

Per block: attention is quantized, the router is calibrated on what the quantized stream now feeds it,
then the experts are quantized with the tokens that the calibrated router sends them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.stages.gptq import GptqConfig
from llmcompress.stages.router_calibration import RouterFields, check_router, router_hook

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState


class QescRouter(RouterFields):
    """Router part of ``qesc``."""

    calibrate: bool = True
    """With false the stage is GPTQ with expert-shift diagnostics."""


class QescConfig(GptqConfig):
    """Recipe section: everything ``gptq`` takes, plus ``router``."""

    type: Literal["qesc"] = "qesc"  # type: ignore[assignment]
    router: QescRouter = QescRouter()
    """How the routers are calibrated."""
    targets: Literal["own", "full_precision"] = "own"
    """What weights are fitted to before they are quantized: ``own`` (GPTQ and the paper) keeps each layer's output on
    the quantized stream; ``full_precision`` aims at the output of the full-precision stream, which undoes part of the
    error that earlier layers passed on. Not in the EAC-MoE paper; see ``algorithms/reference_targets.py``. On the
    reference MoE at 2 bits (71,191 held-out tokens, three seeds, ``scripts/ablate_qesc.py``) router calibration alone
    closes 3 to 12 % of the perplexity gap between GPTQ and the dense model; these targets alone close 25 to 39 %, both
    together 28 to 38 %. So the gain is the targets': the routers then change fewer experts, not the perplexity."""
    target_ridge: Annotated[float, Field(gt=0)] = 0.1
    """Damping of that fit, relative to the mean input energy."""


class Qesc(Stage):
    """Quantize attention, calibrate the router, quantize the experts; block by block."""

    Config: ClassVar[type[StageConfig]] = QescConfig
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION})
    produces = frozenset({Kind.PACKED})

    def check(self, layout: ModelLayout) -> list[str]:
        """Rules that match nothing, a model without experts, or a K that does not fit it."""
        from llmcompress.stages.blockwise import check_rules

        problems = check_rules(self.name, self.config.rules, layout)
        return problems + check_router(f"stages.{self.name}.router", self.config.router, layout)

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One block of weights, its Hessians and two activation streams."""
        from llmcompress.stages.blockwise_estimate import estimate_blockwise

        return estimate_blockwise(self.config, inputs, hessians=True)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Quantize and calibrate the blocks that are not finished yet."""
        from llmcompress.stages.blockwise import run_blockwise

        hook = None
        if self.config.router.calibrate and state.calibration is not None:
            hook = router_hook(self.config.router, state, ctx)
        run_blockwise(self.config, state, ctx, hook)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Re-attach the store of finished blocks."""
        from llmcompress.stages.blockwise import attach_store

        attach_store(state, ctx)
