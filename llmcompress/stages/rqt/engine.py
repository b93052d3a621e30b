"""The stage ``rqt`` at work: open the family, choose tokens, survey, plan, build. Everything finished is on disk."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any

from llmcompress.data.calibration import CalibrationSet
from llmcompress.data.sources import require_window
from llmcompress.durable import write_durably
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.family import ModelFamily, unsupported
from llmcompress.models.vocabulary import vocabulary_difference
from llmcompress.quant.family import FamilyPlan
from llmcompress.quant.store import PackedStore
from llmcompress.stages.rqt.build import FamilyBuilder
from llmcompress.stages.rqt.importance import Felt, felt_by_loss
from llmcompress.stages.rqt.plan import make_plan
from llmcompress.stages.rqt.survey import Survey, survey_family
from llmcompress.stages.state import FamilyState

if TYPE_CHECKING:
    from llmcompress.models.handle import ModelHandle
    from llmcompress.stages.rqt.stage import RqtConfig
    from llmcompress.stages.state import RunContext, RunState


def run_rqt(config: RqtConfig, state: RunState, ctx: RunContext) -> None:
    """Run the stage and put the family into the state."""
    assert state.model is not None
    problems = unsupported(state.model.layout)
    if problems:
        raise RecipeError("\n".join(f"stages.{ctx.stage}: {p}" for p in problems))
    family = open_family(config, state, ctx)
    for name, handle in family.members.items():
        if difference := vocabulary_difference(family.base.tokenizer_path, handle.tokenizer_path):
            ctx.emit("warning", text=f"{name}: its tokenizer is not the base's: {difference}; it keeps its own")
    calibration = calibrate(config, family, ctx)
    survey = survey_family(config, family, calibration, ctx)
    felt = felt_by_loss(config, family, calibration, ctx)
    plan = planned(config, family, survey, felt, ctx)
    store = PackedStore(ctx.stage_dir / "blocks")
    FamilyBuilder(config, family, plan, calibration, store, ctx).run()
    state.family = FamilyState(family, plan, store, config.outside, calibration)


def attach_family(config: RqtConfig, state: RunState, ctx: RunContext) -> None:
    """Put a finished stage's family back into the state."""
    family = open_family(config, state, ctx)
    path = ctx.stage_dir / "plan.json"
    plan = FamilyPlan.from_dict(read_json(path), str(path))
    calibration = calibrate(config, family, ctx)
    state.family = FamilyState(family, plan, PackedStore(ctx.stage_dir / "blocks"), config.outside, calibration)


def open_family(config: RqtConfig, state: RunState, ctx: RunContext) -> ModelFamily:
    """Open all members beside the base."""
    assert state.model is not None
    dtype = (ctx.recipe.get("model") or {}).get("dtype", "auto")
    paths = {name: member.path for name, member in config.members.items()}
    return ModelFamily.open(state.model, paths, dtype)


def read_json(path: Any) -> Any:
    """Read JSON of this stage.

    Raises:
        InputError: It is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}", "delete it and resume the run") from error


def calibrate(config: RqtConfig, family: ModelFamily, ctx: RunContext) -> dict[str, CalibrationSet]:
    """Each member's windows: its own text and general text, mixed; chosen once and kept."""
    if not config.needs_text:
        return {}
    found = {}
    for name, handle in family.members.items():
        path = ctx.stage_dir / "calibration" / f"{name}.safetensors"
        if path.exists():
            found[name] = CalibrationSet.load(path)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        found[name] = choose_windows(config, name, handle, ctx)
        found[name].save(path)
    if len({each.tokens.shape[1] for each in found.values()}) > 1:
        raise InputError(f"stages.{ctx.stage}: calibration windows differ in length", "delete the stage's folder")
    return found


def choose_windows(config: RqtConfig, name: str, handle: ModelHandle, ctx: RunContext) -> CalibrationSet:
    """Windows of one member.

    Raises:
        InputError: A text is too short, or windows are longer than the model's context.
    """
    import torch

    from llmcompress.data.calibration import build

    wanted, own = config.calibration, config.members[name].calibration
    limit = handle.config.get("max_position_embeddings")
    require_window(f"stages.{ctx.stage}.calibration.length", wanted.length, limit, name)
    general = wanted.samples if own is None else round(wanted.samples * wanted.general_fraction)
    general = 0 if wanted.general is None else min(general, wanted.samples)
    parts = [(own, wanted.samples - general), (wanted.general, general)]
    sets = [
        build(
            source, None if source.kind == "synthetic" else handle.tokenizer(), count, wanted.length, ctx.seed,
            template=wanted.template, allow_fewer=wanted.allow_fewer, vocabulary=handle.layout.vocab,
        )
        for source, count in parts if source is not None and count > 0
    ]  # fmt: skip
    tokens = torch.cat([each.tokens for each in sets])
    # one in order of the other, or a short run would see one kind of text only
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(ctx.seed))
    return CalibrationSet.of(tokens[order], {"member": name, "parts": [each.provenance for each in sets]})


def planned(config: RqtConfig, family: ModelFamily, survey: Survey, felt: Felt, ctx: RunContext) -> FamilyPlan:
    """Trees and bits, chosen once and kept in ``plan.json``."""
    path = ctx.stage_dir / "plan.json"
    if not path.exists():
        plan, facts = make_plan(config, family, survey, felt)
        for text in facts.pop("warnings"):
            ctx.emit("warning", text=text)
        write_durably(ctx.stage_dir / "survey.json", json.dumps(facts, indent=1, sort_keys=True).encode())
        write_durably(path, json.dumps(plan.to_dict(), indent=1, sort_keys=True).encode())
    plan = FamilyPlan.from_dict(read_json(path), str(path))
    bits = f"{plan.linear_bits():.3f} bits per weight and member"
    ctx.emit("note", text=f"{len(plan.order)} members in {len(plan.trees)} tree(s), {bits}")
    counts = Counter(len(plan.path(linear, member)) for linear in plan.linears for member in plan.order)
    parts = ", ".join(f"{count} of {nodes}" for nodes, count in sorted(counts.items()))
    ctx.emit("note", text=f"a member's weight is the sum of so many nodes: {parts} (two: root and leaf alone)")
    return plan
