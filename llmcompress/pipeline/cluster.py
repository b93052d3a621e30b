"""What a quantizing stage would take on several processes: time, memory and traffic, from measured rates.

A model, not a measurement: work is counted from the layout (:mod:`llmcompress.models.sizes`), divided as the engine
divides it, and turned into time by rates that ``scripts/measure_cluster_rates.py`` measures on a machine and writes to
a file, together with how far predictions were from runs on 1, 2 and 4 processes there. A file that was measured on the
kind of CPU it names comes with the package. Torch-free.

Rates of matrix work depend on its size: a product or a factorization of a small matrix is far from what the processor
can do. They are measured at several widths and interpolated; beyond the largest they stay as they are there.

What is divided by the number of ranks is the forward passes and the sums of second moments. Solves are dealt out block
by block, so the fullest rank counts. Exchange is counted as the engine does it, one message after another: every rank's
partial Hessians travel to their owners, codes and grids to all, inputs of routers that are calibrated to the first.
That term grows with the ranks; where it takes over, more of them do not help.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Any

from llmcompress.distributed.balance import greedy_bin_packing, solve_cost
from llmcompress.errors import InputError, RecipeError
from llmcompress.models import sizes
from llmcompress.models.layout import Block, ExpertBank
from llmcompress.models.registry import layout_from_config
from llmcompress.pipeline.device import baseline_ram
from llmcompress.pipeline.estimate import plan_inputs_of
from llmcompress.recipe.load import LoadedRecipe
from llmcompress.stages.base import PlanInputs, Stage

SHIPPED = Path(__file__).with_name("cluster_rates.json")
Curve = tuple[tuple[float, float], ...]


def rate_at(curve: Curve, width: float) -> float:
    """Operations per second at a width, linear in the logarithms between measured widths, constant outside them."""
    points = sorted(curve)
    if width <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in pairwise(points):
        if width <= high:
            share = log(width / low) / log(high / low)
            return float(slow ** (1 - share) * fast**share)
    return points[-1][1]


@dataclass(frozen=True, slots=True)
class Rates:
    """What one process of a machine does per second.

    Attributes:
        machine: Where they were measured.
        device: What computed, ``cpu`` or ``cuda``.
        forward: Hidden size → operations per second of forward passes as :mod:`llmcompress.models.sizes` counts them.
        hessian: Columns → likewise of ``XᵀX``.
        solve: Columns → likewise of GPTQ solves.
        weights: Values per second that are rounded, packed and unpacked.
        read: Bytes per second from the checkpoint.
        link: Bytes per second between two processes.
        message: Seconds of a message without content.
        start: Seconds from a stage's start to its first block: the model's code is imported, empty modules are built.
        join: Seconds that the other processes take longer than the first, which has run stages before.
        error: What the prediction was checked on → its relative error in time.
    """

    machine: str
    device: str
    forward: Curve
    hessian: Curve
    solve: Curve
    weights: float
    read: float
    link: float
    message: float
    start: float
    join: float
    error: dict[str, float]

    @classmethod
    def load(cls, path: Path | None = None) -> Rates:
        """Read a file of ``scripts/measure_cluster_rates.py``; without a path the one that comes with the package.

        Raises:
            InputError: It is missing or not such a file.
        """
        path = SHIPPED if path is None else path
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            values = {name: data[name] for name in cls.__slots__}
            for name in ("forward", "hessian", "solve"):
                values[name] = tuple((float(width), float(rate)) for width, rate in values[name])
                if not values[name] or min(min(point) for point in values[name]) <= 0:
                    raise ValueError(f"{name} has no positive rates")
            for name in ("weights", "read", "link", "message", "start", "join"):
                if not values[name] > 0:
                    raise ValueError(f"{name} is not positive")
            if values["device"] not in ("cpu", "cuda"):
                raise ValueError("device must be cpu or cuda")
            return cls(**values)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: no file of rates ({error})", "python scripts/measure_cluster_rates.py --out rates.json"
            ) from error


@dataclass(frozen=True, slots=True)
class ClusterRow:
    """Prediction for one number of processes; seconds and bytes.

    Attributes:
        ranks: Processes.
        read: Time to start and to read the checkpoint.
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
        InputError: The family is not supported, or the rates are those of another device.
        RecipeError: A stage does not suit the model, or none runs on several processes.
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
    forward = whole.flops
    hessian = slowest = sums = messages = 0.0
    if solving:
        forward = max(0.0, whole.flops - sizes.hessian_flops(layout, plan, tokens) - sizes.solve_flops(layout, plan))
        hessian = sum(_sum_seconds(block, plan, tokens, rates) for block in layout.blocks)
        slowest = sum(max(_loads(block, plan, ranks, rates), default=0.0) for block in layout.blocks)
        matrices = [matrix for block in layout.blocks for matrix in _hessians(block, plan)]
        sums = sum(number * width**2 * sizes.HESSIAN_BYTES for number, width in matrices)
        messages = (ranks - 1) * sum(number for number, _ in matrices)
    own = stage.estimate(replace(inputs, samples=-(-inputs.samples // ranks)))
    rounded = sizes.quantized_parameters(layout, plan) / rates.weights
    traffic = (ranks - 1) * (sums + sizes.packed_bytes(layout, plan) + _router_inputs(stage, inputs) / ranks)
    seconds = {
        "read": rates.start
        + (rates.join if ranks > 1 else 0.0)
        + sizes.model_bytes(layout, {}, inputs.weight_bytes) / rates.read,
        "forward": forward / ranks / rate_at(rates.forward, layout.hidden),
        "hessian": hessian / ranks,
        "solve": slowest + rounded / ranks + _router_seconds(stage, inputs, rates),
        "exchange": traffic / rates.link + messages * rates.message,
    }
    return ClusterRow(
        ranks=ranks,
        **seconds,
        ram=baseline_ram(inputs.device) + own.ram,
        vram=own.vram,
        traffic=int(traffic),
        process_hours=ranks * sum(seconds.values()) / 3600,
    )


def _router_seconds(stage: Stage, inputs: PlanInputs, rates: Rates) -> float:
    """Time to fit all routers that a stage calibrates, which the first rank does alone, on every token.

    A token counts for the K experts of highest score, whose number is measured where the recipe says ``auto``; four
    times as many as are chosen is assumed then. Each expert has moments and a factor of its own, unless K covers all.
    """
    router = getattr(stage.config, "router", None)
    if not getattr(router, "calibrate", False):
        return 0.0
    tokens, hidden = inputs.samples * inputs.length, inputs.layout.hidden
    work = 0.0
    for bank in (block.bank for block in inputs.layout.blocks if block.bank is not None):
        asked = getattr(router, "k", None)
        considered = min(bank.num_experts, asked if isinstance(asked, int) else 4 * bank.top_k)
        apart = considered < bank.num_experts
        work += 2.0 * tokens * (considered if apart else 1) * hidden**2
        work += (bank.num_experts if apart else 1) * hidden**3 / 3
    return work / rate_at(rates.forward, hidden)


def _router_inputs(stage: Stage, inputs: PlanInputs) -> float:
    """Bytes of the inputs of all routers that a stage calibrates; the first rank sees every token's."""
    if not getattr(getattr(stage.config, "router", None), "calibrate", False):
        return 0.0
    banks = sum(block.bank is not None for block in inputs.layout.blocks)
    return float(banks * sizes.stream_bytes(inputs.layout, inputs.samples, inputs.length, inputs.compute_bytes))


def _groups(block: Block, plan: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Rows that are solved and columns, of each group of linears that share an input."""
    for sublayer in block.sublayers:
        for group in sublayer.groups:
            rows = sum(linear.out_features for linear in group.linears if linear.name in plan)
            if rows:
                yield rows, group.linears[0].in_features


def _experts(block: Block, plan: Mapping[str, Any]) -> Iterator[tuple[ExpertBank, int, int, int]]:
    """The bank with experts, rows and columns of each of its projections that is solved."""
    bank = block.bank
    for name in (bank.gate_up, bank.down) if bank is not None else ():
        if bank is not None and name in plan:
            yield bank, *bank.shape(name)


def _hessians(block: Block, plan: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """How many Hessians of which width a block has."""
    yield from ((1, columns) for _, columns in _groups(block, plan))
    yield from ((experts, columns) for _, experts, _, columns in _experts(block, plan))


def _sum_seconds(block: Block, plan: Mapping[str, Any], tokens: int, rates: Rates) -> float:
    """Time of one process to sum the second moments of all tokens; experts share these by top-k."""
    work = [(tokens, columns) for _, columns in _groups(block, plan)]
    work += [(tokens * bank.top_k, columns) for bank, _, _, columns in _experts(block, plan)]
    return sum(2.0 * seen * columns**2 / rate_at(rates.hessian, columns) for seen, columns in work)


def _loads(block: Block, plan: Mapping[str, Any], ranks: int, rates: Rates) -> list[float]:
    """Time of a block's solves on each rank, experts dealt out as the engine does."""
    loads = [0.0] * ranks
    # linears follow one another: they cost everyone their full time
    serial = sum(solve_cost(rows, columns) / rate_at(rates.solve, columns) for rows, columns in _groups(block, plan))
    for _, experts, rows, columns in _experts(block, plan):
        cost = solve_cost(rows, columns) / rate_at(rates.solve, columns)
        for owner in greedy_bin_packing([cost] * experts, ranks):
            loads[owner] += cost
    return [load + serial for load in loads]
