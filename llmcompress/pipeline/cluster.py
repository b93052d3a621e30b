"""What a quantizing stage would take on several processes: time, memory and traffic, from measured rates.

A model, not a measurement: work is counted from the layout (:mod:`llmcompress.models.sizes`), divided as the engine
divides it, and turned into time by rates that ``scripts/measure_cluster_rates.py`` measures on a machine and writes to
a file, together with how far predictions were from runs on 1, 2 and 4 processes there. Torch-free.

What is divided by the number of ranks is the forward passes and the sums of second moments. Solves are dealt out block
by block, so the fullest rank counts. Exchange is counted as the engine does it, one message after another: every rank's
partial Hessians travel to their owners, codes and grids to all. That term grows with the ranks; where it takes over,
more of them do not help.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from llmcompress.distributed.balance import greedy_bin_packing, solve_cost
from llmcompress.errors import InputError, RecipeError
from llmcompress.models import sizes
from llmcompress.models.layout import Block
from llmcompress.models.registry import layout_from_config
from llmcompress.pipeline.device import baseline_ram
from llmcompress.pipeline.estimate import plan_inputs_of
from llmcompress.recipe.load import LoadedRecipe
from llmcompress.stages.base import PlanInputs, Stage


@dataclass(frozen=True, slots=True)
class Rates:
    """What one process of a machine does per second.

    Attributes:
        machine: Where they were measured.
        forward: Operations per second of forward passes as :mod:`llmcompress.models.sizes` counts them.
        hessian: Likewise of ``XᵀX``.
        solve: Likewise of GPTQ solves.
        weights: Values per second that are rounded, packed and unpacked.
        read: Bytes per second from the checkpoint.
        link: Bytes per second between two processes.
        message: Seconds of a message without content.
        error: Ranks → relative error of the prediction on the run it was checked on.
    """

    machine: str
    forward: float
    hessian: float
    solve: float
    weights: float
    read: float
    link: float
    message: float
    error: dict[str, float]

    @classmethod
    def load(cls, path: Path) -> Rates:
        """Read a file of ``scripts/measure_cluster_rates.py``.

        Raises:
            InputError: It is missing or not such a file.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            found = cls(**{name: data[name] for name in cls.__slots__})
            if not all(getattr(found, name) > 0 for name in cls.__slots__ if name not in ("machine", "error")):
                raise ValueError("a rate is not positive")
            return found
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: no file of rates ({error})", "python scripts/measure_cluster_rates.py --out rates.json"
            ) from error


@dataclass(frozen=True, slots=True)
class ClusterRow:
    """Prediction for one number of processes; seconds and bytes.

    Attributes:
        ranks: Processes.
        read: Time to read the checkpoint.
        forward: Time of forward passes.
        hessian: Time of ``XᵀX``.
        solve: Time of solves, rounding and packing on the fullest process.
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
    """Stage name → a row per number of processes, for every stage that runs on several.

    Args:
        recipe: The loaded recipe.
        config: The model's ``config.json``.
        device: ``cpu`` or ``cuda``.
        ranks: Numbers of processes.
        rates: Of one process.

    Raises:
        InputError: The family is not supported.
        RecipeError: A stage does not suit the model, or none runs on several processes.
    """
    layout = layout_from_config(config)
    recipe.check_layout(layout)
    found = {}
    for stage, inputs in plan_inputs_of(recipe.recipe, config, layout, device):
        if stage.distributed:
            found[stage.name] = [_row(stage, inputs, number, rates) for number in ranks]
    if not found:
        raise RecipeError("no stage of this recipe runs on several processes", "rtn, gptq and qesc do")
    return found


def _row(stage: Stage, inputs: PlanInputs, ranks: int, rates: Rates) -> ClusterRow:
    layout = inputs.layout
    whole = stage.estimate(inputs)
    plan, tokens = whole.specs, inputs.samples * inputs.length
    solving = stage.config.type != "rtn"
    hessian = sizes.hessian_flops(layout, plan, tokens) if solving else 0.0
    solve = sizes.solve_flops(layout, plan) if solving else 0.0
    forward = max(0.0, whole.flops - hessian - solve)
    own = replace(inputs, samples=-(-inputs.samples // ranks))
    part = stage.estimate(own)
    slowest = sum(max(_loads(block, plan, ranks), default=0.0) for block in layout.blocks) if solving else 0.0
    rounded = sizes.quantized_parameters(layout, plan) / rates.weights
    matrices = [matrix for block in layout.blocks for matrix in _hessians(block, plan)]
    sums = sum(number * width**2 * sizes.HESSIAN_BYTES for number, width in matrices) if solving else 0
    traffic = (ranks - 1) * (sums + sizes.packed_bytes(layout, plan))
    messages = (ranks - 1) * sum(number for number, _ in matrices)
    seconds = {
        "read": sizes.model_bytes(layout, {}, inputs.weight_bytes) / rates.read,
        "forward": forward / ranks / rates.forward,
        "hessian": hessian / ranks / rates.hessian,
        "solve": slowest / rates.solve + rounded / ranks,
        "exchange": traffic / rates.link + messages * rates.message,
    }
    return ClusterRow(
        ranks=ranks,
        **seconds,
        ram=baseline_ram(inputs.device) + part.ram,
        vram=part.vram,
        traffic=int(traffic),
        process_hours=ranks * sum(seconds.values()) / 3600,
    )


def _hessians(block: Block, plan: Mapping[str, Any]) -> Iterable[tuple[int, int]]:
    """How many Hessians of which width a block has."""
    for sublayer in block.sublayers:
        for group in sublayer.groups:
            if any(linear.name in plan for linear in group.linears):
                yield 1, group.linears[0].in_features
    bank = block.bank
    for name in (bank.gate_up, bank.down) if bank is not None else ():
        if bank is not None and name in plan:
            experts, _, columns = bank.shape(name)
            yield experts, columns


def _loads(block: Block, plan: Mapping[str, Any], ranks: int) -> list[float]:
    """Solver work of a block on each rank, experts dealt out as the engine does."""
    loads = [0.0] * ranks
    # linears follow one another: they cost everyone their full time
    serial = 0.0
    for sublayer in block.sublayers:
        for group in sublayer.groups:
            rows = sum(linear.out_features for linear in group.linears if linear.name in plan)
            serial += solve_cost(rows, group.linears[0].in_features) if rows else 0.0
    bank = block.bank
    for name in (bank.gate_up, bank.down) if bank is not None else ():
        if bank is not None and name in plan:
            experts, rows, columns = bank.shape(name)
            costs = [solve_cost(rows, columns)] * experts
            for cost, owner in zip(costs, greedy_bin_packing(costs, ranks)):
                loads[owner] += cost
    return [load + serial for load in loads]
