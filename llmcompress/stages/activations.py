"""Stage ``activations``: round the inputs of linears to 8 bits per token while the model runs (the A of WxAyHz)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from llmcompress.models.layout import Role
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState

_ROLES = Literal["attention", "mlp", "shared_experts", "ssm"]


class ActivationsConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["activations"] = "activations"
    bits: Literal[8] = 8
    """Width of the codes; scales are taken from each token as it comes (dynamic), so nothing is calibrated."""
    granularity: Literal["token", "chunk"] = "token"
    """What shares a scale: a whole token, which compressed-tensors holds too, or 64 of its columns (a finer grid, and
    what the CPU kernels compute in)."""
    roles: Annotated[tuple[_ROLES, ...], Field(min_length=1)] = ("attention", "mlp", "shared_experts", "ssm")
    """Linears whose inputs are rounded. Routed experts keep float inputs: they are gathered inside fused functions."""


class Activations(Stage):
    """Put the policy into ``state.policies``."""

    Config: ClassVar[type[StageConfig]] = ActivationsConfig
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.POLICY})
    config: ActivationsConfig

    def check(self, layout: ModelLayout) -> list[str]:
        """Refuse roles that match nothing."""
        if self._roles(layout):
            return []
        present = sorted({role.value for _, role, _, _ in layout.quantizable()})
        return [f"stages.{self.name}.roles: none of them is in this model; roles here: {', '.join(present)}"]

    def _roles(self, layout: ModelLayout) -> list[str]:
        present = {role for _, role, _, _ in layout.quantizable()}
        return [role for role in self.config.roles if Role(role) in present]

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Nothing but the policy, for exports that carry it."""
        return Estimate(policies={"activations": self.policy(inputs.layout)})

    def policy(self, layout: ModelLayout) -> dict[str, Any]:
        """What artifacts hold."""
        policy: dict[str, Any] = {"bits": self.config.bits, "roles": self._roles(layout)}
        if self.config.granularity != "token":
            policy["granularity"] = self.config.granularity
        return policy

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Store the policy; nothing is measured or calibrated."""
        self.restore(state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Put the policy into the run state."""
        assert state.model is not None
        state.policies["activations"] = self.policy(state.model.layout)
