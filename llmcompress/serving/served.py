"""The models of an artifact behind names, each with its tokenizer, in batches that they share where they can."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmcompress.errors import InputError
from llmcompress.inference.generate import Recommended, recommended
from llmcompress.inference.greedy import ends_of
from llmcompress.serving.limits import Limits
from llmcompress.serving.mixed_rows import MixedRows, disagrees
from llmcompress.serving.rows import NativeRows, Rows, SeparateRows
from llmcompress.serving.scheduler import Group

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

    from llmcompress.models.family_artifact import FamilyArtifact
    from llmcompress.nn.tree_linear import BatchRows


@dataclass(frozen=True, slots=True)
class ServedModel:
    """A name that requests may ask for.

    Attributes:
        name: The name.
        tokenizer: Its tokenizer.
        stop: Token ids that end a text.
        context: Tokens that the model was made for, None where it has no bound.
        vocabulary: Number of token ids.
        sampling: What its makers recommend, for requests that do not say how.
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    stop: frozenset[int]
    context: int | None
    vocabulary: int
    sampling: Recommended


@dataclass(frozen=True, slots=True)
class Batch:
    """What one batch takes, told before the first request.

    Attributes:
        models: Names of its models.
        kind: Which way decodes: ``native``, ``mixed`` or ``separate``.
        sequences: At once; fewer than asked for where long ones fill the cache.
        tokens: Tokens of one sequence at most.
        together: Tokens of all sequences at most.
        cache_bytes: Keys, values and states when it is full.
        reason: Why no faster way decodes, empty for the fastest.
    """

    models: tuple[str, ...]
    kind: str
    sequences: int
    tokens: int
    together: int
    cache_bytes: int
    reason: str


@dataclass(frozen=True, slots=True)
class Served:
    """Everything that one process serves.

    Attributes:
        models: By name.
        groups: Their batches.
        batches: The same, described.
    """

    models: dict[str, ServedModel]
    groups: list[Group]
    batches: list[Batch]


def serve_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, limits: Limits, native: bool = True
) -> Served:
    """Serve a single model.

    Args:
        model: In evaluation mode, where it shall run.
        tokenizer: Its tokenizer.
        name: Its name.
        limits: Bounds.
        native: Whether the native engine may run it.
    """
    served = _served(model, tokenizer, name, model.generation_config)
    longest = _longest(served, limits)
    rows, reason = _batches(model, limits, longest, native)
    return Served({name: served}, [Group(rows, {name: None})], [_described(rows, (name,), limits, reason)])


def serve_family(
    artifact: FamilyArtifact, limits: Limits, dtype: torch.dtype | None, device: str, native: bool = True
) -> Served:
    """Serve every member of a family, in one batch if their settings allow it.

    Args:
        artifact: The family.
        limits: Bounds.
        dtype: Type of dense tensors and activations.
        device: Where it runs.
        native: Whether the native engine may run it.

    Raises:
        InputError: A member cannot be loaded or has no tokenizer.
    """
    from llmcompress.models.family_model import load_members
    from llmcompress.models.handle import generation_settings, load_tokenizer

    together: list[tuple[str, ...]] = [artifact.members]
    try:
        loaded = [load_members(artifact, None, dtype)]
    except InputError as error:
        if "differ in settings" not in error.message:
            raise
        together = [(member,) for member in artifact.members]
        loaded = [load_members(artifact, [member], dtype) for member in artifact.members]
    models, groups, batches = {}, [], []
    for members, family in zip(together, loaded):
        model: Any = family.model
        model = model.to(device)
        for member in members:
            folder = artifact.member_folder(member)
            models[member] = _served(model, load_tokenizer(folder), member, generation_settings(folder))
        longest = _longest(models[members[0]], limits)
        rows, reason = _batches(model, limits, longest, native, family.batch, members)
        groups.append(Group(rows, {member: member for member in members}))
        batches.append(_described(rows, tuple(members), limits, reason))
    return Served(models, groups, batches)


def together(parts: Sequence[Served]) -> Served:
    """Several in one process; tokens and sequences that wait are counted for all.

    Raises:
        InputError: Two models have one name.
    """
    names = [name for part in parts for name in part.models]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise InputError(f"two models are named {', '.join(repeated)}", "serve folders of different names")
    return Served(
        {name: model for part in parts for name, model in part.models.items()},
        [group for part in parts for group in part.groups],
        [batch for part in parts for batch in part.batches],
    )


def _longest(model: ServedModel, limits: Limits) -> int:
    """Tokens that a sequence may come to: what the model, the cache and the bounds of requests leave room for."""
    return min(model.context or limits.cache_tokens, limits.cache_tokens, limits.prompt_tokens + limits.new_tokens)


def _served(
    model: Any, tokenizer: PreTrainedTokenizerBase, name: str, settings: GenerationConfig | None
) -> ServedModel:
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    ends = frozenset(ends_of(settings, tokenizer))
    return ServedModel(name, tokenizer, ends, context, int(config.vocab_size), recommended(settings))


def _batches(
    model: PreTrainedModel, limits: Limits, longest: int, native: bool, batch: BatchRows | None = None,
    members: Sequence[str] = (),
) -> tuple[Rows, str]:  # fmt: skip
    """The first way that can run a model, and why not a faster one."""
    rows: Rows | None = None
    reason = "the native engine is not asked for"
    if native:
        rows, reason = _native(model, limits, longest)
    if rows is not None:
        return rows, ""
    rows, remark = _modules(model, limits, longest, batch, members)
    return rows, f"{reason}{remark}"


def _described(rows: Rows, models: tuple[str, ...], limits: Limits, reason: str) -> Batch:
    together = min(limits.cache_tokens, rows.limit * rows.longest)
    return Batch(models, rows.kind, rows.limit, rows.longest, together, rows.full_bytes(together), reason)


def _native(model: PreTrainedModel, limits: Limits, longest: int) -> tuple[Rows | None, str]:
    """Rows of the native engine, or why not."""
    from llmcompress_kernels.build import BuildError
    from llmcompress_kernels.decode import MAX_BATCH

    from llmcompress.inference.engine import longest as longest_of
    from llmcompress.inference.native import decline, open_engine, recurrent_model

    reason = decline(model)
    most = longest_of(model)
    if reason is None and most is not None and most < longest:
        reason = (
            f"the native engine takes sequences of this model up to {most} tokens, and one may have {longest} (bound "
            "it by --max-prompt-tokens and --max-new-tokens)"
        )
    if reason is not None:
        return None, reason
    # states are all of one size
    places = limits.rows
    if not recurrent_model(model):
        longest, places = _places(limits, longest, MAX_BATCH)
    try:
        engine = open_engine(model, places, longest)
    except BuildError as error:
        return None, str(error).splitlines()[0]
    return NativeRows(engine, places, longest, limits.prefix_caching, limits.snapshot_bytes), ""


def _places(limits: Limits, longest: int, most: int) -> tuple[int, int]:
    """Tokens and places of a cache in which every place has room for the longest sequence: as many as the limit allows.

    Args:
        limits: Bounds.
        longest: Tokens that a sequence may have.
        most: Sequences that one step takes, for which there is room at least.
    """
    longest = max(1, min(longest, limits.cache_tokens // most))
    places = max(1, min(limits.rows, limits.cache_tokens // longest))
    # a few more than a step takes cost a second pass over all weights
    over = places % most
    return longest, places - over if places > most and over < most // 2 else places


def _modules(
    model: PreTrainedModel, limits: Limits, longest: int, batch: BatchRows | None, members: Sequence[str]
) -> tuple[Rows, str]:
    mixed = MixedRows(model, limits.rows, longest, batch, members)
    separate = SeparateRows(model, limits.rows, longest, batch, members)
    reason = disagrees(mixed, separate, members, int(model.config.get_text_config().vocab_size))
    return (mixed, "") if reason is None else (separate, f"; one after the other: {reason}")


def model_name(path: Path) -> str:
    """Name of a single model: that of its folder, or of the run that holds the folder ``artifact``."""
    resolved = path.resolve()
    return resolved.parent.name if resolved.name == "artifact" else resolved.name
