"""Stage ``embeddings``: embedding and output head in 8 or 4 bits, rounded to nearest with a scale per row or group.

At batch 1 a small model is mostly its vocabulary: of mamba2-130m's 129 M parameters 39 M are the embedding, which the
head shares. Rounding needs no data; the codes are made from the checkpoint when the model is exported or assembled.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from llmcompress.errors import RecipeError
from llmcompress.quant.embeddings import EMBEDDINGS
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig

if TYPE_CHECKING:
    from llmcompress.stages.state import RunContext, RunState


class EmbeddingsConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["embeddings"] = "embeddings"
    bits: Literal[4, 8] = 8
    """Width of the codes."""
    group_size: Annotated[int, Field(ge=-1)] = -1
    """Columns that share a scale; -1 for one scale per word. 4 bits want groups of 32."""

    @field_validator("group_size")
    @classmethod
    def _not_zero(cls, value: int) -> int:
        if value == 0:
            raise ValueError("group_size must be positive, or -1 for one scale per word")
        return value


class Embeddings(Stage):
    """Put the policy into ``state.policies``."""

    Config: ClassVar[type[StageConfig]] = EmbeddingsConfig
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.POLICY})
    config: EmbeddingsConfig

    def policy(self) -> dict[str, Any]:
        """The policy as it is saved."""
        return {"bits": self.config.bits, "group_size": self.config.group_size}

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Nothing by itself; exports get smaller."""
        return Estimate(policies={EMBEDDINGS: self.policy()})

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Store the policy.

        Raises:
            RecipeError: The model's embedding or head does more than its name says.
        """
        from llmcompress.models.handle import meta_model
        from llmcompress.nn.embedding import declined

        assert state.model is not None
        reason = declined(meta_model(state.model.hf_config(), state.model.dtype))
        if reason is not None:
            raise RecipeError(f"stages.{ctx.stage}: {reason}", "remove this stage")
        self.restore(state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Put the policy into the run state."""
        state.policies[EMBEDDINGS] = self.policy()
