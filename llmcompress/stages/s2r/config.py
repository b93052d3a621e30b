"""Recipe fields that the S2R stages share, and how they open and keep a model. No torch at import."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from llmcompress.data.problems.config import Task
from llmcompress.errors import InputError, RecipeError, UsageError
from llmcompress.models.paths import ADAPTER
from llmcompress.section import Section
from llmcompress.stages.base import Estimate, PlanInputs, StageConfig

if TYPE_CHECKING:
    from llmcompress.data.problems.base import Problem, ProblemSet
    from llmcompress.evaluation.sampling import Sampling
    from llmcompress.evaluation.self_correction import Measured, Reader
    from llmcompress.models.layout import ModelLayout
    from llmcompress.stages.state import RunContext, RunState
    from llmcompress.training.policy import Policy
    from llmcompress.training.vllm_writer import VllmWriter

MODEL, CHECKPOINT = "model", "progress.safetensors"


class SamplingConfig(Section):
    """How responses are sampled."""

    temperature: Annotated[float, Field(ge=0)] = 0.7
    """0 takes the most likely token."""

    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Smallest set of tokens with this probability."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longest response."""

    batch: Annotated[int, Field(ge=1)] = 128
    """Responses decoded together."""

    def settings(self) -> Sampling:
        """As the sampler takes it."""
        from llmcompress.evaluation.sampling import Sampling

        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.batch)


class SamplerConfig(Section):
    """Who writes the responses that a policy learns from. Behaviour is always measured with our own decoder."""

    engine: Literal["own", "vllm"] = "own"
    """``vllm`` (extra ``vllm``, a GPU, one process, no packed weights) gets the policy's weights anew before each round
    of sampling; log-probabilities for training stay our own. Written against vLLM 0.11 and 0.33, never run."""

    memory: Annotated[float, Field(gt=0, lt=1)] = 0.4
    """Share of the GPU's memory that vLLM takes while it writes; it gives it back for training."""


class AdapterConfig(Section):
    """Low-rank adapters instead of all weights."""

    rank: Annotated[int, Field(ge=1)] = 16
    """Rank of each adapter."""

    alpha: Annotated[float, Field(gt=0)] = 32.0
    """Scale; the adapter's product counts ``alpha / rank``."""

    targets: Literal["all", "attention", "mlp"] = "all"
    """Which linears get one. Packed experts and routers get none."""


class MeasureConfig(Section):
    """Held-out problems on which a stage measures the behaviour before and after."""

    split: Literal["validation", "test"] = "test"
    """Problems of which split; stages that choose something by it should use ``validation``."""

    problems: Annotated[int, Field(ge=1)] | None = 500
    """How many, chosen by seed 0 whatever the run's seed; null for all."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 2048
    """Longest response."""

    batch: Annotated[int, Field(ge=1)] = 256
    """Responses decoded together."""


class S2RConfig(StageConfig):
    """What every S2R stage needs to know."""

    task: Task
    """Which problems."""

    chat: bool = False
    """Render problems through the tokenizer's chat template, with the paper's system line."""

    system: str = "Please reason step by step, and put your final answer within \\boxed{}."
    """System line of the chat template; empty for templates that know none."""


class TrainingConfig(S2RConfig):
    """What the training stages share."""

    sampling: SamplingConfig = SamplingConfig()
    """How responses are sampled."""

    sampler: SamplerConfig = SamplerConfig()
    """Who samples them."""

    adapter: AdapterConfig | None = None
    """Train adapters instead of all weights. Needed after a quantizing stage: codes cannot be trained. On a dense
    model they are merged into the weights at the end."""

    micro_batch: Annotated[int, Field(ge=1)] = 64
    """Rows computed at once; changes memory, not the result beyond rounding."""

    micro_tokens: Annotated[int, Field(ge=64)] | None = None
    """Tokens computed at once, padding included, beside the limit of ``micro_batch``; for rows of very different
    length on a GPU."""

    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of matrices, adapters' too, decoupled as in AdamW; norms and biases have none. The paper names none."""

    recompute: bool = False
    """Compute the blocks' inside again in the backward pass instead of keeping it; for long responses of large models.
    The result is the same."""

    measure: MeasureConfig | None = MeasureConfig()
    """Held-out behaviour after the stage; null for none."""

    save_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Data type of the trained weights on disk; ``auto`` is the source's. 16 bit may round small updates away."""


def adapter_names(layout: ModelLayout, targets: str) -> list[str]:
    """Linears that get an adapter, in order of the blocks."""
    from llmcompress.models.layout import Role

    wanted = {"attention": {Role.ATTENTION}, "mlp": {Role.MLP}, "all": {Role.ATTENTION, Role.MLP}}[targets]
    return [view.name for block in layout.blocks for view in block.linears() if view.role in wanted]


def open_model(state: RunState, ctx: RunContext) -> Any:
    """The model as the stages before left it, dense or packed, with their adapter; on the run's device, evaluation
    mode.
    """
    import torch

    from llmcompress.models.assemble import compressed_model

    assert state.model is not None
    dtype = getattr(torch, ctx.dtype)
    if not state.changed:
        model: Any = state.model.dense_model(dtype)
    else:
        from llmcompress.quant.store import PackedStore

        store = state.packed or PackedStore(ctx.stage_dir / "no_blocks")
        model = compressed_model(state.model, store, state.policies, dtype=dtype, adapter=state.adapter)
    return model.to(ctx.device).eval()


def open_policy(config: TrainingConfig, state: RunState, ctx: RunContext) -> Policy:
    """The model ready for training.

    Raises:
        RecipeError: A quantized model is to be trained without adapters.
    """
    import torch

    from llmcompress.nn import lora
    from llmcompress.training.policy import Policy

    assert state.model is not None
    if state.adapter is None and state.packed is None and config.adapter is None:
        whole: Any = state.model.dense_model(torch.float32).to(ctx.device)  # type: ignore[arg-type]
        return Policy(whole, compute=getattr(torch, ctx.dtype), world=ctx.world, recompute=config.recompute)
    model = open_model(state, ctx)
    if state.adapter is not None:
        return Policy(model, lora.parameters(model), world=ctx.world, recompute=config.recompute)
    if config.adapter is not None:
        names = adapter_names(state.model.layout, config.adapter.targets)
        moving = lora.attach(model, names, config.adapter.rank, config.adapter.alpha, ctx.seed)
        return Policy(model, moving, world=ctx.world, recompute=config.recompute)
    raise RecipeError(
        f"stages.{ctx.stage}: the model is quantized, and codes cannot be trained",
        f"set stages.{ctx.stage}.adapter, or put this stage before the quantizing one",
    )


def open_sampler(
    config: TrainingConfig, policy: Policy, reader: Reader, state: RunState, ctx: RunContext
) -> VllmWriter | None:
    """Who writes the policy's responses, None for our own decoder.

    Raises:
        RecipeError: vLLM is to read packed weights.
        UsageError: There are several processes.
    """
    if config.sampler.engine == "own":
        return None
    from llmcompress.training.vllm_writer import VllmWriter

    assert state.model is not None
    where = f"stages.{ctx.stage}.sampler.engine: vllm"
    if state.changed:
        raise RecipeError(
            f"{where} reads no packed weights", f"set stages.{ctx.stage}.sampler.engine=own, or train before quantizing"
        )
    if ctx.world.size > 1:
        raise UsageError(f"{where} writes for one process: go on without --nproc, or with sampler.engine: own")
    longest = max((len(reader.prompt(p.question)) for p in reader.problems.problems("train")), default=0)
    return VllmWriter(
        policy, state.model, ctx.stage_dir / "vllm", ctx.dtype, longest + config.sampling.max_new_tokens,
        config.sampler.memory, ctx.seed,
    )  # fmt: skip


def keep_policy(config: TrainingConfig, policy: Policy, state: RunState, ctx: RunContext) -> None:
    """Write the trained model (or adapter) durably; it appears only when complete."""
    from llmcompress.training.saving import save_model

    assert state.model is not None
    if policy.adapted and state.packed is not None:
        from llmcompress.export.base import atomic_folder
        from llmcompress.nn import lora

        if not (ctx.stage_dir / ADAPTER).is_dir():
            with atomic_folder(ctx.stage_dir / ADAPTER) as part:
                lora.save(policy.model, part)
        return
    if not (ctx.stage_dir / MODEL).is_dir():
        save_model(policy.model, state.model, ctx.stage_dir / MODEL, config.save_dtype)


def adopt(state: RunState, ctx: RunContext) -> None:
    """Let the stages after this one see what it trained: a new model, or an adapter on the one they know."""
    from llmcompress.models.handle import ModelHandle

    assert state.model is not None
    if (ctx.stage_dir / ADAPTER).is_dir():
        state.adapter = ctx.stage_dir / ADAPTER
        return
    state.model = ModelHandle.open(ctx.stage_dir / MODEL)


def is_done(ctx: RunContext) -> bool:
    """Whether the trained weights are written."""
    return (ctx.stage_dir / ADAPTER).is_dir() or (ctx.stage_dir / MODEL).is_dir()


def drop_checkpoints(ctx: RunContext) -> None:
    """Remove the progress of a training whose weights are written: values and moments, three times what was trained."""
    for path in ctx.stage_dir.glob(f"*{CHECKPOINT}"):
        path.unlink()


def reader_of(config: S2RConfig, state: RunState, problems: ProblemSet) -> Reader:
    """Prompts and judgement for this model.

    Raises:
        InputError: The tokenizer ends or pads with a token that the model does not have.
    """
    from llmcompress.evaluation.self_correction import Reader

    assert state.model is not None
    reader, known = Reader(state.model.tokenizer(), problems, config.chat, config.system), state.model.layout.vocab
    for name, token in (("ends", reader.end), ("pads", reader.pad)):
        if token >= known:
            raise InputError(
                f"the tokenizer {name} texts with token {token}, but the model knows only {known}",
                "use the tokenizer that belongs to the model (model.tokenizer)",
            )
    return reader


def held_out(config: MeasureConfig, problems: ProblemSet) -> list[Problem]:
    """The problems a stage measures on: the same for every seed, so that runs compare."""
    from llmcompress.evaluation.self_correction import choose

    return choose(problems.problems(config.split), config.problems, 0)


def measure_behaviour(
    config: MeasureConfig, model: Any, reader: Reader, name: str, ctx: RunContext
) -> dict[str, float | int | None]:
    """Measure once, all processes together, and keep it: figures in ``behaviour_<name>.json``, verdicts and texts in
    ``episodes_<name>.json``.
    """
    import json

    from llmcompress.durable import write_durably
    from llmcompress.evaluation.results import NATIVE, written_by
    from llmcompress.evaluation.sampling import Sampling
    from llmcompress.evaluation.self_correction import measure, write_episodes

    first = ctx.world.rank == 0
    path = ctx.stage_dir / f"behaviour_{name}.json"
    known: dict[str, float | int | None] | None
    known = ctx.world.tell(json.loads(path.read_text()) if first and path.exists() else None)
    if known is not None:
        return known
    problems = held_out(config, reader.problems)
    sampling = Sampling(config.max_new_tokens, batch=config.batch)
    measured: Measured = measure(model, reader, problems, sampling, world=ctx.world)
    figures = measured.figures()
    if first:
        write_episodes(ctx.stage_dir / f"episodes_{name}.json", problems, measured)
        by = written_by([measured.declined or NATIVE])
        ctx.emit("note", text=f"{name}: responses written by {by}")
        row = {"side": name, "part": "responses", "written_by": by}
        write_durably(ctx.stage_dir / f"decoding_{name}.json", json.dumps([row], indent=1).encode())
        write_durably(path, json.dumps(figures, indent=1, sort_keys=True).encode())
    return figures


def announce(name: str, figures: dict[str, float | int | None], ctx: RunContext) -> None:
    """Send figures as metric events."""
    for key, value in figures.items():
        if value is not None and not key.startswith("n_"):
            ctx.emit("metric", name=f"{name}.{key}", value=value)


def estimate_training(
    config: TrainingConfig, inputs: PlanInputs, length: int, rows: int, checkpoints: int, copy: bool = False
) -> Estimate:
    """Memory of training: weights, gradients, moments, reference, activations of one micro-batch.

    Args:
        config: The stage.
        inputs: The model and what is known of it.
        length: Longest row in tokens; none is longer than the model's sequences may be.
        rows: Rows at once.
        checkpoints: How many lie on disk until the weights are written.
        copy: Whether a mean of the weights, or the best ones, are kept beside them.
    """
    import math

    layout = inputs.layout
    total = sum(math.prod(view.shape) for view in layout.tensors())
    if config.adapter is not None:
        names = set(adapter_names(layout, config.adapter.targets))
        ends = [v.in_features + v.out_features for b in layout.blocks for v in b.linears() if v.name in names]
        moving = config.adapter.rank * sum(ends)
        frozen = total * inputs.compute_bytes
    else:
        # the reference is a frozen copy in the compute type
        moving, frozen = total, total * inputs.compute_bytes
    # what is trained, its gradient and two moments are in float32
    weights = frozen + moving * (20 if copy else 16)
    rows = min(rows, config.micro_batch)
    # hidden states, two projections of about four widths and attention per layer are kept for the backward pass; then
    # logits thrice. Computed again, a layer keeps its input, and one at a time has the rest.
    kept = len(layout.blocks) + 34 if config.recompute else 34 * len(layout.blocks)
    hidden = layout.hidden * kept + 3 * layout.vocab
    length = min(length, inputs.positions or length)
    tokens = max(length, min(rows * length, config.micro_tokens or rows * length))
    activations = tokens * hidden * inputs.compute_bytes
    peak = weights + activations
    disk = checkpoints * moving * (16 if copy else 12) + (
        0 if config.adapter is not None else total * inputs.weight_bytes
    )
    on_gpu = inputs.device == "cuda"
    return Estimate(ram=total * inputs.compute_bytes if on_gpu else peak, vram=peak if on_gpu else 0, disk=disk)
