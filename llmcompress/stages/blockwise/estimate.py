"""What a quantizing stage needs, from the layout alone. Torch-free.

Memory at the peak of a block: one block, the activation streams, the inputs kept between statistics and
product, and the larger of the solver's working set and a batch's activations. Embedding and head are in memory
only before the first block. Checked against measured peaks in the tests of the engine.

Legend: S sequences, L length, H hidden, N rows, K columns, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from llmcompress.models import sizes
from llmcompress.models.layout import Block, ModelLayout, Sublayer
from llmcompress.models.memory_limits import WINDOW_BYTES, Limits, choose, kept_bytes
from llmcompress.quant.rules import AutoBits, auto_units, resolve
from llmcompress.quant.spec import QuantSpec
from llmcompress.stages.base import Estimate, PlanInputs
from llmcompress.stages.blockwise.rules import plain_rules
from llmcompress.stages.blockwise.shared_statistics import shared_groups
from llmcompress.units import bytes_text

BATCH_TOKENS = 512
CUDA_BATCH_TOKENS = 4096
# K x K matrices alive at once while a factor is computed: sum (of experts), Hessian, reordered copy,
# Cholesky factor, its flip, identity, inverse
SOLVER_SQUARES = 7
# fp32 copies of the weights alive in the column loop: source, transposed work, values, block error, codes
SOLVER_COPIES = 4.5
# on a CPU: bytes of weights that are solved at once (SOLVE_BYTES of algorithms/gptq.py), K x K matrices of theirs (the
# Hessian's root, and its upper half as the column loop reads it), and what is made of all (values, codes)
CPU_TURN, CPU_TURN_SQUARES, CPU_COPIES = 4 << 20, 1.5, 1.25
# bytes per weight of codes, scales and zero points in groups of 16 and more, as rounding leaves them
ROUNDED = 1.2
# batch activations of a sublayer in units of its widest projection; measured, allocator slack included
BATCH_WIDTHS = 6
# rows of one expert run at once, and its activations in units of I: gate and up, activation, product, slack
PIECE = 8192
PIECE_WIDTHS = 6


@dataclass(frozen=True, slots=True)
class Job:
    """What a stage is about to do, read off its config.

    Attributes:
        plan: Plan name → spec.
        hessians: Whether inputs are recorded and solved with.
        targets: Whether weights are fitted to the full-precision stream.
        residuals: Whether the residual stream is kept for that as well.
        streams: Streams of hidden states, 0 to 2.
        tokens: Calibration tokens that flow, 0 without streams.
        cuda: Whether it solves on a GPU.
    """

    plan: Mapping[str, QuantSpec]
    hessians: bool
    targets: bool
    residuals: bool
    streams: int
    tokens: int
    cuda: bool


def job_of(config: Any, inputs: PlanInputs, hessians: bool) -> Job:
    """What a stage's config asks for.

    Args:
        config: The stage's config.
        inputs: Facts about model and calibration set.
        hessians: Whether inputs are recorded and solved with.
    """
    layout = inputs.layout
    router = getattr(config, "router", None)
    two = any(block.bank is not None for block in layout.blocks) and (
        config.type == "router_calibration"
        or bool(getattr(config, "diagnose_experts", False))
        or bool(getattr(router, "calibrate", False))
    )
    aim = getattr(config, "targets", "own") if hessians else "own"
    targets = aim != "own"
    two = two or targets
    flowing = inputs.samples > 0 and (hessians or two)
    return Job(
        plan=resolve(plain_rules(getattr(config, "rules", {})), layout),
        hessians=hessians,
        targets=targets,
        residuals=aim == "residual_stream",
        streams=(2 if two else 1) if flowing else 0,
        tokens=inputs.samples * inputs.length if flowing else 0,
        cuda=inputs.device == "cuda",
    )


def limits_for(config: Any, inputs: PlanInputs, hessians: bool) -> Limits:
    """The limits under which the stage runs; with ``inputs.ram`` the loosest that fit it.

    Args:
        config: The stage's config.
        inputs: Facts about model, calibration set and budget.
        hessians: Whether inputs are recorded and solved with.
    """
    return limits_of(job_of(config, inputs, hessians), inputs)


def limits_of(job: Job, inputs: PlanInputs) -> Limits:
    """:func:`limits_for` a job that was read off already."""
    wanted = _activations(job, inputs)
    return choose(inputs.ram, lambda limits: _peak(job, inputs, limits)[0], wanted)


def estimate_blockwise(config: Any, inputs: PlanInputs, hessians: bool) -> Estimate:
    """Estimate of ``rtn``, ``gptq`` and stages derived from them.

    Args:
        config: The stage's config; ``rules`` and ``diagnose_experts`` are read.
        inputs: Facts about model and calibration set.
        hessians: Whether inputs are recorded and solved with.
    """
    layout, job = inputs.layout, job_of(config, inputs, hessians)
    limits = limits_of(job, inputs)
    ram, vram = _peak(job, inputs, limits)
    flops = max(job.streams, 1) * sizes.forward_flops(layout, job.tokens, inputs.length) if job.tokens else 0.0
    if hessians:
        flops += sizes.hessian_flops(layout, job.plan, job.tokens) + sizes.solve_flops(layout, job.plan)
        flops += _shared_flops(job, inputs) + _measuring_flops(config, job, inputs)
    wanted = _activations(job, inputs)
    spilled = 0 if limits.activations is None else max(0, wanted - limits.activations)
    notes = (f"{bytes_text(spilled)} of activations lie in files while it runs",) if spilled else ()
    return Estimate(
        ram=ram,
        vram=vram,
        disk=sizes.packed_bytes(layout, job.plan) + spilled + _shared_bytes(job, layout),
        flops=flops,
        notes=notes,
        specs=dict(job.plan),
    )


def _peak(job: Job, inputs: PlanInputs, limits: Limits) -> tuple[int, int]:
    """Peak of main memory and of the device."""
    layout, item = inputs.layout, inputs.compute_bytes
    blocks = sizes.largest_block(layout) * item
    if not inputs.exact:
        blocks += max((count for block in layout.blocks for count in _weights(block)), default=0) * inputs.weight_bytes
    # embedding and head are given back before the first block
    outside = sizes.outside_parameters(layout) * item
    packed = max((_block_packed(block, job.plan) for block in layout.blocks), default=0)
    room = limits.activations
    held = _streams(job, layout) * sizes.stream_bytes(layout, inputs.samples, inputs.length, item)
    window = 0
    if room is not None and held > room:
        held, window = room, WINDOW_BYTES
    work = 0
    batch = min(inputs.samples * inputs.length, CUDA_BATCH_TOKENS if inputs.device == "cuda" else BATCH_TOKENS)
    for block in layout.blocks:
        recorded = _recorded(block, job, inputs.samples * inputs.length, item)
        left = None if room is None else room - held
        if left is not None and recorded > left:
            recorded, window = left, WINDOW_BYTES
        left = None if left is None else left - recorded
        work = max(work, recorded + max(_working_sets(block, job, batch, item, limits, left), default=0))
    moving = work + packed + window
    cuda = inputs.device == "cuda"
    # weights that several blocks run: their statistics are added up, all at once, before anything else
    shared = _shared_bytes(job, layout)
    start = sizes.stream_bytes(layout, inputs.samples, inputs.length, item) if shared else 0
    ram = held + max(outside, blocks + (packed if cuda else moving), start + blocks + shared)
    return ram, blocks + max(moving, shared) if cuda else 0


def _streams(job: Job, layout: ModelLayout) -> int:
    """Streams of hidden states that are held; where sublayers lay outputs aside, those and the embedding as well."""
    aside = any(sublayer.writes == "aside" for block in layout.blocks for sublayer in block.sublayers)
    return job.streams + (2 if aside and job.streams else 0)


def _shared_bytes(job: Job, layout: ModelLayout) -> int:
    """Bytes of the statistics of weights that several blocks run."""
    groups = shared_groups(layout, job.plan) if job.hessians and job.streams else {}
    return sum(sizes.group_hessian_bytes(group) for own in groups.values() for group in own)


def _shared_flops(job: Job, inputs: PlanInputs) -> float:
    """Work of adding them up: a pass through the model and the sums of every use."""
    layout = inputs.layout
    groups = shared_groups(layout, job.plan) if job.hessians and job.streams else {}
    if not groups:
        return 0.0
    uses = [*groups, *(block.loan.block for block in layout.blocks if block.loan is not None)]
    widths = [group.linears[0].in_features for use in uses for group in groups.get(use, ())]
    sums = sum(2.0 * job.tokens * width**2 for width in widths)
    return sizes.forward_flops(layout, job.tokens, inputs.length) + sums


def _measuring_flops(config: Any, job: Job, inputs: PlanInputs) -> float:
    """Work of measuring widths under ``auto`` plans: a pass through the model, sums, and an energy for each width."""
    layout, total = inputs.layout, 0.0
    shapes = {name: shape for name, _, shape, _ in layout.quantizable()}
    measured: dict[str, QuantSpec] = {}
    for rule, units in auto_units(plain_rules(getattr(config, "rules", {})), layout).items():
        assert isinstance(rule.bits, AutoBits)
        names = [name for unit in units for name in unit.names]
        measured |= {name: job.plan[name] for name in names}
        # energies come from half of a matrix, one of the weight itself and one of its error at each width
        total += sum((1.0 + len(rule.bits.choices)) * prod(shapes[name]) * shapes[name][-1] for name in names)
    if not measured:
        return 0.0
    passes = sizes.forward_flops(layout, job.tokens, inputs.length)
    return total + passes + sizes.hessian_flops(layout, measured, job.tokens)


def _activations(job: Job, inputs: PlanInputs) -> int:
    """Bytes of activations that the stage holds at once where nothing limits it."""
    item = inputs.compute_bytes
    streams = _streams(job, inputs.layout) * sizes.stream_bytes(inputs.layout, inputs.samples, inputs.length, item)
    inside = [
        (2 * job.tokens * block_hidden(block) * item if block.bank is not None else 0)
        + _recorded(block, job, job.tokens, item)
        for block in inputs.layout.blocks
    ]
    return streams + max(inside, default=0)


def _weights(block: Block) -> Iterator[int]:
    """Sizes of a block's quantizable weights."""
    for linear in block.linears():
        yield linear.out_features * linear.in_features
    bank = block.bank
    if bank is not None:
        yield prod(bank.shape(bank.gate_up))
        yield prod(bank.shape(bank.down))


def _block_packed(block: Block, plan: Mapping[str, QuantSpec]) -> int:
    """Bytes of a block's packed weights, held until the block is written; experts twice while they are joined."""
    joined = dict(plan)
    bank = block.bank
    if bank is not None:
        joined = {name: plan[name] for name in (bank.gate_up, bank.down) if name in plan}
    return sizes.packed_block_bytes(block, plan) + (sizes.packed_block_bytes(block, joined) if bank else 0)


def _recorded(block: Block, job: Job, tokens: int, item: int) -> int:
    """Bytes of what is kept of the full-precision stream in a block, to pair it with the quantized stream."""
    if not job.targets:
        return 0
    bank = block.bank
    routed = bank.hidden if bank is not None and {bank.gate_up, bank.down} & set(job.plan) else 0
    residuals = len(block.sublayers) * block_hidden(block) if job.residuals else 0
    return kept_bytes(tokens * sizes.recorded_width(block, job.plan), item) + tokens * (routed + residuals) * item


def _working_sets(
    block: Block, job: Job, batch_tokens: int, item: int, limits: Limits, room: int | None
) -> Iterator[int]:
    """Peak working set of each step of a block: batch activations, kept inputs, solver."""
    tokens, plan, hessians = job.tokens, job.plan, job.hessians
    for sublayer in block.sublayers:
        shared = 2 * tokens * block_hidden(block) * item if sublayer.experts is not None else 0
        if room is not None and shared > room:
            shared = room + WINDOW_BYTES
        memory = _kept(sublayer, plan, tokens, item, limits) if hessians else 0
        for group in sublayer.groups:
            columns = group.linears[0].in_features
            rows = sum(linear.out_features for linear in group.linears)
            batch = BATCH_WIDTHS * min(tokens, batch_tokens) * max(rows, columns) * item
            planned = any(linear.name in plan for linear in group.linears)
            # what is rounded here is stacked first, in fp32 like its parts
            solver = _solver(1, rows, columns, job, item) + (0 if hessians else 8 * rows * columns)
            yield shared + memory + max(batch, solver if planned else 0)
        bank = sublayer.experts
        if bank is None:
            continue
        if tokens:
            chunk = limits.chunks(bank.num_experts, bank.hidden, bank.intermediate)[0].stop
        else:
            chunk = min(bank.num_experts, max(1, limits.rounded // (bank.hidden * bank.intermediate)))
        routed = tokens * bank.top_k * chunk // bank.num_experts
        kept = routed * bank.intermediate * item if hessians and bank.down in plan else 0
        kept = kept if kept <= limits.keep else 0
        rows_at_once = min(tokens * bank.top_k // bank.num_experts, PIECE)
        yield shared + kept + rows_at_once * (PIECE_WIDTHS * bank.intermediate + bank.hidden) * item
        for name in (bank.gate_up, bank.down):
            if name in plan:
                _, rows, columns = bank.shape(name)
                yield (
                    shared
                    + (kept if name == bank.down else 0)
                    + _solver(chunk, rows, columns, job, item, int(item < 4))
                )


def _kept(sublayer: Sublayer, plan: Mapping[str, QuantSpec], tokens: int, item: int, limits: Limits) -> int:
    """Bytes for the inputs of a module and of its last projection, which overwrite the former as they come."""
    found = []
    for group in sublayer.groups:
        values = tokens * group.linears[0].in_features
        if group.position == "first":
            found.append(values * item)
        elif group.position == "last" and any(linear.name in plan for linear in group.linears):
            found.append(kept_bytes(values, item))
    return max((size for size in found if size <= limits.keep), default=0)


def block_hidden(block: Block) -> int:
    """Width of the hidden states a block works on."""
    bank = block.bank
    return bank.width if bank is not None else next(block.linears()).in_features


def _solver(experts: int, rows: int, columns: int, job: Job, item: int, copied: int = 1) -> int:
    """Bytes that solving a stack of weights takes; ``copied`` counts fp32 copies of the weights themselves."""
    square, weight = columns**2 * 4, rows * columns * 4
    if not job.hessians and not job.cuda:
        # in pieces; what stays of all are codes and grids and, where the block is run, values in its own type
        return int(experts * rows * columns * (ROUNDED + (item if job.tokens else 0)))
    if job.hessians and not job.targets and not job.cuda:
        turn = min(experts, max(1, CPU_TURN // weight))
        # one more Hessian may be at hand, of tokens that rare experts did not see
        squares = experts + (experts > 1) + turn * CPU_TURN_SQUARES
        return int(squares * square + experts * (CPU_COPIES + copied) * weight)
    # fitting to the full-precision stream adds the cross moments and one more copy of the weights
    squares = (SOLVER_SQUARES + job.targets) if job.hessians else 0
    return int(experts * (squares * square + (SOLVER_COPIES + job.targets) * weight))
