"""What is measured on one model, and what on a pair; every finished part is kept so that a killed run continues.

Nothing here knows about stages or run folders: :mod:`llmcompress.stages.evaluate` and the ``eval`` command both use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from llmcompress.data.calibration import CalibrationSet, build, overlap
from llmcompress.data.documents import read
from llmcompress.data.sources import describe
from llmcompress.errors import InputError
from llmcompress.evaluation import harness
from llmcompress.evaluation import recall as remembering
from llmcompress.evaluation.batching import SHIFT_WINDOWS
from llmcompress.evaluation.config import (
    Overlap,
    require_chat_template,
    require_windows,
)
from llmcompress.evaluation.fidelity import fidelity
from llmcompress.evaluation.generation import generate
from llmcompress.evaluation.ledger import Ledger
from llmcompress.evaluation.pace import Pace
from llmcompress.evaluation.perplexity import Text, perplexity, tokenize
from llmcompress.evaluation.results import NATIVE, SAMPLES, written_by
from llmcompress.evaluation.streamed import streamed_perplexity
from llmcompress.evaluation.task_specs import TaskSpec, specify

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from llmcompress.models.streamed import StreamedModel
    from llmcompress.stages.evaluate import EvaluateConfig

Side = Literal["dense", "compressed", "without_policies"]
Tell = Callable[[str], None]
REFUSED_OVERLAP = 0.01
"""Share of shared tokens from which held-out text no longer counts as held out."""
FEW_TOKENS = 500
"""A perplexity of fewer tokens tells texts apart rather than models."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Texts and tasks, tokenized and checked before any model runs.

    Attributes:
        texts: Perplexity texts by name.
        windows: Fidelity windows.
        tasks: Task specifications.
        provenance: Where each text came from, by name.
        filler: ``[T]`` tokens of the recall section's text, or None.
    """

    texts: dict[str, Text]
    windows: CalibrationSet | None
    tasks: list[TaskSpec]
    provenance: dict[str, Any] = field(default_factory=dict)
    filler: Tensor | None = None


def prepare(
    config: EvaluateConfig,
    tokenizer: PreTrainedTokenizerBase | None,
    calibration: Tensor | None,
    context: int | None,
    warn: Tell,
) -> Prepared:
    """Read and tokenize all text, check it against the calibration set, and make sure tasks have their data.

    Args:
        config: What to measure.
        tokenizer: The model's tokenizer; None only when nothing needs one.
        calibration: ``[S, L]`` int64 calibration tokens, or None.
        context: Positions the model was built for, None when unknown.
        warn: Receives remarks.

    Raises:
        InputError: Text or data is missing, too long for the model, or is calibration text.
    """
    from llmcompress.models.paths import resolve_path

    needs = bool(config.perplexity or config.fidelity or config.tasks or config.generation or config.recall)
    if needs and tokenizer is None:
        raise InputError("the model has no tokenizer, so it cannot be evaluated on text", "set model.tokenizer")
    require_chat_template(config.tasks, config.generation, getattr(tokenizer, "chat_template", None))
    require_windows(config.perplexity, config.fidelity, config.recall, config.tasks, context)
    texts, provenance = {}, {}
    for name, section in config.perplexity.items():
        assert tokenizer is not None
        documents = read(section.source, tokenizer, section.template)
        texts[name] = tokenize(section.separator.join(documents.texts), tokenizer).first(section.max_tokens)
        provenance[name] = documents.provenance
        count = len(texts[name].tokens)
        if count < FEW_TOKENS and count != section.max_tokens:
            warn(f"{name}: this text has only {count} tokens: its perplexity says little about a model")
        _check_overlap(name, texts[name].tokens, calibration, config.overlap, warn)
    windows = None
    if config.fidelity is not None:
        section_f = config.fidelity
        windows = build(
            section_f.source, tokenizer, section_f.samples, section_f.length, section_f.seed,
            template=section_f.template, allow_fewer=section_f.allow_fewer,
        )  # fmt: skip
        provenance["fidelity"] = windows.provenance
        if section_f.source.kind != "synthetic":
            _check_overlap(describe(section_f.source), windows.tokens, calibration, config.overlap, warn)
    folder = resolve_path(config.tasks_dir, None) if config.tasks_dir else None
    tasks = specify(config.tasks, folder, config.limit)
    filler = None
    if config.recall is not None:
        assert tokenizer is not None
        documents = read(config.recall.source)
        filler = tokenize("\n\n".join(documents.texts), tokenizer).tokens
        provenance["recall"] = documents.provenance
        for distance in config.recall.distances:
            remembering.prompts(tokenizer, filler, distance, config.recall)
    return Prepared(texts, windows, tasks, provenance, filler)


def _check_overlap(name: str, tokens: Tensor, calibration: Tensor | None, mode: Overlap, warn: Tell) -> None:
    if calibration is None or mode == "ignore":
        return
    share = overlap(calibration, tokens)
    if share >= REFUSED_OVERLAP and mode == "refuse":
        raise InputError(
            f"{name}: {share:.1%} of this text was used for calibration, so it is not held out",
            "evaluate on other text, or set overlap: warn",
        )
    if share > 0:
        warn(f"{name}: {share:.2%} of this text was also calibration text")


def open_tasks(prepared: Prepared, ledger: Ledger, sides: Sequence[Side]) -> None:
    """Build every task that is still to run, so that missing data is known before hours of measuring.

    Raises:
        InputError: A task's data cannot be had.
    """
    for spec in prepared.tasks:
        if any(not ledger.has(f"{side}.task.{spec.name}") for side in sides):
            harness.build(spec)


def side_keys(config: EvaluateConfig, prepared: Prepared, side: Side) -> list[str]:
    """Keys of all parts that one model contributes."""
    keys = [f"{side}.perplexity.{name}" for name in config.perplexity]
    if side != "without_policies":
        keys += [f"{side}.task.{spec.name}" for spec in prepared.tasks]
        keys += [f"{side}.generation"] if config.generation is not None else []
        keys += [f"{side}.recall"] if config.recall is not None else []
    return keys


def measure_side(
    side: Side,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: EvaluateConfig,
    prepared: Prepared,
    ledger: Ledger,
    tell: Tell,
    label: str | None = None,
) -> None:
    """Measure everything that one model alone contributes; parts in the ledger are skipped.

    Args:
        side: Which model this is.
        model: The model, in evaluation mode.
        tokenizer: Its tokenizer.
        config: What to measure.
        prepared: Texts and tasks.
        ledger: Receives each part as it is finished.
        tell: Receives a line per part.
        label: What those lines call the model, by default its side; nothing where it is empty.
    """
    head = f"{side if label is None else label}: " if label != "" else ""
    batch = config.batch if isinstance(config.batch, int) else None
    for name, section in config.perplexity.items():
        key = f"{side}.perplexity.{name}"
        if ledger.has(key):
            continue
        controller = getattr(model, "llmcompress_skipping", None)
        if controller is not None:
            controller.reset()
        result = perplexity(
            model, prepared.texts[name], section.length, section.stride, keep_tail=section.tail == "keep", batch=batch,
            progress=Pace(f"{head}{name}", tell),
        )  # fmt: skip
        # what an expert-skipping policy did on this very text
        skipping = {} if controller is None else {"skipping": controller.statistics()}
        ledger.put(key, asdict(result) | skipping)
        tell(f"{head}{name} perplexity {result.perplexity:.4f} on {result.tokens} tokens")
    if side == "without_policies":
        return
    from llmcompress.inference.greedy import GreedyWriter

    writer = GreedyWriter(model)
    for spec in prepared.tasks:
        key = f"{side}.task.{spec.name}"
        if ledger.has(key):
            continue
        listener = harness.Listener(
            lambda text: tell(f"{head}{text}"), partial(_keep_written, side, head, spec.name, ledger, tell)
        )
        if config.log_samples:
            listener = replace(listener, samples=partial(ledger.keep_requests, side))
        scores = harness.evaluate(
            model, tokenizer, spec, batch=batch, state_mode=config.state_mode, writer=writer,
            listener=listener,
        )  # fmt: skip
        ledger.put(key, [asdict(score) for score in scores])
        tell(f"{head}{spec.name} " + ", ".join(f"{s.metric} {s.value:.4f}" for s in scores[:2]))
    if config.recall is not None and not ledger.has(f"{side}.recall"):
        assert prepared.filler is not None
        parts = remembering.recall(model, tokenizer, prepared.filler, config.recall)
        ledger.put(f"{side}.recall", parts)
        tell(f"{head}recall " + ", ".join(f"{part['accuracy']:.2f} at {part['distance']}" for part in parts))
    if config.generation is not None and not ledger.has(f"{side}.generation"):
        texts = generate(model, tokenizer, config.generation, writer)
        greedy = config.generation.temperature == 0
        _keep_written(side, head, SAMPLES, ledger, tell, {(writer.reason or NATIVE) if greedy else "texts are sampled"})
        ledger.put(f"{side}.generation", texts)


def _keep_written(side: Side, head: str, part: str, ledger: Ledger, tell: Tell, by: set[str]) -> None:
    ledger.put(f"{side}.written.{part}", sorted(by))
    tell(f"{head}{part} written by " + written_by(sorted(by)))


def measure_streamed(
    side: Side,
    stream: Callable[[Sequence[Tensor]], StreamedModel],
    config: EvaluateConfig,
    prepared: Prepared,
    ledger: Ledger,
    tell: Tell,
) -> None:
    """Measure the perplexities of a model that does not fit into memory; parts in the ledger are skipped.

    Args:
        side: Which model this is.
        stream: Runs the model on windows, block by block.
        config: What to measure; nothing but ``perplexity`` is.
        prepared: Texts.
        ledger: Receives each part as it is finished.
        tell: Receives a line per part.
    """
    for name, section in config.perplexity.items():
        key = f"{side}.perplexity.{name}"
        if not ledger.has(key):
            result = streamed_perplexity(
                stream, prepared.texts[name], section.length, section.stride, keep_tail=section.tail == "keep"
            )
            ledger.put(key, asdict(result))
            tell(f"{side}: {name} perplexity {result.perplexity:.4f} on {result.tokens} tokens, block by block")


def measure_pair(
    dense: PreTrainedModel,
    compressed: PreTrainedModel,
    config: EvaluateConfig,
    prepared: Prepared,
    ledger: Ledger,
    tell: Tell,
) -> dict[str, Any] | None:
    """Compare output distributions of two models; None when the recipe does not ask for it.

    Args:
        dense: The reference.
        compressed: The model to judge.
        config: What to measure.
        prepared: Texts and tasks.
        ledger: Holds or receives the result.
        tell: Receives a line now and then.

    Returns:
        Fields of :class:`llmcompress.evaluation.fidelity.FidelityResult`.
    """
    if prepared.windows is None:
        return None
    found = ledger.get("pair.fidelity")
    if found is None:
        batch = config.batch if isinstance(config.batch, int) else None
        progress = Pace("fidelity", tell)
        result = fidelity(dense, compressed, prepared.windows.tokens, batch, progress)
        found = ledger.put("pair.fidelity", result.to_dict())
    return dict(found)


def shift_windows(config: EvaluateConfig, prepared: Prepared) -> Tensor:
    """Held-out windows ``[S, L]`` int64 for the expert-shift figures: those of fidelity, else of the first text."""
    if prepared.windows is not None:
        return prepared.windows.tokens
    name, section = next(iter(config.perplexity.items()))
    tokens = prepared.texts[name].tokens
    length = min(section.length, len(tokens))
    count = min(SHIFT_WINDOWS, len(tokens) // length)
    return tokens[: count * length].reshape(count, length)
