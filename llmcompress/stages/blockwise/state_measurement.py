"""Measure the states of every block on the quantized stream, durably, block by block. Used by stage ``dsq``."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llmcompress.algorithms.bit_allocation import allocate
from llmcompress.durable import write_durably
from llmcompress.quant.states import BITS, SCALE, StateSpec
from llmcompress.quant.store import BlockPatch, PackedStore

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.algorithms.state_statistics import HeadStatistics, Inputs
    from llmcompress.models.layout import Block
    from llmcompress.stages.dsq import DsqConfig
    from llmcompress.stages.state import RunContext, RunState


def measure_states(config: DsqConfig, state: RunState, ctx: RunContext) -> None:
    """Write one patch per block: calibrated scale, half-lives, output error per head and width.

    Args:
        config: The stage's config.
        state: Needs a model and a calibration set.
        ctx: The run.

    Raises:
        RecipeError: There is no calibration set.
    """
    import torch

    from llmcompress.models.assemble import apply_loan, apply_patch
    from llmcompress.models.walker import Walker

    assert state.model is not None
    calibration = state.calibrated(ctx.stage)
    handle, store = state.model, PackedStore(ctx.stage_dir / "blocks", state.packed)
    blocks = handle.layout.blocks
    finished = store.finished()
    todo = set(range(len(blocks))) - finished
    if not todo:
        return
    tokens = calibration.tokens[: config.samples, : config.tokens]
    model = handle.skeleton(getattr(torch, ctx.dtype), head=False)
    walker = Walker(model, tokens, ctx.device, ctx.seed)
    hidden = walker.embed([block.name for block in blocks])
    handle.free_embeddings(model)
    for block in blocks:
        if block.index > max(todo):
            break
        started = time.monotonic()
        handle.load_block(model, block.index, ctx.device)
        apply_patch(model, handle.layout, store.below(block.index))
        apply_loan(model, handle.layout, block, state.packed)
        if block.index in todo:
            ctx.emit("block_start", index=block.index, total=len(blocks))
        statistics = _forward(config, walker, block, hidden, block.index in todo)
        if block.index in todo:
            record, replaced = _patch(config, block, statistics)
            seconds = round(time.monotonic() - started, 3)
            store.write_block(block.index, BlockPatch({}, replaced, record))
            ctx.emit("block_end", index=block.index, total=len(blocks), seconds=seconds)
        handle.free_block(model, block.index)


def _forward(config: DsqConfig, walker: Any, block: Block, hidden: Tensor, measured: bool) -> HeadStatistics | None:
    """Run a block; look into its scan when ``measured``."""
    if block.scan is None or not measured:
        walker.forward(block, hidden)
        return None
    from llmcompress.algorithms.state_statistics import HeadStatistics
    from llmcompress.nn.mixers import StateRuntime, attach_mixer

    runtime, statistics = StateRuntime(), HeadStatistics(block.scan.heads)
    mixer = walker.model.get_submodule(block.scan.module)
    batches: list[Inputs] = []
    runtime.inspect = lambda _layer, inputs: batches.append(inputs)
    # every token counts as prompt, so time steps are limited as in a prefill
    runtime.prompt = walker.tokens.shape[1]
    attach_mixer(mixer, block.scan, runtime)
    walker.forward(block, hidden)
    del mixer.forward
    outputs = [statistics.add_float(inputs) for inputs in batches]
    for bits in BITS:
        spec = replace(spec_of(config), bits=bits)
        for inputs, exact in zip(batches, outputs):
            statistics.add_error(str(bits), inputs, exact, spec, statistics.static(spec), config.replay_window)
    return statistics


def spec_of(config: DsqConfig) -> StateSpec:
    """The codec of a stage; to nearest for measurements instead of with noise."""
    return StateSpec(
        config.bits, config.codec, config.alpha, config.sqrt_axis, config.rounding, config.seed, config.refits
    ).without_noise()


def _patch(
    config: DsqConfig, block: Block, statistics: HeadStatistics | None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from llmcompress.algorithms.state_statistics import shares

    if statistics is None or block.scan is None:
        return {}, {}
    labels = [str(bits) for bits in BITS]
    record = {
        "module": block.scan.module,
        "half_lives": [life if math.isfinite(life) else None for life in statistics.half_lives()],
        "errors": statistics.relative_errors(),
        "shares": shares(statistics.errors, statistics.energy, labels),
        "tokens": statistics.tokens,
    }
    static = statistics.static(spec_of(config))
    return {"states": record}, {} if static is None else {f"{block.scan.module}.{SCALE}": static.cpu()}


def chosen_widths(config: DsqConfig, state: RunState, ctx: RunContext) -> dict[str, list[int]] | None:
    """Widths per head by mixer under ``head_bits: auto``, chosen once and kept; None when uniform."""
    if config.head_bits != "auto":
        return None
    path = ctx.stage_dir / "head_bits.json"
    if path.exists():
        kept: dict[str, list[int]] = json.loads(path.read_text())
        return kept
    assert state.packed is not None
    records = [patch.record["states"] for _, patch in state.packed.blocks() if "states" in patch.record]
    errors = [row for record in records for row in record["shares"]]
    chosen = allocate(errors, [1] * len(errors), list(BITS), config.avg_bits)
    found, start = {}, 0
    for record in records:
        stop = start + len(record["shares"])
        found[record["module"]] = chosen[start:stop]
        start = stop
    write_durably(path, json.dumps(found, sort_keys=True).encode())
    return found
