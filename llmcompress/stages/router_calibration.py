"""Stage ``router_calibration``: repair the routers after any quantizer (EAC-MoE, arXiv 2508.01625, section 4).

Also home of the recipe fields that this stage shares with ``qesc``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from llmcompress.section import Section
from llmcompress.stages.base import Estimate, Kind, PlanInputs, StageConfig
from llmcompress.stages.blockwise.quantizer import BlockStage

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from llmcompress.algorithms.router_calibration import RouterUpdate, SolverOptions
    from llmcompress.models.layout import Block, ModelLayout
    from llmcompress.models.router import Router
    from llmcompress.stages.state import RunContext, RunState

# K of the paper's Table 10; Mixtral is not in the table, its 8 experts are all in the loss
PAPER_K = {"phimoe": 8, "deepseek_v2": 20, "qwen2_moe": 20, "mixtral": 8}


class AdamFields(Section):
    """Gradient solver settings; used with ``solver: adam`` only."""

    lr_rel: Annotated[float, Field(gt=0)] = 0.02
    """Learning rate as a multiple of the router weight's root mean square."""
    epochs: Annotated[int, Field(ge=1)] = 10
    """Passes over the calibration tokens; the rate falls to zero along a cosine."""
    tokens_per_batch: Annotated[int, Field(ge=1)] = 4096
    """Tokens of one step."""


class RouterFields(Section):
    """How a router is calibrated. The paper gives the loss and K; solver and guard are this project's."""

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

    type: Literal["router_calibration"] = "router_calibration"


class RouterCalibration(BlockStage):
    """Calibrate the routers of an already quantized model against the full-precision ones.

    Works after any quantizing stage: blocks run with the packed weights, and only routers are written,
    into a store on top of the one before.
    """

    Config: ClassVar[type[StageConfig]] = RouterCalibrationConfig
    consumes = frozenset({Kind.MODEL, Kind.CALIBRATION, Kind.PACKED})

    def check(self, layout: ModelLayout) -> list[str]:
        """A model without experts, or a K that does not fit it."""
        return check_router(f"stages.{self.name}", self.config, layout)

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One block of weights and two activation streams; routers only as output."""
        from llmcompress.stages.blockwise.estimate import estimate_blockwise

        return estimate_blockwise(self.config, inputs, hessians=False)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Calibrate block by block into an overlay store."""
        from llmcompress.quant.store import PackedStore
        from llmcompress.stages.blockwise.engine import BlockwiseQuantizer, plan_inputs
        from llmcompress.stages.blockwise.estimate import limits_for
        from llmcompress.stages.blockwise.method import Nearest

        assert state.model is not None
        calibration = state.calibrated(ctx.stage)
        store = PackedStore(ctx.stage_dir / "blocks", state.packed)
        hook = router_hook(self.config, state, ctx)
        limits = limits_for(self.config, plan_inputs(state, ctx), hessians=False)
        BlockwiseQuantizer(
            state.model, {}, Nearest(), store, ctx, calibration=calibration, hook=hook, limits=limits
        ).run()
        state.packed = store


def check_router(place: str, fields: RouterFields, layout: ModelLayout) -> list[str]:
    """Problems of router fields on a model, as messages with their place in the recipe."""
    banks = [block.bank for block in layout.blocks if block.bank is not None]
    if not banks:
        return [f"{place}: {layout.model_type} has no experts, so there is no router to calibrate"]
    bank = banks[0]
    if fields.k == "paper" and layout.model_type not in PAPER_K:
        known = ", ".join(sorted(PAPER_K))
        return [f"{place}.k: the paper gives no K for {layout.model_type} (only for {known}): use auto or a number"]
    k = PAPER_K[layout.model_type] if fields.k == "paper" else fields.k
    if k != "auto" and not bank.top_k <= k <= bank.num_experts:
        return [f"{place}.k: must lie between {bank.top_k} and {bank.num_experts} for this model, not {k}"]
    return []


def router_hook(fields: RouterFields, state: RunState, ctx: RunContext) -> RouterCalibrator:
    """The hook that calibrates routers as the recipe says.

    Args:
        fields: The recipe section.
        state: Needs a model and a calibration set.
        ctx: The run; its seed is used by the gradient solver.
    """
    from llmcompress.algorithms.router_calibration import SolverOptions

    assert state.model is not None
    assert state.calibration is not None
    options = SolverOptions(
        k=PAPER_K[state.model.layout.model_type] if fields.k == "paper" else None if fields.k == "auto" else fields.k,
        solver=fields.solver,
        ridge=fields.ridge,
        off_topk_weight=fields.off_topk_weight,
        guard=fields.guard,
        lr_rel=fields.adam.lr_rel,
        epochs=fields.adam.epochs,
        tokens_per_batch=fields.adam.tokens_per_batch,
        seed=ctx.seed,
    )
    samples, length = state.calibration.tokens.shape
    return RouterCalibrator(options, samples, length, fields.holdout, state.model.checkpoint.dtype_of)


class RouterCalibrator:
    """Router hook: remembers the full-precision logits, then fits the router to them on the quantized stream.

    Args:
        options: Solver settings.
        samples, length: Shape of the calibration set, to hold out whole sequences.
        holdout: Share of sequences kept out of the fit.
        dtype_of: Type in which a parameter is stored, by its name; fits are judged after rounding to it.
    """

    def __init__(
        self, options: SolverOptions, samples: int, length: int, holdout: float, dtype_of: Callable[[str], torch.dtype]
    ) -> None:
        self.options, self.dtype_of, self.length = options, dtype_of, length
        # evenly spread, so that every part of the text is held out in the same share
        self.held = [int((i + 1) * holdout) > int(i * holdout) for i in range(samples)]
        self._targets: dict[int, Tensor] = {}

    def observe(self, block: Block, router: Router, x: Tensor) -> None:
        """Keep the original router's logits on the full-precision stream's ``x [T, H]``."""
        self._targets[block.index] = router(x)[0].float()

    def calibrate(self, block: Block, router: Router, x_hat: Tensor) -> RouterUpdate:
        """Fit the router to those logits on the quantized stream's ``x_hat [T, H]``."""
        import torch

        from llmcompress.algorithms.router_calibration import RouterUpdate, calibrate_router

        assert block.bank is not None
        stored = {name: value.detach().to(self.dtype_of(name)) for name, value in router.parameters().items()}
        names = [*stored]
        weight, bias = stored[names[0]], stored[names[1]] if len(names) > 1 else None
        held = torch.tensor(self.held, device=x_hat.device).repeat_interleave(self.length)
        rule = router.rule(block.bank.top_k)
        read = router.entered(x_hat)
        fit = calibrate_router(self._targets.pop(block.index), read, weight, bias, rule, self.options, held)
        replaced = {}
        if fit.kept:
            replaced = {name: value for name, value in zip(names, (fit.weight, fit.bias)) if value is not None}
        return RouterUpdate(replaced, fit.record)
