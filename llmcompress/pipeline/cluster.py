"""What a quantizing stage would take on several processes: time, memory and traffic, from measured rates.

A model, not a measurement: work is counted from the layout (:mod:`llmcompress.pipeline.work`), divided as the engine
divides it, and turned into time by rates (:mod:`llmcompress.pipeline.rates`) that ``scripts/measure_cluster_rates.py``
measures on a machine and writes to a file, together with how far predictions were from runs on 1, 2 and 4 processes
there. Torch-free.

What is divided by the number of ranks is the forward passes and the sums of second moments. Solves are dealt out block
by block, so the fullest rank counts; routers are fitted, and blocks written, by the first alone. Exchange is counted as
the engine does it, one message after another: every rank's partial Hessians travel to their owners, codes and grids to
all, inputs of routers that are calibrated to the first. That term grows with the ranks; where it takes over, more of
them do not help.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

from llmcompress.distributed.balance import greedy_bin_packing
from llmcompress.distributed.world import shards_of
from llmcompress.errors import InputError, RecipeError
from llmcompress.models.registry import layout_from_config
from llmcompress.pipeline.device import baseline_ram
from llmcompress.pipeline.estimate import plan_inputs_of
from llmcompress.pipeline.rates import Rates
from llmcompress.pipeline.work import BlockWork, Run, head_width, heads_of, inside, last_projection
from llmcompress.recipe.load import LoadedRecipe
from llmcompress.stages.base import PlanInputs, Stage
from llmcompress.stages.blockwise.estimate import Job, job_of, limits_of
from llmcompress.stages.blockwise.shared_statistics import shared_groups
from llmcompress.stages.gptq import GptqConfig
from llmcompress.stages.rtn import RtnConfig


@dataclass(frozen=True, slots=True)
class ClusterRow:
    """Prediction for one number of processes; seconds and bytes.

    Attributes:
        ranks: Processes.
        read: Time to start and to read the checkpoint, which each process does whole.
        forward: Time of forward passes.
        hessian: Time of ``XᵀX``.
        solve: Time of solves, rounding and packing on the fullest process; of routers' fits and of writing on the
            first.
        exchange: Time of messages.
        ram: Peak of the largest process.
        vram: Likewise on its device.
        traffic: Bytes over all links.
        process_hours: What is paid for.
    """

    ranks: int
    read: float
    forward: float
    hessian: float
    solve: float
    exchange: float
    ram: int
    vram: int
    traffic: int
    process_hours: float

    @property
    def seconds(self) -> float:
        """Time of the stage."""
        return self.read + self.forward + self.hessian + self.solve + self.exchange

    def to_dict(self) -> dict[str, Any]:
        """Plain data for ``--json``."""
        return {**asdict(self), "seconds": self.seconds}


def predict(
    recipe: LoadedRecipe, config: Mapping[str, Any], device: str, ranks: Iterable[int], rates: Rates
) -> dict[str, list[ClusterRow]]:
    """Stage name → a row per number of processes, for every stage whose work can be counted.

    Args:
        recipe: The loaded recipe.
        config: The model's ``config.json``.
        device: ``cpu`` or ``cuda``.
        ranks: Numbers of processes.
        rates: Rates of one process.

    Raises:
        InputError: The family is not supported, or the rates are those of another device.
        RecipeError: A stage does not suit the model, or no stage's work can be counted.
    """
    if rates.device != device:
        raise InputError(
            f"rates measured on {rates.device} ({rates.machine}) say nothing about {device}",
            f"--device {rates.device}, or --rates with a file that scripts/measure_cluster_rates.py wrote there",
        )
    layout = layout_from_config(config)
    recipe.check_layout(layout)
    found = {}
    for stage, inputs in plan_inputs_of(recipe.recipe, config, layout, device):
        if countable(stage):
            around = heads_of(config), recipe.recipe.run.deterministic
            found[stage.name] = [_row(stage, inputs, number, rates, *around) for number in ranks]
    if not found:
        raise RecipeError("the time of no stage of this recipe can be predicted", "that of rtn, gptq and qesc can")
    return found


def countable(stage: Stage) -> bool:
    """Whether a stage's work is counted: it rounds, or solves as GPTQ does, and rates of both were measured."""
    return isinstance(stage.config, RtnConfig | GptqConfig)


def _row(stage: Stage, inputs: PlanInputs, ranks: int, rates: Rates, heads: int, deterministic: bool) -> ClusterRow:
    layout, config = inputs.layout, stage.config
    solving = isinstance(config, GptqConfig)
    job = job_of(config, inputs, solving)
    limits = limits_of(job, inputs)
    windows = -(-inputs.samples // ranks)
    shards = shards_of(inputs.samples, ranks, deterministic)
    run = Run.of(windows, inputs.length, -(-shards // ranks), heads, inputs.device == "cuda")
    router = getattr(config, "router", None)
    outside = sum(prod(view.shape) for view in layout.outside if not view.name.startswith("lm_head."))
    seconds = {
        "read": rates.start + (rates.join if ranks > 1 else 0.0) + outside * inputs.compute_bytes / rates.read,
        "forward": 0.0, "hessian": 0.0, "solve": 0.0, "exchange": 0.0,
    }  # fmt: skip
    traffic = 0.0
    for block in layout.blocks:
        work = BlockWork(block, job, inputs, limits, run, ranks, shards, rates)
        seconds["read"] += work.read()
        seconds["forward"] += work.forward(block is layout.blocks[-1])
        if solving:
            seconds["hessian"] += work.moments()
            seconds["solve"] += _fullest(work, ranks) + work.router(router)
        else:
            seconds["solve"] += work.rounding(config.grid) / ranks
        seconds["solve"] += work.unpacking() + work.write()
        data, messages = work.traffic(router)
        traffic += data
        seconds["exchange"] += data / rates.link + messages * rates.message
    seconds["forward"] += _shared_pass(job, inputs, run, rates)
    own = stage.estimate(replace(inputs, samples=windows))
    return ClusterRow(
        ranks=ranks,
        **seconds,
        ram=baseline_ram(inputs.device) + own.ram,
        vram=own.vram,
        traffic=int(traffic),
        process_hours=ranks * sum(seconds.values()) / 3600,
    )


def _fullest(work: BlockWork, ranks: int) -> float:
    """Time of a block's solves on the fullest rank: linears follow one another, experts are dealt out by chunks."""
    serial, one = work.solves()
    dealt = sum(max(Counter(greedy_bin_packing([1.0] * size, ranks)).values()) for size in work.chunks())
    return serial + dealt * one


def _shared_pass(job: Job, inputs: PlanInputs, run: Run, rates: Rates) -> float:
    """Time of the pass that adds up statistics of weights that several blocks run; the first rank does it alone."""
    if not (job.hessians and job.streams and shared_groups(inputs.layout, job.plan)):
        return 0.0
    everything = Run.of(inputs.samples, inputs.length, 1, run.heads, inputs.device == "cuda")
    found = 0.0
    for block in inputs.layout.blocks:
        for sublayer in block.sublayers:
            passed = inside(sublayer, everything, rates, inputs.layout.hidden)
            passed += last_projection(sublayer, everything, rates)
            found += passed.seconds(rates, inputs.layout.hidden, head_width(block, run.heads))
    return found
