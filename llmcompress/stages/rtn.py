"""Stage ``rtn``: round every weight to the nearest point of its grid. No data needed; the baseline."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from llmcompress.stages.base import Kind, StageConfig
from llmcompress.stages.blockwise.quantizer import Quantizer, QuantizerConfig

if TYPE_CHECKING:
    from llmcompress.stages.blockwise.method import Method


class RtnConfig(QuantizerConfig):
    """Recipe section of the stage."""

    type: Literal["rtn"] = "rtn"
    grid: Literal["minmax", "mse"] = "minmax"
    """How scale and zero point are chosen: from the extremes, or by searching for the least squared error."""
    diagnose_experts: bool = True
    """Measure on MoE models how many tokens change experts (needs a calibrate stage before)."""

    def method(self) -> Method:
        """To the nearest point."""
        from llmcompress.stages.blockwise.method import Nearest

        return Nearest(grid=self.grid)


class Rtn(Quantizer):
    """Quantize block by block, without looking at activations."""

    Config: ClassVar[type[StageConfig]] = RtnConfig
    consumes = frozenset({Kind.MODEL})
