"""Stage ``s2r_evaluate``: how a model solves, verifies and corrects, dense beside compressed, with controls at equal
tokens.
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.stages.metrics import write_metrics
from llmcompress.stages.s2r.config import MeasureConfig, S2RConfig, SamplingConfig
from llmcompress.stages.state import Metric

if TYPE_CHECKING:
    from llmcompress.stages.state import RunContext, RunState

# figure → (how many it rests on, whether more is better)
FIGURES: dict[str, tuple[str, bool | None]] = {
    "accuracy": ("n_problems", True),
    "first_accuracy": ("n_problems", True),
    "verification_accuracy": ("n_verifications", True),
    "error_recall": ("n_wrong_attempts", True),
    "correct_precision": ("n_accepted", True),
    "incorrect_to_correct": ("n_first_wrong", True),
    "correct_to_incorrect": ("n_first_right", False),
    "trials": ("n_problems", None),
    "tokens": ("n_problems", None),
    "ended": ("n_problems", True),
    "well_formed": ("n_problems", True),
    "repeated_retries": ("n_retries", False),
}


class S2REvaluateConfig(S2RConfig):
    """Recipe section of the stage."""

    type: Literal["s2r_evaluate"]

    measure: MeasureConfig = MeasureConfig()
    """Held-out problems."""

    dense: bool = True
    """Measure the model without compression and adapters too."""

    majority: bool = False
    """Control: sample first attempts of the same model until they have cost as many tokens, and vote; also the share
    that any of them solves."""

    sampling: SamplingConfig = SamplingConfig()
    """How the control samples."""

    @model_validator(mode="after")
    def _sampled(self) -> Self:
        if self.majority and self.sampling.temperature == 0:
            raise ValueError("sampling.temperature: 0 gives equal samples, whose vote is that of one")
        return self


class S2REvaluate(Stage):
    """Measures behaviour."""

    Config: ClassVar[type[StageConfig]] = S2REvaluateConfig
    distributed = True
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.METRICS})
    config: S2REvaluateConfig

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """The model and its cache."""
        total = sum(math.prod(view.shape) for view in inputs.layout.tensors())
        cache = self.config.measure.batch * self.config.measure.max_new_tokens * inputs.layout.hidden * 2
        peak = (total + cache * len(inputs.layout.blocks)) * inputs.compute_bytes
        return Estimate(ram=0 if inputs.device == "cuda" else peak, vram=peak if inputs.device == "cuda" else 0)

    def reads_text(self) -> bool:
        """Problems and responses are text."""
        return True

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Measure what is not measured yet; all processes of the run share the work."""
        from llmcompress.durable import write_durably
        from llmcompress.evaluation.self_correction import majority
        from llmcompress.stages.s2r import config as shared

        assert state.model is not None
        reader = shared.reader_of(self.config, state, self.config.task.build())
        compressed = state.changed
        if self.config.dense or not compressed:
            model: Any = None
            if not ctx.world.tell((ctx.stage_dir / "behaviour_dense.json").exists()):
                import torch

                model = state.model.dense_model(getattr(torch, ctx.dtype))
                model = model.to(ctx.device)
            shared.announce("dense", shared.measure_behaviour(self.config.measure, model, reader, "dense", ctx), ctx)
        if compressed:
            model = shared.open_model(state, ctx)
            figures = shared.measure_behaviour(self.config.measure, model, reader, "compressed", ctx)
            shared.announce("compressed", figures, ctx)
        path = ctx.stage_dir / "majority.json"
        if self.config.majority and not ctx.world.tell(path.exists()):
            model = shared.open_model(state, ctx)
            name = "compressed" if compressed else "dense"
            budget = shared.measure_behaviour(self.config.measure, model, reader, name, ctx)["tokens"]
            problems = shared.held_out(self.config.measure, reader.problems)
            sampling = self.config.sampling.settings()
            found = majority(model, reader, problems, sampling, float(budget or 0), ctx.seed, ctx.world)
            if ctx.world.rank == 0:
                write_durably(path, json.dumps(found, indent=1).encode())
        ctx.world.barrier()
        self.restore(state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Read the measured values back."""
        sides: dict[str, Any] = {}
        for side in ("dense", "compressed"):
            path = ctx.stage_dir / f"behaviour_{side}.json"
            sides[side] = json.loads(path.read_text()) if path.exists() else None
        found = metrics_of(self.name, sides["dense"], sides["compressed"])
        path = ctx.stage_dir / "majority.json"
        if path.exists():
            control = json.loads(path.read_text())
            n = (sides["compressed"] or sides["dense"])["n_problems"]
            own = "compressed" if sides["compressed"] else "dense"
            for key in ("accuracy", "best_of", "samples", "tokens"):
                value = {"dense": None, "compressed": None, own: control[key]}
                found.append(Metric(f"{self.name}.majority", key, **value, n=n, higher_is_better=None))
        if ctx.world.rank == 0:
            write_metrics(found, ctx.stage_dir)
        state.metrics = state.metrics + found


def metrics_of(task: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[Metric]:
    """Figures as metrics; the columns are dense and compressed, or before and after training.

    Standard errors are those of a share of independent problems.
    """
    found = []
    for name, (count, better) in FIGURES.items():
        old = before.get(name) if before else None
        new = after.get(name) if after else None
        if old is None and new is None:
            continue
        n = int((after or before or {}).get(count) or 0)
        share = new is not None and n > 0 and name not in ("trials", "tokens")
        error = math.sqrt(new * (1 - new) / n) if share and new is not None else None
        found.append(Metric(task, name, old, new, error, n, better))
    return found
