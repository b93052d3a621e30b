"""Stage ``evaluate_family``: every member beside its dense original, beside other methods, and on the others' texts."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from llmcompress.data.sources import require_window
from llmcompress.durable import write_durably
from llmcompress.errors import GateFailed, RecipeError
from llmcompress.evaluation.batching import FAMILY_CUDA_BYTES
from llmcompress.evaluation.config import PerplexityConfig
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.stages.metrics import read_metrics, write_metrics
from llmcompress.stages.state import Metric

if TYPE_CHECKING:
    from collections.abc import Mapping

    from llmcompress.stages.state import RunContext, RunState

Baseline = Literal["gptq-2", "gptq-3", "gptq-4", "bitdelta", "bitdelta-4", "low_rank", "rtvq"]


class EvaluateFamilyConfig(StageConfig):
    """Recipe section of the stage."""

    type: Literal["evaluate_family"] = "evaluate_family"

    texts: dict[str, PerplexityConfig] = Field(default_factory=dict)
    """Held-out text of each member, by the member's name."""

    general: PerplexityConfig | None = None
    """Held-out text of the members that ``texts`` does not name; without it they are not measured."""

    baselines: tuple[Baseline, ...] = ()
    """Other methods to measure in the same way: independent GPTQ at 2, 3 or 4 bits, BitDelta on a 16-bit or 4-bit base,
    low-rank differences on a 16-bit base, and RTVQ's two levels on a 16-bit base."""

    baseline_group_size: Annotated[int, Field(ge=8)] | None = None
    """Columns that share a scale where a baseline uses GPTQ; the family's by default. Trees do well with wide groups,
    GPTQ on its own often with narrower ones."""

    baseline_sweeps: Annotated[int, Field(ge=0, le=64)] = 0
    """Rounds of coordinate descent after a baseline's GPTQ, as the tree's leaves have by default (``rqt.sweeps``); 0 is
    GPTQ as published."""

    divergence: bool = False
    """Measure too how far predictions moved: the mean Kullback-Leibler divergence from the dense member's, in nats a
    token, on its own text, for the tree and for each baseline. Perplexity alone can fall where a difference that was
    learnt too well shrinks. Takes a second model in memory."""

    cross: bool = True
    """Measure every member on every text: is each still the best on its own?"""

    max_rel_increase: Annotated[float, Field(ge=0)] | None = None
    """Gate: mean relative increase of perplexity over the members."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.texts and self.general is None:
            raise ValueError("there is nothing to measure on: give texts, or general")
        return self

    def text_of(self, member: str) -> PerplexityConfig | None:
        """Held-out text of a member, None where it has none."""
        return self.texts.get(member, self.general)


class EvaluateFamily(Stage):
    """Measures a family."""

    Config: ClassVar[type[StageConfig]] = EvaluateFamilyConfig
    consumes = frozenset({Kind.MODEL, Kind.FAMILY})
    produces = frozenset({Kind.METRICS})
    config: EvaluateFamilyConfig

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """One dense member with its weights rebuilt, and the logits of a batch."""
        layout = inputs.layout
        linears = sum(v.out_features * v.in_features for b in layout.blocks for v in b.linears())
        outside = sum(view.shape[0] * view.shape[-1] for view in layout.outside)
        on_gpu = inputs.device == "cuda"
        # in compute type and in fp32
        logits = FAMILY_CUDA_BYTES * (1 + inputs.compute_bytes / 4) if on_gpu else 4 * layout.vocab * 4096
        models = 2 if self.config.divergence else 1
        peak = int(models * ((linears + outside) * inputs.compute_bytes + logits))
        return Estimate(ram=0 if on_gpu else peak, vram=peak if on_gpu else 0)

    def require_members(self, contexts: Mapping[str, object]) -> None:
        """Refuse texts of no member, and windows longer than a member's context; as the stage interface has it."""
        if unknown := sorted(set(self.config.texts) - set(contexts)):
            raise RecipeError(
                f"stages.{self.name}.texts.{unknown[0]}: no such member", f"members: {', '.join(contexts)}"
            )
        for member, context in contexts.items():
            if text := self.config.text_of(member):
                require_window(f"stages.{self.name}: the length of {member}'s text", text.length, context, member)

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Measure whatever is not measured yet.

        Raises:
            GateFailed: The gate did not hold; everything is measured and stored by then.
            InputError, RecipeError: See :meth:`require_members`.
        """
        from llmcompress.evaluation.family import measure_family

        assert state.family is not None, "the pipeline checks that an rqt stage comes first"
        self.require_members(state.family.family.contexts())
        rows = measure_family(self.config, state.family, ctx)
        write_durably(ctx.stage_dir / "family.json", json.dumps(rows, indent=1, sort_keys=True).encode())
        metrics = family_metrics(rows)
        write_metrics(metrics, ctx.stage_dir)
        for metric in metrics:
            ctx.emit(
                "metric", name=metric.name, value=metric.compressed, dense=metric.dense, compressed=metric.compressed
            )
        state.metrics = state.metrics + metrics
        mean = rows["methods"]["rqt"]["mean_relative"]
        limit = self.config.max_rel_increase
        if limit is not None and mean > limit:
            raise GateFailed(
                f"perplexity rises by {mean:.2%} on average, allowed are {limit:.2%}",
                "raise bits.budget; llmcompress report RUN_DIR shows where the error is",
            )

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Read the measured values back."""
        state.metrics = state.metrics + read_metrics(ctx.stage_dir)


def family_metrics(rows: dict[str, Any]) -> list[Metric]:
    """One metric per member, and the mean."""
    found = [
        Metric(name, "perplexity", each["dense"], each["compressed"], each["stderr"], each["tokens"], False)
        for name, each in sorted(rows["members"].items())
    ]
    tree = rows["methods"]["rqt"]
    found.append(Metric("family", "mean_relative_increase", None, tree["mean_relative"]))
    return [*found, Metric("family", "kl", None, tree["kl"])] if "kl" in tree else found
