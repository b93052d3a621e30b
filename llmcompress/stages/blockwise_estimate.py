"""What a quantizing stage needs, from the layout alone. Torch-free.

Memory at the peak of a block: one block, the activation streams, the inputs kept between statistics and
product, and the larger of the solver's working set and a batch's activations. Embedding and head are in memory
only before the first block. Checked against measured peaks in the tests of the engine.

Legend: S sequences, L length, H hidden, N rows, K columns, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from llmcompress.models import sizes
from llmcompress.models.layout import Block, Sublayer
from llmcompress.quant.rules import resolve
from llmcompress.quant.spec import QuantSpec
from llmcompress.stages.base import Estimate, PlanInputs
from llmcompress.stages.schemes import plain_rules

BATCH_TOKENS = 512
CUDA_BATCH_TOKENS = 4096
KEEP_BYTES = 1 << 30
GRAM_BYTES = 1 << 30
# K x K matrices alive at once while a factor is computed: sum (of experts), Hessian, reordered copy,
# Cholesky factor, its flip, identity, inverse
SOLVER_SQUARES = 7
# fp32 copies of the weights alive in the column loop: source, transposed work, values, block error, codes
SOLVER_COPIES = 4.5
# batch activations of a sublayer in units of its widest projection; measured, allocator slack included
BATCH_WIDTHS = 6
# rows of one expert run at once, and its activations in units of I: gate and up, activation, product, slack
PIECE = 8192
PIECE_WIDTHS = 6


def estimate_blockwise(config: Any, inputs: PlanInputs, hessians: bool) -> Estimate:
    """Estimate of ``rtn``, ``gptq`` and stages derived from them.

    Args:
        config: The stage's config; ``rules`` and ``diagnose_experts`` are read.
        inputs: Facts about model and calibration set.
        hessians: Whether inputs are recorded and solved with.
    """
    layout = inputs.layout
    plan = resolve(plain_rules(getattr(config, "rules", {})), layout)
    item = inputs.compute_bytes
    moe = any(block.bank is not None for block in layout.blocks)
    router = getattr(config, "router", None)
    two = moe and (
        config.type == "router_calibration"
        or bool(getattr(config, "diagnose_experts", False))
        or bool(getattr(router, "calibrate", False))
    )
    targets = hessians and getattr(config, "targets", "own") == "full_precision"
    two = two or targets
    streams = inputs.samples > 0 and (hessians or two)
    stream = sizes.stream_bytes(layout, inputs.samples, inputs.length, item) if streams else 0
    blocks = sizes.largest_block(layout) * item
    if inputs.weight_bytes > item:
        blocks += max((count for block in layout.blocks for count in _weights(block)), default=0) * inputs.weight_bytes
    # embedding and head are given back before the first block
    outside = sizes.outside_parameters(layout) * item
    packed = max((_block_packed(block, plan) for block in layout.blocks), default=0)
    work = 0
    for block in layout.blocks:
        tokens = inputs.samples * inputs.length
        batch = min(tokens, CUDA_BATCH_TOKENS if inputs.device == "cuda" else BATCH_TOKENS)
        sets = _working_sets(block, plan, tokens if streams else 0, batch, item, hessians, targets)
        work = max(work, (_recorded(block, plan, tokens) * item if targets else 0) + max(sets, default=0))
    moving = work + packed
    held = (2 if two else 1) * stream
    cuda = inputs.device == "cuda"
    tokens = inputs.samples * inputs.length if streams else 0
    passes = 2 if two else 1
    flops = passes * sizes.forward_flops(layout, tokens, inputs.length) if tokens else 0.0
    if hessians:
        flops += sizes.hessian_flops(layout, plan, tokens) + sizes.solve_flops(layout, plan)
    disk = sizes.packed_bytes(layout, plan)
    return Estimate(
        ram=held + max(outside, blocks + (packed if cuda else moving)),
        vram=blocks + moving if cuda else 0,
        disk=disk,
        flops=flops,
        specs=dict(plan),
    )


def _weights(block: Block) -> Iterator[int]:
    """Sizes of a block's quantizable weights."""
    for linear in block.linears():
        yield linear.out_features * linear.in_features
    bank = block.bank
    if bank is not None:
        yield bank.num_experts * 2 * bank.intermediate * bank.hidden
        yield bank.num_experts * bank.intermediate * bank.hidden


def _block_packed(block: Block, plan: Mapping[str, QuantSpec]) -> int:
    """Bytes of a block's packed weights, held until the block is written (twice: as tensors and as a file image)."""
    from llmcompress.quant.codecs import codec

    shapes: dict[str, tuple[int, ...]] = {
        linear.name: (linear.out_features, linear.in_features) for linear in block.linears()
    }
    bank = block.bank
    if bank is not None:
        shapes |= {name: bank.shape(name) for name in (bank.gate_up, bank.down)}
    return 2 * sum(codec(plan[n].codec).nbytes(shape, plan[n]) for n, shape in shapes.items() if n in plan)


def _recorded(block: Block, plan: Mapping[str, QuantSpec], tokens: int) -> int:
    """Values of a block's full-precision inputs that are kept to pair them with the quantized stream."""
    groups = [group for sublayer in block.sublayers for group in sublayer.groups]
    wide = sum(g.linears[0].in_features for g in groups if any(linear.name in plan for linear in g.linears))
    bank = block.bank
    routed = bank.hidden if bank is not None and {bank.gate_up, bank.down} & set(plan) else 0
    return tokens * (wide + routed)


def _working_sets(
    block: Block,
    plan: Mapping[str, QuantSpec],
    tokens: int,
    batch_tokens: int,
    item: int,
    hessians: bool,
    targets: bool,
) -> Iterator[int]:
    """Peak working set of each step of a block: batch activations, kept inputs, solver."""
    for sublayer in block.sublayers:
        shared = 2 * tokens * block_hidden(block) * item if sublayer.experts is not None else 0
        memory = _kept(sublayer, plan, tokens, item) if hessians else 0
        for group in sublayer.groups:
            columns = group.linears[0].in_features
            rows = sum(linear.out_features for linear in group.linears)
            batch = BATCH_WIDTHS * min(tokens, batch_tokens) * max(rows, columns) * item
            planned = any(linear.name in plan for linear in group.linears)
            yield shared + memory + max(batch, _solver(1, rows, columns, hessians, targets) if planned else 0)
        bank = sublayer.experts
        if bank is None:
            continue
        one = (bank.hidden**2 + bank.intermediate**2) * 4
        chunk = min(bank.num_experts, max(1, GRAM_BYTES // one)) if hessians else bank.num_experts
        routed = tokens * bank.top_k * chunk // bank.num_experts
        kept = routed * bank.intermediate * item if hessians and bank.down in plan else 0
        kept = kept if kept <= KEEP_BYTES else 0
        rows_at_once = min(tokens * bank.top_k // bank.num_experts, PIECE)
        yield shared + kept + rows_at_once * (PIECE_WIDTHS * bank.intermediate + bank.hidden) * item
        for name in (bank.gate_up, bank.down):
            if name in plan:
                _, rows, columns = bank.shape(name)
                yield shared + (kept if name == bank.down else 0) + _solver(chunk, rows, columns, hessians, targets)


def _kept(sublayer: Sublayer, plan: Mapping[str, QuantSpec], tokens: int, item: int) -> int:
    """Bytes for the inputs of a module and of its last projection, which overwrite the former as they come."""
    sizes_of = [
        tokens * group.linears[0].in_features * item
        for group in sublayer.groups
        if group.position == "first" or (group.position == "last" and any(v.name in plan for v in group.linears))
    ]
    return max((size for size in sizes_of if size <= KEEP_BYTES), default=0)


def block_hidden(block: Block) -> int:
    """Width of the hidden states a block works on."""
    bank = block.bank
    return bank.hidden if bank is not None else next(block.linears()).in_features


def _solver(experts: int, rows: int, columns: int, hessians: bool, targets: bool) -> int:
    # fitting to the full-precision stream adds the cross moments and one more copy of the weights
    squares = (SOLVER_SQUARES + targets) * columns**2 * 4 if hessians else 0
    return int(experts * (squares + (SOLVER_COPIES + targets) * rows * columns * 4))
