"""Top-down residual quantization of one weight of several models along a tree.

Phase 2 of our variant of RQT (Findings of ACL 2025, paper 554; the abstract says "each node optimises its quantization
parameters and hands the residual error to its children", the rest is our choice). With the weight ``W_m [N, K]`` of
model m, and nodes v that stand for sets of models::

    r_m,v = W_m − Σ_{u above v} q_u        what model m still lacks at node v
    q_v   = Q(mean over m in v of r_m,v)   internal node (``hmean``: weighted by second moments)
    q_m   = Q(r_m,m)                       the model's own leaf
    Ŵ_m   = Σ q_v over the path from the root to the leaf

Internal nodes round to nearest with searched scales, leaves use GPTQ with the model's own second moments. GPTQ at an
internal node lowers that node's output error and widens the range the leaf has to cover, which costs more (22 % for
small deltas on synthetic weights, ``tests/paper/test_rqt_build.py``).

Legend: M models, N rows, K columns, G groups per row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from llmcompress.algorithms.gptq import GptqOptions, solve
from llmcompress.algorithms.grids import HALF_MAX, distortion, round_to_nearest
from llmcompress.algorithms.tree_topology import hessian_mean
from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.tree import Tree

Solver = Literal["rtn", "gptq"]
Target = Literal["mean", "hmean", "auto"]

# rounds of coordinate descent after GPTQ; the first two gain most, after eight hardly anything moves
SWEEPS = 4


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """Settings of the build, named as in the recipe.

    Attributes:
        group_size: Columns per scale.
        node_target: What an internal node quantizes: the ``mean`` of its models' residuals, their mean weighted by
            second moments (``hmean``), or the better of the two after the leaves (``auto``).
        internal_solver, leaf_solver: Round to nearest, or GPTQ.
        leaf_scale: ``unbiased`` stretches leaves so that they keep the size of the difference they stand for;
            ``mse`` keeps the scale with the least error, which shrinks it.
        gptq: Settings of GPTQ.
    """

    group_size: int = 128
    node_target: Target = "mean"
    internal_solver: Solver = "rtn"
    leaf_solver: Solver = "gptq"
    leaf_scale: Literal["mse", "unbiased"] = "mse"
    gptq: GptqOptions = field(default_factory=lambda: GptqOptions(act_order="groups", refit=True, sweeps=SWEEPS))


@dataclass(frozen=True, slots=True)
class NodeWeight:
    """One quantized node of one weight.

    Attributes:
        packed: As stored.
        values: ``[N, K]`` fp32, what it stands for.
    """

    packed: PackedWeight
    values: Tensor


def quantize_node(
    target: Tensor,
    bits: int,
    options: TreeOptions,
    solver: Solver,
    hessian: Tensor | None = None,
) -> NodeWeight:
    """Quantize one residual; see :func:`quantize_nodes`."""
    return quantize_nodes([target], bits, options, solver, hessian)[0]


def quantize_nodes(
    targets: Sequence[Tensor],
    bits: int,
    options: TreeOptions,
    solver: Solver,
    hessian: Tensor | None = None,
    stretch: float = 1.0,
) -> list[NodeWeight]:
    """Quantize residuals that share their input, in one solve; each result is what it would be alone.

    Args:
        targets: ``[N_i, K]`` fp32 each.
        bits: 1 to 6.
        options: Group size and GPTQ settings.
        solver: ``rtn`` searches scales for the least squared error; ``gptq`` needs ``hessian``.
        hessian: ``[K, K]``; None, or zeros, rounds to nearest.
        stretch: Multiplies the scales after the codes are chosen.
    """
    spec = delta_tree.node_spec(bits, options.group_size)
    exponents = [exponent_of(target) for target in targets]
    normal = torch.cat([target * 2.0**-e for target, e in zip(targets, exponents)])
    if solver == "gptq" and hessian is not None:
        found = solve(normal[None], hessian[None], spec, options.gptq)
        codes, scale = found.codes[0], found.scale[0]
    else:
        codes, scale, _ = round_to_nearest(normal, spec, options.gptq.grid)
    if stretch != 1.0:
        scale = (scale.to(torch.float32) * stretch).clamp(max=HALF_MAX).to(torch.float16)
    rows = [target.shape[0] for target in targets]
    nodes = []
    for part, grid, exponent in zip(codes.split(rows), scale.split(rows), exponents):
        packed = delta_tree.encode(part, grid, exponent, spec)
        stored = {key: tensor.cpu() for key, tensor in packed.tensors.items()}
        values = delta_tree.dequantize(part, grid, exponent, spec)
        nodes.append(NodeWeight(PackedWeight(packed.shape, spec, stored), values))
    return nodes


def exponent_of(target: Tensor) -> int:
    """The e for which ``max |target| / 2^e`` lies in [1, 2); 0 for zeros."""
    largest = float(target.abs().max()) if target.numel() else 0.0
    if largest == 0.0 or not math.isfinite(largest):
        return 0
    return max(delta_tree.LOWEST, min(delta_tree.HIGHEST, math.floor(math.log2(largest))))


def internal_nodes(
    weights: Mapping[str, Tensor],
    tree: Tree,
    bits: Mapping[str, int],
    options: TreeOptions,
    hessians: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, float] | None = None,
) -> tuple[dict[str, NodeWeight], str]:
    """Quantize the nodes above the leaves.

    Args:
        weights: Model → ``[N, K]`` fp32, unchanged.
        tree: Over the models.
        bits: Node id → bits; 0 or absent means no node.
        options: Settings; ``hmean`` and ``auto`` need ``hessians``, as does GPTQ.
        hessians: Model → ``[K, K]``.
        importance: Model → ω, 1 by default.

    Returns:
        Node id → node, and the target that was used (``mean`` or ``hmean``).
    """
    if options.node_target != "auto" or hessians is None:
        target = "hmean" if options.node_target == "hmean" and hessians is not None else "mean"
        return _descend(weights, tree, bits, options, target, hessians, importance), target
    best: tuple[float, dict[str, NodeWeight], str] | None = None
    for target in ("mean", "hmean"):
        nodes = _descend(weights, tree, bits, options, target, hessians, importance)
        error = 0.0
        for name, weight in weights.items():
            rest = residual(weight, tree, nodes, name)
            leaf_bits = bits.get(name, 0)
            leaf = quantize_node(rest, leaf_bits, options, options.leaf_solver, hessians[name]) if leaf_bits else None
            error += relative_error(weight, rest if leaf is None else rest - leaf.values, hessians[name])
        if best is None or error < best[0]:
            best = error, nodes, target
    assert best is not None
    return best[1], best[2]


def _descend(
    weights: Mapping[str, Tensor],
    tree: Tree,
    bits: Mapping[str, int],
    options: TreeOptions,
    target: str,
    hessians: Mapping[str, Tensor] | None,
    importance: Mapping[str, float] | None,
) -> dict[str, NodeWeight]:
    left = dict(weights)
    found: dict[str, NodeWeight] = {}
    for position in tree.preorder():
        name = tree.ids[position]
        if tree.is_leaf(position) or not bits.get(name, 0):
            continue
        members = sorted(tree.nodes[position])
        stack = torch.stack([left[m] for m in members])
        omega = torch.tensor([(importance or {}).get(m, 1.0) for m in members], dtype=stack.dtype, device=stack.device)
        moment = None
        if hessians is not None:
            moments = torch.stack([hessians[m] for m in members])
            moment = torch.einsum("m,mkl->kl", omega, moments)
        if target == "hmean" and hessians is not None:
            goal, moment = hessian_mean(stack, moments, omega, options.gptq.damp)
        else:
            goal = torch.einsum("m,mnk->nk", omega / omega.sum(), stack)
        node = quantize_node(goal, bits[name], options, options.internal_solver, moment)
        found[name] = node
        for member in members:
            left[member] = left[member] - node.values
    return found


def residual(weight: Tensor, tree: Tree, nodes: Mapping[str, NodeWeight], member: str) -> Tensor:
    """What is left of a model's weight after the nodes above its leaf; ``[N, K]`` fp32."""
    rest = weight
    for position in tree.path(member):
        node = nodes.get(tree.ids[position])
        if node is not None and not tree.is_leaf(position):
            rest = rest - node.values
    return rest


def leaf_nodes(
    rests: Sequence[Tensor], bits: int, options: TreeOptions, hessian: Tensor | None = None
) -> list[NodeWeight]:
    """Quantize a model's own residuals of linears that share their input.

    Args:
        rests: ``[N_i, K]`` each, from :func:`residual`.
        bits: 1 to 6.
        options: Settings.
        hessian: ``[K, K]`` of the model's inputs, None to round to nearest.
    """
    stretch = 1.0
    if options.leaf_scale == "unbiased":
        stretch = 1.0 / (1.0 - distortion(bits, options.group_size))
    return quantize_nodes(rests, bits, options, options.leaf_solver, hessian, stretch)


def build(
    weights: Mapping[str, Tensor],
    tree: Tree,
    bits: Mapping[str, int],
    options: TreeOptions,
    hessians: Mapping[str, Tensor] | None = None,
    importance: Mapping[str, float] | None = None,
) -> dict[str, NodeWeight]:
    """All nodes of one weight: the definition the engine follows. Arguments as in :func:`internal_nodes`."""
    nodes, _ = internal_nodes(weights, tree, bits, options, hessians, importance)
    for name, weight in weights.items():
        if bits.get(name, 0):
            rest = residual(weight, tree, nodes, name)
            moment = None if hessians is None else hessians[name]
            nodes[name] = leaf_nodes([rest], bits[name], options, moment)[0]
    return nodes


def reconstruct(tree: Tree, nodes: Mapping[str, NodeWeight], member: str) -> Tensor:
    """A model's weight: the sum of the nodes on its path, root first, fp32.

    Raises:
        ValueError: No node on the path stores anything.
    """
    on_path = [nodes[tree.ids[p]].values for p in tree.path(member) if tree.ids[p] in nodes]
    if not on_path:
        raise ValueError(f"{member}: no node on its path has bits")
    total = on_path[0].clone()
    for values in on_path[1:]:
        total += values
    return total


def relative_error(weight: Tensor, difference: Tensor, hessian: Tensor | None) -> float:
    """``tr(D H Dᵀ) / tr(W H Wᵀ)``; plain squares without ``hessian``; 0 where the denominator is 0."""
    return _share(float(_inner(difference, difference, hessian)), float(_inner(weight, weight, hessian)))


def _inner(a: Tensor, b: Tensor, hessian: Tensor | None) -> Tensor:
    """``tr(A H Bᵀ)`` in fp64 accumulation, a scalar."""
    through = a if hessian is None else a @ hessian
    return (through.double() * b.double()).sum()


def _share(above: float, below: float) -> float:
    return above / below if below > 0 else 0.0


@dataclass(frozen=True, slots=True)
class DeltaKept:
    """What is left of a fine-tune's difference to its base.

    Attributes:
        retention: ``⟨Δ̂, Δ⟩_H / ‖Δ‖²_H``: 1 when the difference kept its size along itself, 0 when it is lost.
        cosine: ``⟨Δ̂, Δ⟩_H / (‖Δ̂‖_H ‖Δ‖_H)``.
        signs: Share of weights whose difference kept its sign.
        size: ``‖Δ‖²_H / ‖W‖²_H``.
    """

    retention: float
    cosine: float
    signs: float
    size: float


def leaf_report(
    weight: Tensor, rebuilt: Tensor, rest: Tensor, base: Tensor, hessian: Tensor | None
) -> tuple[float, float, DeltaKept]:
    """Relative errors with and without a leaf, and what is left of the difference, with one answer from the device.

    Args:
        weight: ``[N, K]`` of the fine-tune.
        rebuilt: ``[N, K]`` after quantization.
        rest: ``[N, K]``, the weight less the nodes above the leaf.
        base: ``[N, K]`` of the base.
        hessian: ``[K, K]`` or None.

    Returns:
        :func:`relative_error` of ``weight - rebuilt`` and of ``rest``, and what is left of ``weight - base``.
    """
    delta, after = weight - base, rebuilt - base
    left = weight - rebuilt
    pairs = ((left, left), (rest, rest), (weight, weight), (delta, delta), (after, after), (after, delta))
    energies = [_inner(part, other, hessian) for part, other in pairs]
    energies.append((torch.sign(delta) == torch.sign(after)).double().mean())
    error, without, whole, before, now, both, signs = torch.stack(energies).tolist()
    kept = DeltaKept(1.0, 1.0, signs, 0.0)
    if before > 0:
        cosine = both / math.sqrt(before * now) if now > 0 else 0.0
        kept = DeltaKept(both / before, cosine, signs, _share(before, whole))
    return _share(error, whole), _share(without, whole), kept


def member_importance(energies: Sequence[float]) -> list[float]:
    """Weights ω that make errors relative: ``1 / tr(W H Wᵀ)``, scaled to a mean of 1."""
    raw = [1.0 / energy if energy > 0 else 0.0 for energy in energies]
    mean = sum(raw) / len(raw) if raw else 0.0
    return [value / mean if mean > 0 else 1.0 for value in raw]
