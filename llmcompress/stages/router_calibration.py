"""Stage ``router_calibration``: repair the routers after any quantizer (EAC-MoE, arXiv 2508.01625, section 4).

Also home of the recipe fields that this stage shares with ``qesc``.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from llmcompress.stages.base import Kind, Stage, StageConfig


class AdamFields(BaseModel):
    """Gradient solver settings; used with ``solver: adam`` only."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    lr_rel: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate as a multiple of the router weight's root mean square."""
    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the calibration tokens; the rate falls to zero along a cosine."""
    tokens_per_batch: Annotated[int, Field(ge=1)] = 4096
    """Tokens of one step."""


class RouterFields(BaseModel):
    """How a router is calibrated. The paper gives the loss and K; solver and guard are this project's."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    loss: Literal["topk_mse"] = "topk_mse"
    """Squared error of the logits of the full-precision router's top K experts (Eq. 5)."""
    k: Literal["auto", "paper"] | Annotated[int, Field(ge=1)] = "auto"
    """Experts per token in the loss: ``auto`` measures it per layer, ``paper`` uses Table 10, or a number."""
    solver: Literal["ridge", "adam"] = "ridge"
    """``ridge`` is the closed form; ``adam`` is gradient descent, probably what the authors ran."""
    ridge: Annotated[float, Field(gt=0)] = 1e-2
    """Pull towards the original weight, relative to the mean eigenvalue of the input covariance."""
    off_topk_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Weight of the experts outside the top K in the loss; 0 is the paper's loss, 1 plain MSE."""
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Share of the calibration sequences kept out of the fit and used by ``guard``."""
    guard: bool = True
    """Keep the new weight only where it lowers the expert change rate of the held-out tokens."""
    adam: AdamFields = AdamFields()
    """Settings of the gradient solver."""


class RouterCalibrationConfig(RouterFields, StageConfig):
    """Recipe section of the stage."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    type: Literal["router_calibration"] = "router_calibration"


class RouterCalibration(Stage):
    """Calibrate the routers of an already quantized model against the full-precision ones."""

    Config: ClassVar[type[StageConfig]] = RouterCalibrationConfig
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION, Kind.PACKED})
    produces = frozenset({Kind.PACKED})

    def run(self, state: Any, ctx: Any) -> None:
        """Calibrate block by block into an overlay store."""
        raise NotImplementedError

    def restore(self, state: Any, ctx: Any) -> None:
        """Re-attach the overlay store."""
        raise NotImplementedError
