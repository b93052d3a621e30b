"""Stage ``pesf``: prune experts by selection frequency while a prompt is read (EAC-MoE, section 5).

The stage decides nothing about the weights: it writes a policy that is saved with the model and
acts in every prefill of the loaded model (``nn/skipping.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from llmcompress.stages.base import Kind, Stage, StageConfig

if TYPE_CHECKING:
    from llmcompress.models.layout import ExpertBank, ModelLayout
    from llmcompress.stages.state import RunContext, RunState

# the paper's Mixtral rule (appendix A.12): with few experts per selected one, frequencies are
# nearly uniform and accuracy falls as soon as alpha exceeds 0.3
FRAGILE_RATIO = 4
SAFE_ALPHA = 0.3
REFUSED_ALPHA = 0.7


def _word(value: Any) -> Any:
    """Undo YAML 1.1, which reads the words off, no and yes as booleans."""
    return value if not isinstance(value, bool) else "yes" if value else "no"


def _off(value: Any) -> Any:
    return "off" if value is False else value


class PesfConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["pesf"] = "pesf"
    method: Literal["pesf", "top_k_minus_one"] = "pesf"
    """``top_k_minus_one`` is the fixed baseline to compare with: every token loses its weakest expert."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.3
    """An expert is skipped when selected fewer than ``alpha`` times its fair share (Eq. 6)."""
    scope: Literal["sequence", "batch"] = "sequence"
    """Count per sequence (the paper) or over the whole batch (then whole experts drop out of a launch)."""
    fallback: Literal["none", "reroute"] = "none"
    """``reroute`` gives a dropped slot to the best expert that stays; ``none`` leaves it empty."""
    keep_top1: bool = False
    """A token that would lose all its experts keeps its strongest."""
    renormalize: Annotated[Literal["auto", "yes", "no"], BeforeValidator(_word)] = "auto"
    """Divide the remaining weights by their sum; ``auto`` does what the model does with its top k."""
    decode: Annotated[Literal["off", "sticky"], BeforeValidator(_off)] = "off"
    """``sticky`` reuses the last prefill's decision for the tokens generated after it."""
    min_len: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Shorter prompts are left alone; ``auto`` is the length below which Eq. 6 cannot skip anything."""
    force: bool = False
    """Accept an alpha that the paper found harmful for this model."""


class Pesf(Stage):
    """Check the policy against the model and put it into ``state.policies``."""

    Config: ClassVar[type[StageConfig]] = PesfConfig
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.POLICY})

    def check(self, layout: ModelLayout) -> list[str]:
        """Refuse models without experts, and an alpha known to ruin models with few experts."""
        banks = _banks(layout)
        if banks and self.config.method == "top_k_minus_one" and any(bank.top_k < 2 for bank in banks):
            return [f"stages.{self.name}.method: {layout.model_type} selects one expert per token: none to spare"]
        if not banks:
            return [f"stages.{self.name}: {layout.model_type} has no experts to skip: remove this stage"]
        alpha = self.config.alpha
        fragile = [bank for bank in banks if bank.num_experts / bank.top_k <= FRAGILE_RATIO]
        if fragile and self.config.method == "pesf" and alpha >= REFUSED_ALPHA and not self.config.force:
            bank = fragile[0]
            return [
                f"stages.{self.name}.alpha: {alpha} ruins a model that selects {bank.top_k} of {bank.num_experts} "
                f"experts (the paper measures -14 points on Mixtral): use {SAFE_ALPHA}, or set force: true"
            ]
        return []

    def warnings(self, layout: ModelLayout) -> list[str]:
        """Settings that are allowed but likely to hurt."""
        fragile = any(bank.num_experts / bank.top_k <= FRAGILE_RATIO for bank in _banks(layout))
        if fragile and self.config.method == "pesf" and self.config.alpha > SAFE_ALPHA:
            return [f"alpha {self.config.alpha} is above {SAFE_ALPHA}: models with few experts lose accuracy there"]
        return []

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Store the policy; nothing is measured or calibrated."""
        assert state.model is not None
        self.require_model(state.model.layout)
        for text in self.warnings(state.model.layout):
            ctx.emit("warning", text=text)
        self.restore(state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Put the policy into the run state."""
        state.policies["pesf"] = self.policy()

    def policy(self) -> dict[str, Any]:
        """The policy as plain data, as saved in ``quantization_config``."""
        return self.config.model_dump(exclude={"type", "force"})


def _banks(layout: ModelLayout) -> list[ExpertBank]:
    return [block.bank for block in layout.blocks if block.bank is not None]
