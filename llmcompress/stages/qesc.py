"""Stage ``qesc``: quantization with expert-selection calibration (EAC-MoE, arXiv 2508.01625, section 4)."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from llmcompress.stages.base import Kind, Stage, StageConfig
from llmcompress.stages.gptq import GptqConfig
from llmcompress.stages.router_calibration import RouterFields


class QescRouter(RouterFields):
    """Router part of ``qesc``."""

    calibrate: bool = True
    """With false the stage is GPTQ with expert-shift diagnostics."""


class QescConfig(GptqConfig):
    """Recipe section: everything ``gptq`` takes, plus ``router``."""

    type: Literal["qesc"] = "qesc"  # type: ignore[assignment]
    router: QescRouter = QescRouter()
    """How the routers are calibrated."""


class Qesc(Stage):
    """Per block: quantize attention, calibrate the router, quantize the experts."""

    Config: ClassVar[type[StageConfig]] = QescConfig
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION})
    produces = frozenset({Kind.PACKED})

    def run(self, state: Any, ctx: Any) -> None:
        """Quantize and calibrate block by block."""
        raise NotImplementedError

    def restore(self, state: Any, ctx: Any) -> None:
        """Re-attach the store."""
        raise NotImplementedError
