"""The ``evaluate`` stage: dense twin, compressed model and the difference, with gates."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from llmcompress.durable import write_durably
from llmcompress.errors import GateFailed, RecipeError
from llmcompress.evaluation.config import (
    FidelityConfig,
    GenerationConfig,
    Overlap,
    PerplexityConfig,
    RecallConfig,
    TaskConfig,
    require_chat_template,
    require_windows,
)
from llmcompress.evaluation.gates import GateConfig, failed, judge, unknown_metrics
from llmcompress.evaluation.task_facts import require_rooms, unknown_figures
from llmcompress.evaluation.working_set import (
    ACTIVATION_SHARE,
    peak_bytes,
    streamed_bytes,
    streamed_sides,
    streamed_tokens,
)
from llmcompress.models.paths import resolve_path
from llmcompress.models.tokenizer_files import chat_template
from llmcompress.quant.store import PackedStore
from llmcompress.stages.base import Estimate, Kind, PlanInputs, Stage, StageConfig
from llmcompress.stages.metrics import read_metrics

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

    from llmcompress.evaluation.ledger import Ledger
    from llmcompress.evaluation.measure import Side
    from llmcompress.models.layout import ModelLayout
    from llmcompress.models.streamed import StreamedModel
    from llmcompress.stages.state import RunContext, RunState

_FIDELITY = ("fidelity.kl", "fidelity.kl_p99", "fidelity.top1", "fidelity.logit_error")
_EXPERTS = ("experts.overlap", "experts.cr_any")
_TEXT = ("perplexity", "bits_per_byte", "perplexity_without_policies")


class EvaluateConfig(StageConfig):
    """Recipe section of the evaluate stage."""

    type: Literal["evaluate"]

    perplexity: dict[str, PerplexityConfig] = Field(default_factory=dict)
    """Texts by name; the metric is ``<name>.perplexity``."""

    fidelity: FidelityConfig | None = None
    """Compare output distributions token by token; metrics ``fidelity.kl`` and others."""

    tasks: tuple[str | TaskConfig, ...] = ()
    """lm-evaluation-harness tasks, by name or with settings. Of several, ``tasks.mean_acc`` is the mean accuracy: of
    ``acc_norm`` where lm-eval gives one, of ``acc`` otherwise."""

    tasks_dir: str | None = None
    """Folder with local task data, laid out as ``<task>/<split>.jsonl.gz``; without it tasks come from the hub."""

    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first rows of each task."""

    log_samples: bool = False
    """Keep every request of the tasks and what the models made of it: ``requests/<side>.<task>.jsonl`` in the stage's
    folder, in the form of lm-eval's option of this name."""

    recall: RecallConfig | None = None
    """Facts to be remembered over growing distances; metrics ``recall.at_<distance>``."""

    generation: GenerationConfig | None = None
    """Text written by both models."""

    expert_shift: bool = False
    """Measure how the experts chosen differ from the dense model's, and what that costs (forced routing)."""

    policies: Literal["compare", "active"] = "compare"
    """With run-time policies (expert skipping, low-bit states and activations): ``compare`` also measures perplexity
    and time without them."""

    dense: bool = True
    """Evaluate the dense twin too. Fidelity and relative gates need it."""

    overlap: Overlap = "refuse"
    """What to do when a held-out text holds calibration text."""

    batch: Annotated[int, Field(ge=1)] | Literal["auto"] = "auto"
    """Windows in a batch; ``auto`` bounds the logits held at once."""

    state_mode: Literal["per_token", "decode_only"] = "per_token"
    """In tasks on models with low-bit states: ``per_token`` rounds the state after every token; ``decode_only``
    keeps it in float until the end of a request's context, as a server that prefills in float does."""

    offline: bool = False
    """Never ask the network for task data."""

    gates: dict[str, GateConfig] = Field(default_factory=dict)
    """Limits on metrics by gate name; a failed gate ends the run with exit code 6 after report and export."""

    def task_names(self) -> list[str]:
        """What the recipe calls its tasks."""
        return [task if isinstance(task, str) else task.task for task in self.tasks]

    @model_validator(mode="after")
    def _consistent(self) -> EvaluateConfig:
        names = self.task_names()
        repeated = sorted({name for name in names if names.count(name) > 1} | (set(names) & set(self.perplexity)))
        if repeated:
            raise ValueError(f"names used twice among tasks and perplexity: {', '.join(repeated)}")
        if self.log_samples and not self.tasks:
            raise ValueError("log_samples keeps the requests of tasks, and there are none")
        if not self.dense and (self.fidelity is not None or self.expert_shift):
            raise ValueError("fidelity and expert_shift compare with the dense model: dense must be true")
        if self.expert_shift and not self.perplexity and self.fidelity is None:
            raise ValueError("expert_shift needs text: give fidelity or perplexity")
        relative = [n for n, g in self.gates.items() if g.max_rel_increase is not None or g.max_abs_drop is not None]
        if not self.dense and relative:
            raise ValueError(f"gates {', '.join(relative)} compare with the dense model: dense must be true")
        return self


class Evaluate(Stage):
    """Measures the compressed model beside the dense one."""

    Config = EvaluateConfig
    consumes = frozenset({Kind.MODEL})
    produces = frozenset({Kind.METRICS})
    judging = frozenset({"gates"})
    config: EvaluateConfig

    def measured(self) -> tuple[list[str], list[str]]:
        """Names of the metrics that it will give, and tasks below which lm-eval names more."""
        config = self.config
        exact = [f"{name}.{metric}" for name in config.perplexity for metric in _TEXT]
        exact += [f"recall.at_{distance}" for distance in config.recall.distances] if config.recall is not None else []
        exact += _FIDELITY if config.fidelity is not None else ()
        exact += _EXPERTS if config.expert_shift else ()
        exact += ["tasks.mean_acc"] if len(config.tasks) > 1 else []
        return exact, config.task_names()

    def check(self, layout: ModelLayout) -> list[str]:
        """Gates that name nothing measured, and expert figures asked of a model without experts."""
        config = self.config
        problems = unknown_metrics(config.gates, *self.measured()) or unknown_figures(config.gates, config.tasks)
        if config.expert_shift and not any(block.bank for block in layout.blocks):
            problems.append(f"expert_shift: {layout.model_type} has no experts")
        return [f"stages.{self.name}.{problem}" for problem in problems]

    def reads_text(self) -> bool:
        """Whatever is measured is measured on text."""
        asked = self.config
        return bool(asked.perplexity or asked.fidelity or asked.tasks or asked.recall or asked.generation)

    def lacks(self) -> list[str]:
        """Tasks whose data is nowhere.

        Raises:
            InputError: A local data file is missing, or a task runs code without leave.
            RecipeError: A task has no such subject.
        """
        if not self.config.tasks:
            return []
        from llmcompress.evaluation.task_specs import require_code, specify, unreachable

        folder = resolve_path(self.config.tasks_dir) if self.config.tasks_dir else None
        tasks = specify(self.config.tasks, folder, self.config.limit)
        require_code(tasks)
        found = unreachable(tasks, self.config.offline)
        return [f"stages.{self.name}: {line}" for line in found]

    def require_source(self, folder: Path, config: Mapping[str, Any], tokenizer: Path | None = None) -> None:
        """Refuse what would end the run after everything was quantized: windows longer than the model's context, chats
        where the tokenizer has no template.

        Args:
            folder: The source model.
            config: Its ``config.json``.
            tokenizer: Folder of the tokenizer, if it is another one.

        Raises:
            InputError: Windows are too long, a task or the prompts are to be asked through a chat template that is not
                there, or a task's answers leave no room for its questions.
        """
        mine, context = self.config, config.get("max_position_embeddings")
        require_windows(mine.perplexity, mine.fidelity, mine.recall, mine.tasks, context)
        require_rooms(mine.tasks, context)
        require_chat_template(self.config.tasks, self.config.generation, chat_template(tokenizer or folder))

    def estimate(self, inputs: PlanInputs) -> Estimate:
        """Both models together where they are compared token by token, otherwise the larger one; plus logits."""
        config = self.config
        dense, compressed = _model_bytes(inputs)
        pair = bool(inputs.specs) and (config.fidelity is not None or config.expert_shift)
        weights = dense + compressed if pair else max(dense if config.dense else 0, compressed)
        peak = weights + peak_bytes(config, inputs.layout, inputs.compute_bytes)
        on_gpu = inputs.device == "cuda"
        if inputs.ram is None or on_gpu:
            return Estimate(ram=dense if on_gpu else peak, vram=peak if on_gpu else 0)
        return self._within(inputs, dense, compressed, peak)

    def _within(self, inputs: PlanInputs, dense: int, compressed: int, peak: int) -> Estimate:
        """The estimate under a budget of main memory: models that exceed it go block by block."""
        assert inputs.ram is not None
        work = peak_bytes(self.config, inputs.layout, inputs.compute_bytes)
        sides = streamed_sides(self.config, inputs.layout, {"dense": dense, "compressed": compressed}, work, inputs.ram)
        if not sides:
            return Estimate(ram=peak)
        resident = [compressed] if inputs.specs and "compressed" not in sides else []
        resident += [dense] if self.config.dense and "dense" not in sides else []
        tokens = streamed_tokens(self.config)
        activations = min(tokens * inputs.layout.hidden * inputs.compute_bytes * 3, inputs.ram // ACTIVATION_SHARE)
        streaming = streamed_bytes(inputs.layout, inputs.weight_bytes, inputs.compute_bytes) + activations
        ram = work + max([*resident, streaming])
        return Estimate(ram=ram, notes=(f"the {' and the '.join(sides)} model goes through memory block by block",))

    def run(self, state: RunState, ctx: RunContext) -> None:
        """Measure whatever is not measured yet.

        Raises:
            GateFailed: A gate did not hold; everything is measured and stored by then.
            RecipeError: A gate names a metric that was not measured.
        """
        from llmcompress.evaluation.ledger import Ledger
        from llmcompress.models.heap import whole_models

        assert state.model is not None, "the pipeline checks that a load stage comes first"
        self.require_model(state.model.layout)
        from llmcompress.data.hub import offline

        with offline(self.config.offline), whole_models(sparing=ctx.ram is not None):
            _Evaluation(self.config, state, ctx, Ledger(ctx.stage_dir / "parts")).run()
        self._conclude(state, ctx)

    def _conclude(self, state: RunState, ctx: RunContext) -> None:
        """Announce metrics and judge gates."""
        metrics = read_metrics(ctx.stage_dir)
        for metric in metrics:
            ctx.emit(
                "metric", name=metric.name, value=metric.compressed if metric.compressed is not None else metric.dense,
                dense=metric.dense, compressed=metric.compressed,
            )  # fmt: skip
        results = judge(self.config.gates, metrics)
        for result in results:
            if result.passed:
                ctx.emit("note", text=f"held: {result.message}")
        rows = [asdict(result) | {"message": result.message} for result in results]
        write_durably(ctx.stage_dir / "gates.json", json.dumps(rows, indent=1).encode())
        state.metrics = state.metrics + metrics
        broken = failed(ctx.stage_dir)
        if broken:
            raise GateFailed(
                "\n".join(broken), "relax the gate, or spend more bits; llmcompress report RUN_DIR shows why"
            )

    def restore(self, state: RunState, ctx: RunContext) -> None:
        """Read the measured values back."""
        state.metrics = state.metrics + read_metrics(ctx.stage_dir)


class _Evaluation:
    """One run of the stage: which models are needed, in which order, and what is written."""

    def __init__(self, config: EvaluateConfig, state: RunState, ctx: RunContext, ledger: Ledger) -> None:
        assert state.model is not None
        self.config, self.state, self.ctx, self.ledger = config, state, ctx, ledger
        self.handle = state.model
        self.has_compressed = state.changed
        self._dense: PreTrainedModel | None = None
        self._compressed: PreTrainedModel | None = None

    def run(self) -> None:
        """Measure side by side, holding two models only while both are needed."""
        from llmcompress.evaluation import measure
        from llmcompress.models.heap import give_back_memory

        config, ledger = self.config, self.ledger
        calibration = self.state.calibration.tokens if self.state.calibration is not None else None
        self.tokenizer = self.handle.tokenizer()
        context = self.handle.config.get("max_position_embeddings")
        self.prepared = measure.prepare(
            config, self.tokenizer, calibration, context if isinstance(context, int) else None, self._warn
        )
        wanted: list[tuple[Side, bool]] = [("dense", config.dense), ("compressed", self.has_compressed)]
        sides = [side for side, needed in wanted if needed]
        if not sides:
            raise RecipeError("evaluate: dense is false and nothing was compressed", "set dense: true")
        measure.open_tasks(self.prepared, ledger, sides)
        for side in sides:
            if all(ledger.has(key) for key in measure.side_keys(config, self.prepared, side)):
                continue
            if side in self._streamed():
                stream = partial(self._stream, side)
                measure.measure_streamed(side, stream, config, self.prepared, ledger, self._tell)
            else:
                measure.measure_side(side, self._model(side), self.tokenizer, config, self.prepared, ledger, self._tell)
            if side == "dense" and not self._pair_pending():
                self._dense = None
            # or what one side left in the heap adds to the next one's peak: 0.3 GB for a model of 135 M parameters
            give_back_memory()
        self._without_policies()
        pair = self._pair() if self.has_compressed and config.dense else None
        shift = self._expert_shift()
        self._dense = self._compressed = None
        self._write(pair, shift)

    def _streamed(self) -> Sequence[Side]:
        """Sides that do not fit the budget and can do without being in memory whole."""
        from llmcompress.stages.blockwise.engine import plan_inputs

        if self.ctx.ram is None or self.ctx.device == "cuda" or self.state.policies or self.state.adapter is not None:
            return []
        plan = {} if self.state.packed is None else self.state.packed.plan()
        inputs = replace(plan_inputs(self.state, self.ctx), specs=plan)
        dense, compressed = _model_bytes(inputs)
        work = peak_bytes(self.config, inputs.layout, inputs.compute_bytes)
        return streamed_sides(
            self.config, inputs.layout, {"dense": dense, "compressed": compressed}, work, self.ctx.ram
        )

    def _stream(self, side: Side, parts: Sequence[Tensor]) -> StreamedModel:
        """Run one side's model on windows, block by block."""
        import torch

        from llmcompress.models.memory_limits import Limits
        from llmcompress.models.streamed import StreamedModel

        assert self.ctx.ram is not None
        return StreamedModel(
            self.handle, self.state.packed if side == "compressed" else None, parts,
            getattr(torch, self.ctx.dtype), self.ctx.device,
            limits=Limits(activations=self.ctx.ram // ACTIVATION_SHARE), folder=self.ctx.stage_dir / "activations",
        )  # fmt: skip

    def _pair_pending(self) -> bool:
        wanted = (self.prepared.windows is not None and not self.ledger.has("pair.fidelity")) or (
            self._wants_shift() and not self.ledger.has("pair.expert_shift")
        )
        return wanted and self.has_compressed

    def _model(self, side: Side) -> PreTrainedModel:
        """The dense or the compressed model in compute dtype on the run's device, built once."""
        import torch

        dtype = getattr(torch, self.ctx.dtype)
        if side == "dense":
            if self._dense is None:
                dense: Any = self.handle.dense_model(dtype)
                self._dense = dense.to(self.ctx.device)
            return self._dense
        if self._compressed is None:
            from llmcompress.models.assemble import compressed_model

            # an empty store: only policies act, all weights stay dense
            store = self.state.packed or PackedStore(self.ctx.stage_dir / "no_blocks")
            model: Any = compressed_model(
                self.handle, store, self.state.policies, dtype=dtype, adapter=self.state.adapter
            )
            self._compressed = model.to(self.ctx.device).eval()
        return self._compressed

    def _without_policies(self) -> None:
        """Perplexity and time of the compressed model with its run-time policies taken off."""
        from llmcompress.evaluation import measure

        config = self.config
        keys = measure.side_keys(config, self.prepared, "without_policies")
        if not self.state.policies or config.policies != "compare" or all(self.ledger.has(key) for key in keys):
            return
        from llmcompress.evaluation.expert_shift import without_skipping
        from llmcompress.nn.activations import float_activations
        from llmcompress.nn.mixers import float_states

        model = self._model("compressed")
        with without_skipping(model, self.handle.layout), float_states(model), float_activations(model):
            measure.measure_side(
                "without_policies", model, self.tokenizer, config, self.prepared, self.ledger, self._tell
            )

    def _pair(self) -> dict[str, Any] | None:
        from llmcompress.evaluation import measure

        if self.prepared.windows is None:
            return None
        if self.ledger.has("pair.fidelity"):
            return dict(self.ledger.get("pair.fidelity") or {})
        return measure.measure_pair(
            self._model("dense"), self._model("compressed"), self.config, self.prepared, self.ledger, self._tell
        )

    def _expert_shift(self) -> dict[str, Any] | None:
        """Which experts changed and what that costs; quantized weights only, so without policies."""
        from llmcompress.evaluation import measure

        if not self._wants_shift():
            return None
        found = self.ledger.get("pair.expert_shift")
        if found is None:
            from llmcompress.evaluation.expert_shift import shift_report

            tokens = measure.shift_windows(self.config, self.prepared)
            batch = self.config.batch if isinstance(self.config.batch, int) else None
            report = shift_report(self._model("dense"), self._model("compressed"), self.handle.layout, tokens, batch)
            found = self.ledger.put("pair.expert_shift", report)
        return dict(found)

    def _wants_shift(self) -> bool:
        # policies alone leave every router as it was
        return self.config.expert_shift and self.state.packed is not None

    def _write(self, pair: dict[str, Any] | None, shift: dict[str, Any] | None) -> None:
        """Write the files the report reads."""
        from llmcompress.evaluation import results
        from llmcompress.evaluation.generation import side_by_side

        config, ledger, prepared = self.config, self.ledger, self.prepared
        dense = results.side_scores("dense", config, prepared, ledger) if config.dense else None
        compressed = results.side_scores("compressed", config, prepared, ledger) if self.has_compressed else None
        rows = results.pair_scores(dense, compressed)
        rows += results.task_mean(rows, config.task_names()) + results.without_policy_rows(config, ledger)
        rows += results.pair_scores(None, results.fidelity_scores(pair) + results.shift_scores(shift))
        files: dict[str, Any] = {"texts": prepared.provenance, "positions": results.position_table(config, ledger)}
        if pair is not None:
            files["fidelity"] = pair
        if config.generation is not None:
            files["samples"] = side_by_side(
                self.tokenizer, config.generation, ledger.get("dense.generation"), ledger.get("compressed.generation")
            )
        decoding = results.decoding_rows(prepared, ledger)
        if decoding:
            files["decoding"] = decoding
        skipping = results.skipping_summary(config, ledger)
        if skipping is not None:
            files["pesf"] = skipping
        for name, part in (shift or {}).items():
            files[name] = part
        for name, content in {**files, "metrics": rows}.items():
            write_durably(self.ctx.stage_dir / f"{name}.json", json.dumps(content, indent=1, sort_keys=True).encode())

    def _tell(self, text: str) -> None:
        self.ctx.emit("note", text=text)

    def _warn(self, text: str) -> None:
        self.ctx.emit("warning", text=text)


def _model_bytes(inputs: PlanInputs) -> tuple[int, int]:
    """Bytes of the dense model in compute dtype, and of the compressed one: weights packed, and one of them decoded."""
    from llmcompress.quant.codecs import codec

    layout = inputs.layout
    outside = sum(math.prod(view.shape) for view in layout.outside)
    outside += sum(math.prod(view.shape) for block in layout.blocks for view in block.kept)
    dense = packed = outside * inputs.compute_bytes
    largest = 0
    for name, _, shape, _ in layout.quantizable():
        full = math.prod(shape) * inputs.compute_bytes
        largest = max(largest, full)
        dense += full
        spec = inputs.specs.get(name)
        packed += full if spec is None else codec(spec.codec).nbytes(shape, spec)
    return dense, packed + (largest if inputs.specs else 0)
