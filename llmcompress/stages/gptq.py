"""Stage ``gptq``: second-order quantization (Frantar et al., arXiv 2210.17323), batched over experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.section import Section
from llmcompress.stages.base import StageConfig
from llmcompress.stages.blockwise.quantizer import Quantizer, QuantizerConfig

if TYPE_CHECKING:
    from llmcompress.stages.blockwise.method import Method


class RareExperts(Section):
    """What to do with experts that see few calibration tokens. The papers are silent; this is our policy."""

    min_tokens: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Tokens an expert needs for GPTQ on its own statistics; ``auto`` is ``max(128, in_features / 16)``."""
    below: Literal["blend", "rtn"] = "blend"
    """With fewer: mix in the statistics of all tokens of the layer, or round to nearest."""
    zero: Literal["rtn"] = "rtn"
    """With none: round to nearest, with a warning."""
    weighting: Literal["none", "affinity"] = "none"
    """``affinity`` weights each token by its routing weight (MoEQuant)."""


class GptqConfig(QuantizerConfig):
    """Recipe section of the stage."""

    type: Literal["gptq"] = "gptq"
    damp: Annotated[float, Field(gt=0, lt=1)] = 0.01
    """Added to the Hessian's diagonal, relative to its mean; raised automatically where Cholesky fails."""
    act_order: bool | Literal["groups"] = "groups"
    """Quantize columns in the order of falling activation energy: over all columns (needs ``static_groups``), or
    ``groups``: group by group, and inside each group."""
    static_groups: bool = False
    """Fix all scales before the first column is quantized, instead of on reaching the group."""
    block: Annotated[int, Field(ge=8)] = 128
    """Columns between two updates of the remaining weights; affects speed only."""
    grid: Literal["minmax", "mse"] = "mse"
    """How scale and zero point are chosen: from the extremes, or by searching for the least squared error."""
    refit_scales: bool = True
    """Improve the scales by least squares in the layer's output once all codes are chosen."""
    targets: Literal["own", "full_precision", "residual_stream"] = "own"
    """What weights are fitted to before they are quantized: ``own`` (GPTQ and the paper) keeps each layer's output on
    the quantized stream; ``full_precision`` aims at the output of the full-precision stream, which undoes part of the
    error that earlier layers passed on; ``residual_stream`` lets projections that write to the residual stream give
    back the difference that it has there as well. See ``algorithms/reference_targets.py``. Both cost a second pass, a
    block's inputs in memory, and nearly twice the time, but need fewer tokens; figures are in PAPERS.md. On the
    shipped MoE nearly the whole gain of QESC over GPTQ is the targets': calibrated routers change fewer experts, but
    that alone hardly moves the perplexity."""
    target_ridge: Annotated[float, Field(gt=0)] = 0.1
    """Damping of that fit, relative to the mean input energy."""
    rare_experts: RareExperts = RareExperts()
    """Policy for experts with few calibration tokens."""
    diagnose_experts: bool = True
    """Measure on MoE models how many tokens change experts; costs a second, unquantized pass."""

    def method(self) -> Method:
        """By GPTQ, with the settings of this section."""
        from llmcompress.algorithms.gptq import GptqOptions
        from llmcompress.stages.blockwise.method import RarePolicy, SecondOrder

        rare = self.rare_experts
        return SecondOrder(
            rare=RarePolicy(
                min_tokens=None if rare.min_tokens == "auto" else rare.min_tokens,
                blend=rare.below == "blend",
                affinity=rare.weighting == "affinity",
            ),
            target_ridge=None if self.targets == "own" else self.target_ridge,
            residuals=self.targets == "residual_stream",
            grid=self.grid,
            options=GptqOptions(
                self.damp, self.act_order, self.static_groups, self.block, self.grid, self.refit_scales
            ),
        )

    @model_validator(mode="after")
    def _groups_before_order(self) -> Self:
        if self.act_order is True and not self.static_groups:
            raise ValueError("act_order needs static_groups: true, or the value groups")
        return self


class Gptq(Quantizer):
    """Quantize block by block, each with the activations the quantized blocks before it produce."""

    Config: ClassVar[type[StageConfig]] = GptqConfig
