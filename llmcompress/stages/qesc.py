"""Stage ``qesc``: quantization with expert-selection calibration (EAC-MoE, arXiv 2508.01625, section 4).

Per block: attention is quantized, the router is calibrated on what the quantized stream now feeds it,
then the experts are quantized with the tokens that the calibrated router sends them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmcompress.stages.base import StageConfig
from llmcompress.stages.blockwise.quantizer import Quantizer
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


class Qesc(Quantizer):
    """Quantize attention, calibrate the router, quantize the experts; block by block."""

    Config: ClassVar[type[StageConfig]] = QescConfig

    def check(self, layout: ModelLayout) -> list[str]:
        """Rules that match nothing, a model without experts, or a K that does not fit it."""
        return super().check(layout) + check_router(f"stages.{self.name}.router", self.config.router, layout)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Quantize and calibrate the blocks that are not finished yet."""
        from llmcompress.stages.blockwise.engine import run_blockwise

        hook = None
        if self.config.router.calibrate and state.calibration is not None:
            hook = router_hook(self.config.router, state, ctx)
        run_blockwise(self.config, state, ctx, hook)
