"""What the training stages of S2R have in common: open the model, train once, keep and adopt it, measure."""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from llmcompress.stages.base import Estimate, Kind, Stage
from llmcompress.stages.s2r.config import SamplerConfig, TrainingConfig
from llmcompress.stages.state import Metric

if TYPE_CHECKING:
    from pathlib import Path

    from llmcompress.evaluation.self_correction import Reader
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState
    from llmcompress.training.policy import Policy


def refuse_for_trl(unable: Mapping[str, bool]) -> None:
    """Raise for the settings that trl cannot express.

    Args:
        unable: Setting → whether the recipe asks for it.

    Raises:
        ValueError: It asks for one; pydantic makes an error of the recipe of it.
    """
    refused = [name for name, there in unable.items() if there]
    if refused:
        raise ValueError(f"engine: trl cannot express {'; '.join(refused)}; engine: own can")


def noted(found: Estimate, engine: str, sampler: SamplerConfig) -> Estimate:
    """The estimate with notes on the packages that the recipe asks for: missing ones, and memory that vLLM takes."""
    notes = []
    if engine == "trl" and find_spec("trl") is None:
        notes.append("engine: trl is not installed: pip install 'llmcompress[trl]'")
    if sampler.engine == "vllm":
        notes.append(f"while responses are sampled, vLLM takes {sampler.memory:.0%} of the GPU beside the policy")
        if find_spec("vllm") is None:
            notes.append("sampler.engine: vllm is not installed: pip install 'llmcompress[vllm]'")
    return replace(found, notes=(*found.notes, *notes))


def from_trl(stage: str, module: str, name: str) -> Any:
    """A loop of trl.

    Args:
        stage: Who asks.
        module: In ``llmcompress.training``.
        name: Name of the function in it.

    Raises:
        EnvironmentProblem: trl is not installed.
    """
    from llmcompress.errors import EnvironmentProblem

    try:
        return getattr(import_module(f"llmcompress.training.{module}"), name)
    except ImportError as error:
        raise EnvironmentProblem(
            f"stages.{stage}.engine: trl is not installed ({error})", "pip install 'llmcompress[trl]', or engine: own"
        ) from error


def held_out_metrics(stage: str, curve: Path) -> list[Metric]:
    """Losses of the kept weights on the rows that were set aside, in nats a token; none where nothing was.

    Args:
        stage: Who trained.
        curve: File of its curve. The weights are those of the smallest loss where training may end early, which is when
            it says so of a step.
    """
    if not curve.exists():
        return []
    seen = [record for record in json.loads(curve.read_text()) if "validation" in record]
    if not seen:
        return []
    kept = next((record for record in seen if record.get("kept")), seen[-1])
    return [
        Metric(f"{stage}.held_out", name, None, kept[key], higher_is_better=False)
        for name, key in (("cross_entropy", "validation"), ("verdict_cross_entropy", "validation_verdict"))
    ]


class TrainingStage(Stage):
    """A stage that trains the model, all of it or an adapter; :meth:`learn` says how."""

    distributed = True
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.MODEL, Kind.ADAPTER, Kind.METRICS})
    config: TrainingConfig

    @abstractmethod
    def learn(self, policy: Policy, reader: Reader, ctx: RunContext) -> list[dict[str, Any]]:
        """Train ``policy`` in place, continuing from what the stage's folder holds; return the curve's records."""

    def check(self, layout: ModelLayout) -> list[str]:
        """Adapters that would find no linear."""
        from llmcompress.stages.s2r.config import adapter_names

        adapter = self.config.adapter
        if adapter is None or adapter_names(layout, adapter.targets):
            return []
        return [f"stages.{self.name}.adapter.targets: {layout.model_type} has no {adapter.targets} linears"]

    def reads_text(self) -> bool:
        """Problems and responses are text."""
        return True

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Train unless the trained weights are written already; see :meth:`learn` for what it raises.

        All processes of the run come here together. What is on disk is written by the first one and asked of it, so
        that no process takes another way than the rest.
        """
        from llmcompress.stages.s2r import config as shared

        reader = shared.reader_of(self.config, state, self.config.task.build())
        if not ctx.world.tell(shared.is_done(ctx)):
            policy = shared.open_policy(self.config, state, ctx)
            policy.sampler = shared.open_sampler(self.config, policy, reader, state, ctx)
            try:
                curve = self.learn(policy, reader, ctx)
            finally:
                if policy.sampler is not None:
                    policy.sampler.close()
            if ctx.world.rank == 0:
                (ctx.stage_dir / "curve.json").write_text(json.dumps(curve))
                shared.keep_policy(self.config, policy, state, ctx)
            del policy
            ctx.world.barrier()
        if ctx.world.rank == 0:
            shared.drop_checkpoints(ctx)
        shared.adopt(state, ctx)
        self._after(reader, state, ctx)

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Adopt the trained weights and read the figures back."""
        from llmcompress.stages.s2r import config as shared

        shared.adopt(state, ctx)
        self._after(None, state, ctx)

    def _after(self, reader: Reader | None, state: RunState, ctx: RunContext) -> None:
        """Put the kept model's figures into the run's metrics: measured with ``reader``, without one read back."""
        from llmcompress.stages.s2r import config as shared
        from llmcompress.stages.s2r.evaluate import metrics_of

        found = held_out_metrics(self.name, ctx.stage_dir / "curve.json")
        if self.config.measure is None:
            self._keep_metrics(found, state, ctx)
            return
        path = ctx.stage_dir / "behaviour_after.json"
        if reader is None or ctx.world.tell(path.exists()):
            figures = json.loads(path.read_text())
        else:
            model = shared.open_model(state, ctx)
            figures = shared.measure_behaviour(self.config.measure, model, reader, "after", ctx)
        shared.announce(f"{self.name}.after", figures, ctx)
        before = ctx.stage_dir / "behaviour_before.json"
        metrics = metrics_of(self.name, json.loads(before.read_text()) if before.exists() else None, figures)
        self._keep_metrics(metrics + found, state, ctx)

    def _keep_metrics(self, metrics: list[Metric], state: RunState, ctx: RunContext) -> None:
        from llmcompress.stages.metrics import write_metrics

        if ctx.world.rank == 0 and metrics:
            write_metrics(metrics, ctx.stage_dir)
        state.metrics = state.metrics + metrics
