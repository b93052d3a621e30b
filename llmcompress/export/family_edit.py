"""The life of a finished family: add a member, remove one, write one out as a model of its own.

An edit writes new files first and ``family.json`` last, in one step, or the other way round when it takes files away; a
killed edit leaves a family that loads, at worst with a file that nothing names. Other members' weights do not change by
a bit.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from llmcompress.algorithms.residual_tree import TreeOptions, leaf_nodes, leaf_report
from llmcompress.durable import held_alone, write_durably
from llmcompress.errors import EnvironmentProblem, ExportError, InputError, UsageError
from llmcompress.export.base import ShardWriter, atomic_folder, cast, some, write_json
from llmcompress.export.family import member_tensors, save_tensors, whole_tensors, write_member
from llmcompress.models.checkpoint import read_config
from llmcompress.models.family import NAME, mismatches
from llmcompress.models.family_artifact import FAMILY, SHARED, FamilyArtifact, node_file
from llmcompress.models.handle import ModelHandle
from llmcompress.models.member_stream import MemberStream
from llmcompress.models.visitor import DenseVisitor
from llmcompress.models.vocabulary import VocabularyDifference, vocabulary_difference
from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.family import FamilyPlan
from llmcompress.quant.tree import Tree

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.models.layout import LinearGroup


@dataclass(frozen=True, slots=True)
class Added:
    """What adding a member did.

    Attributes:
        member: Its name.
        below: Tree → node under which its leaf hangs.
        error: Mean relative error of its weights.
        new_bytes: Bytes that were added.
        bits: Stored bits per weight and member now.
        vocabulary: How its token ids differ from the first member's, None where they do not.
    """

    member: str
    below: dict[str, str]
    error: float
    new_bytes: int
    bits: float
    vocabulary: VocabularyDifference | None = None


def remove_member(artifact: FamilyArtifact, member: str) -> int:
    """Take a member out of a family; nodes above others stay, since they need them.

    A removal that was killed after its first step is finished by calling it again.

    Returns:
        Bytes that were freed.

    Raises:
        UsageError: It is the last one.
        InputError: There is no such member, nor anything left of one.
        EnvironmentProblem: Another process is editing the family.
    """
    with _alone(artifact) as current:
        return _remove(current, member)


@contextmanager
def _alone(artifact: FamilyArtifact) -> Iterator[FamilyArtifact]:
    """The family as it is now, kept from other edits: of two at once the later one would undo the first.

    Raises:
        EnvironmentProblem: Another process is editing it.
    """
    with held_alone(artifact.folder) as alone:
        if not alone:
            raise EnvironmentProblem(
                f"{artifact.folder}: another process is adding or removing a member",
                "wait for it, then the same command again",
            )
        yield FamilyArtifact(artifact.folder)


def _remove(artifact: FamilyArtifact, member: str) -> int:
    if member not in artifact.members and NAME.match(member) and (artifact.folder / "members" / member).is_dir():
        return sweep(artifact)
    artifact.require(member)
    if len(artifact.members) == 1:
        raise UsageError(f"{member} is the last member of {artifact.folder}", "remove the folder instead")
    facts = {name: value for name, value in artifact.data.get("facts", {}).items() if name != member}
    _save(artifact, artifact.plan.without([member]), facts)
    return sweep(FamilyArtifact(artifact.folder))


def sweep(artifact: FamilyArtifact) -> int:
    """Delete nodes and members that ``family.json`` does not name: what a killed edit has left.

    A member's folder goes last, after its nodes: as long as it is there, a removal can be repeated.

    Returns:
        Bytes that were freed.
    """
    named = {node_file(artifact.folder, node) for node in artifact.plan.node_names()}
    files = [path for path in (artifact.folder / "nodes").iterdir() if path.suffix in (".safetensors", ".part")]
    freed = 0
    for path in sorted(set(files) - named):
        freed += path.stat().st_size
        path.unlink()
    for folder in sorted((artifact.folder / "members").iterdir()):
        if folder.name not in artifact.members and folder.is_dir():
            freed += sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
            shutil.rmtree(folder)
    return freed


def add_member(
    artifact: FamilyArtifact, member: str, source: str | ModelHandle, bits: int, tokens: Tensor | None = None
) -> Added:
    """Add a fine-tune: its leaf below the closest node, and its folder. Of existing files only ``family.json`` changes.

    Args:
        artifact: The family.
        member: Name of the new member.
        source: Its model folder, or the model opened.
        bits: Bits of its leaf, 1 to 6.
        tokens: ``[S, L]`` calibration windows for GPTQ; without them the leaf is rounded to nearest.

    Raises:
        UsageError: The name is taken or unusable.
        InputError: The model is missing, damaged or of another architecture.
        EnvironmentProblem: Another process is editing the family.
    """
    with _alone(artifact) as current:
        return _add(current, member, source, bits, tokens)


def _add(artifact: FamilyArtifact, member: str, source: str | ModelHandle, bits: int, tokens: Tensor | None) -> Added:
    if member in artifact.members or not NAME.match(member) or member in _node_ids(artifact):
        raise UsageError(f"{member!r} cannot be the name of a new member", f"taken: {', '.join(artifact.members)}")
    handle = source if isinstance(source, ModelHandle) else ModelHandle.open(source)
    problems = mismatches(artifact.layout(artifact.members[0]), handle.layout)
    if problems:
        lines = "\n".join(f"{handle.path}: {problem}" for problem in problems)
        raise InputError(lines, "a family needs models of one architecture")
    sweep(artifact)
    below = {key: _closest(artifact, handle, key) for key in artifact.plan.trees}
    solver = _NewLeaf(artifact, handle, below, bits)
    solver.run(tokens)
    plan = artifact.plan
    trees = {key: tree.with_leaf(member, below[key]) for key, tree in plan.trees.items()}
    wider = {name: {**plan.bits[name], member: bits} for name in plan.linears}
    main = trees.get("model") or next(iter(trees.values()))
    larger = FamilyPlan(main.leaves, plan.group_size, trees, plan.tree_of, plan.shapes, wider)
    path = node_file(artifact.folder, member)
    part = path.with_suffix(".part")
    save_tensors(solver.tensors, part)
    part.replace(path)
    folder = artifact.folder / "members" / member
    shutil.rmtree(folder, ignore_errors=True)
    write_member(handle, artifact.outside, _already_shared(artifact, handle), folder)
    _save(artifact, larger, {**artifact.data.get("facts", {}), member: solver.facts()})
    new = sum(file.stat().st_size for file in [path, *folder.rglob("*")] if file.is_file())
    words = vocabulary_difference(artifact.member_folder(artifact.members[0]), handle.tokenizer_path)
    return Added(member, below, solver.facts()["error"], new, larger.linear_bits(), words)


def write_dense_member(artifact: FamilyArtifact, member: str, out: Path) -> None:
    """Write one member as an ordinary dense model folder, weights rebuilt in fp32 and cast to the family's type."""
    merge_members(artifact, {artifact.require(member): 1.0}, out)


def write_native_member(artifact: FamilyArtifact, member: str, out: Path) -> None:
    """Write one member as a family of one: the nodes on its path, bit for bit, and its own folder."""
    artifact.require(member)
    alone = artifact.plan.without([name for name in artifact.members if name != member])
    with atomic_folder(out) as part:
        (part / "nodes").mkdir()
        (part / "members").mkdir()
        for node in alone.node_names():
            shutil.copyfile(node_file(artifact.folder, node), node_file(part, node))
        shutil.copytree(artifact.folder / "members" / member, part / "members" / member)
        for name in (SHARED, "config.json", "provenance.json"):
            if (artifact.folder / name).is_file():
                shutil.copyfile(artifact.folder / name, part / name)
        facts = {key: value for key, value in artifact.data.get("facts", {}).items() if key == member}
        write_json(part / FAMILY, {**artifact.data, "plan": alone.to_dict(), "facts": facts})


def merge_members(artifact: FamilyArtifact, shares: Mapping[str, float], out: Path) -> dict[str, float]:
    """Write the weighted mean of members as one dense model: merging in weight space, from the tree.

    Args:
        artifact: The family.
        shares: Member → share; they are scaled to sum to 1. Config and tokenizer are the first one's.
        out: Folder to create.

    Returns:
        The shares as they were used.

    Raises:
        ExportError: ``out`` exists, a share is no number of 0 or more, the members' embeddings differ in shape or are
            of other tokens, only some have a head of their own, or a value is beyond the family's type.
    """
    names = [artifact.require(name) for name in shares]
    weights = _scaled(shares)
    dtype = artifact.dtype
    first = artifact.member_folder(names[0])
    for name in names[1:]:
        words = vocabulary_difference(first, artifact.member_folder(name))
        if words is not None and words.changed:
            raise ExportError(
                f"{name}: {words} beside {names[0]}: the mean of their embeddings means nothing",
                "merge members of one vocabulary",
            )
    with atomic_folder(out) as part:
        shards = ShardWriter(part)
        private = [dict(artifact.private(name)) for name in names]
        _require_alike(names, private)
        for key, tensor in private[0].items():
            mixed = sum((each[key].float() * weights[name] for each, name in zip(private, names)), torch.zeros(()))
            shards.add(key, (tensor if len(names) == 1 else cast(key, mixed, tensor.dtype)))
        for linear in artifact.plan.linears:
            found = sum((artifact.weight(linear, n) * weights[n] for n in names), torch.zeros(()))
            shards.add(f"{linear}.weight", cast(f"{linear}.weight", found, dtype))
        shards.close()
        config = {k: v for k, v in read_config(first).items() if k != "quantization_config"}
        write_json(part / "config.json", {**config, "dtype": str(dtype).removeprefix("torch.")})
        for file in sorted(first.iterdir()):
            if file.is_file() and file.name != "config.json" and file.suffix != ".safetensors":
                shutil.copyfile(file, part / file.name)
    return weights


def _scaled(shares: Mapping[str, float]) -> dict[str, float]:
    """Shares that sum to 1."""
    for name, share in shares.items():
        if not 0 <= share < math.inf:
            raise ExportError(f"{name}: a share of {share:g}: shares are 0 or more", "for example --member a=0.7")
    total = sum(shares.values())
    if total <= 0:
        raise ExportError("nothing to merge: shares must be positive", "name members, such as --member a --member b")
    return {name: share / total for name, share in shares.items()}


def _require_alike(names: Sequence[str], private: Sequence[Mapping[str, Tensor]]) -> None:
    """Refuse members of which only some have a head of their own, or embeddings of different shapes."""
    first = private[0]
    for name, each in zip(names, private):
        if odd := sorted(each.keys() ^ first.keys()):
            raise ExportError(
                f"{some(odd)}: only one of {names[0]} and {name} has it", "merge members of one structure"
            )
        for key, tensor in each.items():
            if tensor.shape != first[key].shape:
                raise ExportError(f"{key}: members differ in shape", "merge members of one vocabulary")


class _NewLeaf(DenseVisitor):
    """Quantizes what a new member lacks below its node, block by block on its own activations where there are any."""

    def __init__(self, artifact: FamilyArtifact, handle: ModelHandle, below: Mapping[str, str], bits: int) -> None:
        self.artifact, self.handle, self.below, self.bits = artifact, handle, below, bits
        self.options = TreeOptions(artifact.plan.group_size)
        self.stream: MemberStream | None = None
        self.tensors: dict[str, Tensor] = {}
        self.errors: list[float] = []
        self.kept: list[tuple[float, float, float, float]] = []

    def run(self, tokens: Tensor | None) -> None:
        """Quantize all blocks."""
        if tokens is not None:
            self.stream = MemberStream(self.handle, tokens, "cpu", "float32", seed=0)
        for block in self.handle.layout.blocks:
            if self.stream is None:
                for sublayer in block.sublayers:
                    for group in sublayer.groups:
                        self.linears(group, None)
            else:
                self.stream.load(block)
                self.stream.walker.forward(block, self.stream.hidden, self)
                self.stream.free(block)

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """Quantize the new leaf of linears that share an input."""
        hessian = None if gram is None else gram.hessian()[0]
        names = [view.name for view in group.linears]
        weights = [self.handle.checkpoint.tensor(f"{name}.weight").float() for name in names]
        above = [_above(self.artifact, name, self.below[self.artifact.plan.tree_of[name]]) for name in names]
        leaves = leaf_nodes([w - a for w, a in zip(weights, above)], self.bits, self.options, hessian)
        for name, weight, shared, leaf in zip(names, weights, above, leaves):
            rebuilt = shared + leaf.values
            error, _, kept = leaf_report(weight, rebuilt, weight - shared, shared, hessian)
            self.errors.append(error)
            self.kept.append((kept.retention, kept.cosine, kept.signs, kept.size))
            self.tensors |= {f"{name}.{key}": tensor for key, tensor in leaf.packed.tensors.items()}
            if self.stream is not None:
                place = self.stream.model.get_parameter(f"{name}.weight")
                place.data.copy_(rebuilt.to(place))

    def facts(self) -> dict[str, float]:
        """Means over the weights; differences are those to the node the leaf hangs on."""
        columns = [sum(each) / len(each) for each in zip(*self.kept)]
        return {
            "error": sum(self.errors) / len(self.errors),
            **dict(zip(("retention", "cosine", "signs", "delta"), columns)),
        }


def _above(artifact: FamilyArtifact, linear: str, node: str) -> Tensor:
    """Sum of a node and those above it, ``[N, K]`` fp32; zeros where none of them stores this weight."""
    plan = artifact.plan
    below = plan.members_of(linear)
    nodes = [n for n in plan.stored(linear) if below[node] <= below[n] and not plan.tree(linear).is_leaf(
        plan.tree(linear).ids.index(n))]  # fmt: skip
    return (
        delta_tree.reconstruct([artifact.node(n, linear) for n in nodes]) if nodes else torch.zeros(plan.shapes[linear])
    )


def _node_ids(artifact: FamilyArtifact) -> set[str]:
    return {name for tree in artifact.plan.trees.values() for name in tree.ids}


def _closest(artifact: FamilyArtifact, handle: ModelHandle, key: str) -> str:
    """The node above leaves whose path leaves the least of the new model's weights over."""
    plan = artifact.plan
    tree: Tree = plan.trees[key]
    candidates = [tree.ids[p] for p in tree.preorder() if not tree.is_leaf(p)] or [tree.ids[0]]
    left = dict.fromkeys(candidates, 0.0)
    for linear in plan.linears:
        if plan.tree_of[linear] != key:
            continue
        weight = handle.checkpoint.tensor(f"{linear}.weight").float()
        energy = float(weight.square().sum()) or 1.0
        for node in candidates:
            left[node] += float((weight - _above(artifact, linear, node)).square().sum()) / energy
    return min(candidates, key=lambda node: (left[node], node))


def _already_shared(artifact: FamilyArtifact, handle: ModelHandle) -> set[str]:
    """Tensors of a new member that ``shared.safetensors`` holds with the same values."""
    from llmcompress.models.tensor_file import TensorFile

    path = artifact.folder / SHARED
    if not path.is_file():
        return set()
    file = TensorFile(path)
    mine = member_tensors(handle, artifact.outside)
    equal = {name for name, tensor in mine.items() if name in file.entries and torch.equal(file.read(name), tensor)}
    return whole_tensors(equal, mine, artifact.outside)


def _save(artifact: FamilyArtifact, plan: FamilyPlan, facts: Mapping[str, Any]) -> None:
    """Put a new ``family.json`` in place in one step."""
    for problem in plan.problems():
        raise InputError(f"{artifact.folder}: the edit would break the family: {problem}")
    data = {**artifact.data, "plan": plan.to_dict(), "facts": dict(facts)}
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    write_durably(artifact.folder / FAMILY, text.encode())


def summary(artifact: FamilyArtifact) -> list[dict[str, Any]]:
    """One row per member: bits when read alone, bytes of its own, error and what is kept of its difference."""
    rows = []
    for member in artifact.members:
        own = [artifact.folder / "members" / member, node_file(artifact.folder, member)]
        files: Sequence[Path] = [
            p for each in own for p in ([each] if each.is_file() else each.rglob("*")) if p.is_file()
        ]
        facts = artifact.data.get("facts", {}).get(member, {})
        rows.append(
            {"member": member, "path_bits": artifact.plan.path_bits(member),
             "own_bytes": sum(p.stat().st_size for p in files), **facts}
        )  # fmt: skip
    return rows
