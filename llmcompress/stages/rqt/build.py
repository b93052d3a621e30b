"""Second pass over a family: quantize the nodes, block by block, each member on its own quantized activations.

Per block: the shared nodes from all members' weights, then member by member its leaves while its activations pass
through. A finished block holds every node and is written durably; after a kill it is read back and only run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from llmcompress.algorithms.gptq import GptqOptions
from llmcompress.algorithms.residual_tree import (
    NodeWeight,
    TreeOptions,
    internal_nodes,
    leaf_nodes,
    leaf_report,
    residual,
)
from llmcompress.errors import InputError
from llmcompress.models.member_stream import MemberStream
from llmcompress.models.visitor import DenseVisitor
from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.family import FamilyPlan, entry
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.store import BlockPatch, PackedStore

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.data.calibration import CalibrationSet
    from llmcompress.models.family import ModelFamily
    from llmcompress.models.layout import Block, LinearGroup, LinearView
    from llmcompress.stages.rqt.stage import RqtConfig
    from llmcompress.stages.state import RunContext


def tree_options(config: RqtConfig) -> TreeOptions:
    """Read the build's settings off a stage config."""
    gptq = GptqOptions(
        config.damp, config.act_order, config.static_groups, 128, "mse", config.refit_scales, config.sweeps
    )
    return TreeOptions(
        config.group_size, config.node_target, config.internal_solver, config.leaf_solver, config.leaf_scale, gptq
    )


class FamilyBuilder:
    """Quantizes a family's blocks that are not finished yet.

    Args:
        config: Settings.
        family: Base and members.
        plan: Trees and bits.
        calibration: Member → windows; empty when no activations are needed.
        store: Where finished blocks go.
        ctx: The run.
    """

    def __init__(
        self,
        config: RqtConfig,
        family: ModelFamily,
        plan: FamilyPlan,
        calibration: Mapping[str, CalibrationSet],
        store: PackedStore,
        ctx: RunContext,
    ) -> None:
        self.config, self.family, self.plan = config, family, plan
        self.calibration, self.store, self.ctx = calibration, store, ctx
        self.options = tree_options(config)
        self.weight = {name: config.members[name].weight for name in family.members if name in config.members}
        self.on_data = config.leaf_solver == "gptq"
        self.moments = config.node_target != "mean" or config.internal_solver == "gptq"

    def run(self) -> None:
        """Quantize what is missing.

        Raises:
            InputError: Weights or activations are not finite.
        """
        blocks = self.family.layout.blocks
        finished = self.store.finished()
        if len(finished) == len(blocks):
            return
        names, ctx = self.family.members, self.ctx
        streams = {name: self._stream(name) for name in names if self.on_data}
        full = {name: self._stream(name) for name in names if self.moments}
        last = max(set(range(len(blocks))) - finished)
        for block in blocks[: last + 1]:
            if not streams and not full and block.index in finished:
                continue
            moments = {n: stream.moments(block, block.index < last) for n, stream in full.items()}
            if block.index in finished:
                self._replay(block, streams)
                continue
            ctx.emit("block_start", index=block.index, total=len(blocks))
            started = time.monotonic()
            patch = self._build(block, streams, moments, block.index < last)
            patch.record["seconds"] = round(time.monotonic() - started, 3)
            self.store.write_block(block.index, patch)
            errors = [e for each in patch.record["members"].values() for e in each["errors"].values()]
            mean = sum(errors) / len(errors) if errors else 0.0
            ctx.emit("block_end", index=block.index, total=len(blocks), seconds=patch.record["seconds"], error=mean)

    def _stream(self, member: str) -> MemberStream:
        ctx = self.ctx
        return MemberStream(
            self.family.members[member], self.calibration[member].tokens, ctx.device, ctx.dtype, ctx.seed
        )

    def _replay(self, block: Block, streams: Mapping[str, MemberStream]) -> None:
        """Run a finished block with its rebuilt weights."""
        patch = self.store.read_block(block.index)
        for member, stream in streams.items():
            stream.load(block)
            for linear in block.linears():
                nodes = [patch.packed[entry(node, linear.name)] for node in self.plan.path(linear.name, member)]
                place = stream.model.get_parameter(f"{linear.name}.weight")
                place.data.copy_(delta_tree.reconstruct(nodes).to(place))
            stream.walker.forward(block, stream.hidden)
            stream.free(block)

    def _build(
        self,
        block: Block,
        streams: Mapping[str, MemberStream],
        moments: Mapping[str, Mapping[str, Tensor]],
        advance: bool,
    ) -> BlockPatch:
        shared: dict[str, dict[str, NodeWeight]] = {}
        packed: dict[str, PackedWeight] = {}
        record: dict[str, Any] = {"members": {}, "targets": {}, "errors": {}}
        for group in _groups(block):
            for linear in group.linears:
                nodes, target = self._shared_nodes(linear, group, moments)
                shared[linear.name], record["targets"][linear.name] = nodes, target
                packed |= {entry(node, linear.name): found.packed for node, found in nodes.items()}
        for member in self.family.members:
            solver = LeafSolver(self, member, shared, streams.get(member))
            if member in streams:
                stream = streams[member]
                stream.load(block)
                stream.walker.forward(block, stream.hidden, solver, advance)
                stream.free(block)
            else:
                for group in _groups(block):
                    solver.linears(group, None)
            packed |= solver.packed
            record["members"][member] = solver.record
            for text in solver.warnings:
                self.ctx.emit("warning", text=text)
        for linear in block.linears():
            values = [each["errors"][linear.name] for each in record["members"].values()]
            record["errors"][linear.name] = sum(values) / len(values)
        return BlockPatch(packed, {}, record)

    def _shared_nodes(
        self, linear: LinearView, group: LinearGroup, moments: Mapping[str, Mapping[str, Tensor]]
    ) -> tuple[dict[str, NodeWeight], str]:
        import torch

        weights = {name: w.to(self.ctx.device) for name, w in self.family.weights(linear.name).items()}
        for name, weight in weights.items():
            if not bool(torch.isfinite(weight).all()):
                raise InputError(f"{name}: {linear.name}.weight contains NaN or infinity", "download the model again")
        first = group.linears[0].name
        hessians = {name: each[first] for name, each in moments.items()} or None
        tree, bits = self.plan.tree(linear.name), self.plan.bits[linear.name]
        return internal_nodes(weights, tree, bits, self.options, hessians, self.weight)


class LeafSolver(DenseVisitor):
    """Visitor of one member's block: quantizes its leaves and puts the rebuilt weights in place.

    Args:
        builder: For plan, options and family.
        member: Which member.
        shared: Weight → node → shared node.
        stream: The member's activations, None without.
    """

    def __init__(
        self,
        builder: FamilyBuilder,
        member: str,
        shared: Mapping[str, Mapping[str, NodeWeight]],
        stream: MemberStream | None,
    ) -> None:
        self.plan, self.options, self.family = builder.plan, builder.options, builder.family
        self.member, self.shared, self.stream, self.device = member, shared, stream, builder.ctx.device
        self.packed: dict[str, PackedWeight] = {}
        self.record: dict[str, dict[str, Any]] = {"errors": {}, "kept": {}}
        self.warnings: list[str] = []

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """Quantize the leaves of linears that share an input; those with equal bits in one solve."""
        hessian = None if gram is None else gram.hessian()[0]
        weights = {linear.name: self._weight(self.member, linear.name) for linear in group.linears}
        rests = {
            name: residual(weight, self.plan.tree(name), self.shared[name], self.member)
            for name, weight in weights.items()
        }
        leaves: dict[str, NodeWeight] = {}
        widths = {name: self.plan.bits[name].get(self.member, 0) for name in weights}
        for bits in sorted(set(widths.values()) - {0}):
            mine = [name for name in weights if widths[name] == bits]
            found = leaf_nodes([rests[name] for name in mine], bits, self.options, hessian)
            leaves |= dict(zip(mine, found))
        for name, weight in weights.items():
            self._finish(name, weight, rests[name], leaves.get(name), hessian)

    def _finish(self, name: str, weight: Tensor, rest: Tensor, leaf: NodeWeight | None, hessian: Tensor | None) -> None:
        """Record errors, keep the node, write the rebuilt weight into the model."""
        nodes = [self.shared[name][node] for node in self.plan.path(name, self.member) if node != self.member]
        if leaf is not None:
            self.packed[entry(self.member, name)] = leaf.packed
            nodes.append(leaf)
        # in the order of delta_tree.reconstruct, so that the next layer sees what a reader of the artifact will
        rebuilt = nodes[0].values.clone()
        for node in nodes[1:]:
            rebuilt += node.values
        error, without, kept = leaf_report(weight, rebuilt, rest, self._base(name), hessian)
        self.record["errors"][name] = error
        if leaf is not None and error > without * (1 + 1e-6):
            self.warnings.append(
                f"{self.member}: {name} is worse with its leaf ({error:.3g}) than without ({without:.3g})"
            )
        self.record["kept"][name] = [kept.retention, kept.cosine, kept.signs, kept.size]
        if self.stream is not None:
            place = self.stream.model.get_parameter(f"{name}.weight")
            place.data.copy_(rebuilt.to(place))

    def _weight(self, member: str, name: str) -> Tensor:
        return self.family.members[member].checkpoint.tensor(f"{name}.weight").to(self.device).float()

    def _base(self, name: str) -> Tensor:
        return self.family.base.checkpoint.tensor(f"{name}.weight").to(self.device).float()


def _groups(block: Block) -> list[LinearGroup]:
    return [group for sublayer in block.sublayers for group in sublayer.groups]
