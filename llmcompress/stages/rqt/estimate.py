"""What building a residual tree needs, from layouts alone."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from llmcompress.models.memory_limits import GRADIENT_TOKENS, gradient_bytes, resident_bytes
from llmcompress.quant.tree import Tree, by_level, effective_bits
from llmcompress.stages.base import Estimate, PlanInputs
from llmcompress.units import bytes_text

if TYPE_CHECKING:
    from llmcompress.models.layout import Block
    from llmcompress.stages.rqt.stage import RqtConfig


def linear_shapes(inputs: PlanInputs) -> list[tuple[int, int]]:
    """Shapes of the weights in the trees."""
    return [(v.out_features, v.in_features) for block in inputs.layout.blocks for v in block.linears()]


def expected_bits(config: RqtConfig, shapes: list[tuple[int, int]]) -> float:
    """Stored bits per weight and member: the budget, or what the preset comes to for a star."""
    if config.bits.mode == "auto":
        return config.bits.budget
    tree = Tree.star(list(config.members))
    bits = by_level(tree, config.bits.preset)
    total = sum(n * k for n, k in shapes) or 1
    return sum(effective_bits(tree, bits, k, config.group_size) * n * k for n, k in shapes) / total


def estimate_rqt(config: RqtConfig, inputs: PlanInputs) -> Estimate:
    """Peak memory of the heaviest block, disk for the nodes, arithmetic of all passes."""
    layout, members = inputs.layout, len(config.members)
    shapes = linear_shapes(inputs)
    weights = sum(n * k for n, k in shapes)
    samples, length = config.calibration.samples, config.calibration.length
    streams = members * samples * length * (layout.hidden * inputs.compute_bytes + 8) if config.needs_text else 0
    outside = sum(math.prod(view.shape) for view in layout.outside)
    peak = max((_block_bytes(block, config, inputs.compute_bytes) for block in layout.blocks), default=0)
    bits = expected_bits(config, shapes)
    stored = int(bits * weights * members / 8)
    private = members * outside * (1 if config.outside == "int8" else inputs.weight_bytes)
    tokens = samples * length * members
    passes = 1 + (config.tree.similarity == "hessian") + _needs_moments(config)
    flops = 2.0 * tokens * weights * passes + sum(2.0 * tokens * k * k * passes for _, k in shapes)
    dense = members * (weights + outside) * inputs.weight_bytes
    note = (
        f"{members} members, about {bits:.2f} stored bits per weight and member in the trees, "
        f"{bytes_text(stored + private)} in all against {bytes_text(dense)} dense"
    )
    ram, vram = 2 * outside * inputs.compute_bytes + streams + peak, 0
    if inputs.device == "cuda":
        widest = max((k for _, k in shapes), default=0)
        held = resident_bytes(samples * length, layout.hidden, widest, inputs.compute_bytes) if streams else 0
        # a second stream of every member where moments of the unquantized model are needed
        ram, vram = ram - peak, peak + members * held * (1 + _needs_moments(config))
    if config.asks_loss:
        windows = max(1, GRADIENT_TOKENS // length)
        flops += 8.0 * members * windows * length * (weights + layout.vocab * layout.hidden)
        gradients = gradient_bytes(len(layout.blocks), layout.hidden, inputs.compute_bytes, layout.vocab, length)
        block = max((_weight_bytes(block, inputs.compute_bytes) for block in layout.blocks), default=0)
        if inputs.device == "cuda":
            vram = max(vram, gradients + block + outside * inputs.compute_bytes)
        else:
            ram = max(ram, gradients + block + outside * inputs.compute_bytes)
    return Estimate(ram=ram, vram=vram, disk=stored, output=stored + private, flops=flops, notes=(note,))


def _weight_bytes(block: Block, compute: int) -> int:
    """One member's block."""
    return sum(v.out_features * v.in_features for v in block.linears()) * compute


def _needs_moments(config: RqtConfig) -> bool:
    return config.node_target != "mean" or config.internal_solver == "gptq"


def _block_bytes(block: Block, config: RqtConfig, compute: int) -> int:
    """One member's block, the shared nodes in fp32, the members' weights of one matrix, and Hessians."""
    members = len(config.members)
    linears = list(block.linears())
    weights = sum(v.out_features * v.in_features for v in linears)
    largest = max((v.out_features * v.in_features for v in linears), default=0)
    widest = max((v.in_features for v in linears), default=0)
    groups = [group for sublayer in block.sublayers for group in sublayer.groups]
    moments = sum(group.linears[0].in_features ** 2 for group in groups) * 4
    held = moments * (members if _needs_moments(config) else 1)
    inner = weights * 4 * (1 if config.bits.mode == "preset" and config.bits.preset.count("-") == 1 else members - 1)
    return weights * compute + inner + (members + 4) * largest * 4 + held + 4 * widest * widest * 4
