"""Ranks other than 0: they wait for rank 0 to say which stage comes next and work on it or take over what it made.

Rank 0 runs the recipe as a single process would: folder, lock, records, events and report are its own. What it tells is
plain data: how to compute, then stage after stage. Stages that are not distributed are done by rank 0 alone; the others
restore the result from the run folder, which all ranks see.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmcompress.distributed.world import ALONE, World
from llmcompress.errors import GateFailed
from llmcompress.events import Event
from llmcompress.models.heap import keep_freed_memory
from llmcompress.pipeline import device as devices
from llmcompress.stages.base import Stage
from llmcompress.stages.state import RunContext, RunState

if TYPE_CHECKING:
    from llmcompress.pipeline.run_dir import RunRecord

END: dict[str, Any] = {"do": "end"}


def policy(record: RunRecord, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What followers need to know before the first stage."""
    return {
        "do": "begin", "dir": str(Path(recipe["run"]["dir"]).absolute()), "device": record.device,
        "dtype": record.dtype, "threads": record.threads, "seed": int(record.root["run"]["seed"]),
    }  # fmt: skip


def follow(stages: Sequence[Stage], recipe: dict[str, Any], world: World) -> None:
    """Do what rank 0 says until it says end.

    Args:
        stages: The recipe's stages, built.
        recipe: The resolved recipe as plain data.
        world: The ranks.
    """
    said = world.tell()
    if said == END:
        return
    begun = said
    devices.set_threads(begun["threads"] or None)
    devices.make_deterministic()
    keep_freed_memory(sparing=devices.ram_budget(recipe) is not None)
    state = RunState()
    by_name = {stage.name: stage for stage in stages}
    while (said := world.tell()) != END:
        stage = by_name[said["stage"]]
        ctx = _context(stage.name, begun, recipe, world if stage.distributed else ALONE)
        devices.seed_everything(ctx.seed)
        if said["do"] == "run":
            stage.run(state, ctx)
        else:
            # rank 0 has recorded a failed gate already
            with suppress(GateFailed):
                stage.restore(state, ctx)


def _context(name: str, begun: Mapping[str, Any], recipe: dict[str, Any], world: World) -> RunContext:
    root = Path(begun["dir"])
    ram = devices.ram_above_baseline(devices.ram_budget(recipe), begun["device"])
    return RunContext(
        root, name, root / "stages" / name, devices.stage_seed(begun["seed"], name), begun["device"], begun["dtype"],
        recipe, _nothing, ram, world,
    )  # fmt: skip


def _nothing(_event: Event) -> None:
    """Rank 0 alone tells what happens."""
