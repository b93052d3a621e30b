"""FamilyPlan: which node of which tree stores how many bits of which weight. Torch-free, JSON on disk."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from llmcompress.errors import InputError
from llmcompress.quant.codecs import delta_tree
from llmcompress.quant.tree import Tree

VERSION = 1
SEPARATOR = "|"


@dataclass(frozen=True)
class FamilyPlan:
    """The tree or trees of a family and the bits of their nodes.

    Attributes:
        order: Models, depth first in the family's main tree; batches are sorted by it.
        group_size: Columns per scale.
        trees: Key → tree: ``model``, a block's name, or a weight's name, by scope.
        tree_of: Weight → key of its tree.
        shapes: Weight → ``(N, K)``.
        bits: Weight → node id → bits; nodes of 0 bits are absent.
    """

    order: tuple[str, ...]
    group_size: int
    trees: Mapping[str, Tree]
    tree_of: Mapping[str, str]
    shapes: Mapping[str, tuple[int, int]]
    bits: Mapping[str, Mapping[str, int]]

    @property
    def linears(self) -> tuple[str, ...]:
        """Weights in the family's trees."""
        return tuple(self.shapes)

    def tree(self, linear: str) -> Tree:
        """Tree of a weight."""
        return self.trees[self.tree_of[linear]]

    @cached_property
    def _below(self) -> dict[str, dict[str, frozenset[str]]]:
        return {key: dict(zip(tree.ids, tree.nodes)) for key, tree in self.trees.items()}

    def members_of(self, linear: str) -> Mapping[str, frozenset[str]]:
        """Node id → models below it, in a weight's tree: a model that was added hangs on other nodes in other trees,
        and nodes keep their names.
        """
        return self._below[self.tree_of[linear]]

    def stored(self, linear: str) -> list[str]:
        """Nodes that store something of a weight, parents before children."""
        bits = self.bits[linear]
        return [name for name in self.tree(linear).ids if bits.get(name, 0) > 0]

    def path(self, linear: str, member: str) -> list[str]:
        """Nodes whose sum is a model's weight, root first.

        Raises:
            InputError: There is no such model.
        """
        if member not in self.order:
            raise InputError(f"no member {member!r} in this family", f"choose one of {', '.join(self.order)}")
        below = self.members_of(linear)
        return [name for name in self.stored(linear) if member in below[name]]

    def node_names(self) -> list[str]:
        """Every node that stores something of any weight, large sets of models first."""
        found: dict[str, int] = {}
        for linear in self.linears:
            below = self.members_of(linear)
            for name in self.stored(linear):
                found[name] = max(found.get(name, 0), len(below[name]))
        return sorted(found, key=lambda name: (-found[name], name))

    def node_bytes(self, node: str) -> int:
        """Bytes of one node's tensors over all weights."""
        total = 0
        for linear, shape in self.shapes.items():
            bits = self.bits[linear].get(node, 0)
            if bits:
                total += delta_tree.nbytes(shape, delta_tree.node_spec(bits, self.group_size))
        return total

    @property
    def weights(self) -> int:
        """Weights of one model in the trees."""
        return sum(rows * columns for rows, columns in self.shapes.values())

    def linear_bits(self) -> float:
        """Stored bits per weight and model: codes, scales and exponents of all nodes."""
        total = sum(self.node_bytes(node) for node in self.node_names())
        return 8 * total / (self.weights * len(self.order))

    def path_bits(self, member: str) -> float:
        """Bits per weight that reading one model alone takes."""
        total = 0
        for linear, shape in self.shapes.items():
            for node in self.path(linear, member):
                total += delta_tree.nbytes(shape, delta_tree.node_spec(self.bits[linear][node], self.group_size))
        return 8 * total / self.weights

    def mean_bits(self, node: str) -> float:
        """Average code bits of one node over all weights."""
        return sum(self.bits[name].get(node, 0) * n * k for name, (n, k) in self.shapes.items()) / self.weights

    def without(self, members: Collection[str]) -> FamilyPlan:
        """The plan without some models; nodes above others keep their names and bits.

        Raises:
            ValueError: No model is left.
        """
        trees = dict(self.trees)
        for member in members:
            trees = {key: tree.without(member) for key, tree in trees.items()}
        # a node may be gone from one tree and stay in another
        kept = {name: set(trees[key].ids) for name, key in self.tree_of.items()}
        bits = {n: {node: b for node, b in chosen.items() if node in kept[n]} for n, chosen in self.bits.items()}
        return replace(self, order=tuple(n for n in self.order if n not in members), trees=trees, bits=bits)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, inverse of :meth:`from_dict`."""
        return {
            "version": VERSION,
            "order": list(self.order),
            "group_size": self.group_size,
            "trees": {key: tree.to_dict() for key, tree in sorted(self.trees.items())},
            "weights": {
                name: {"tree": self.tree_of[name], "shape": list(shape), "bits": dict(sorted(self.bits[name].items()))}
                for name, shape in sorted(self.shapes.items())
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str) -> FamilyPlan:
        """Rebuild from :meth:`to_dict` output.

        Args:
            data: As read.
            where: File it came from, for messages.

        Raises:
            InputError: A newer version, or malformed content.
        """
        version = data.get("version") if isinstance(data, Mapping) else None
        if not isinstance(version, int) or version > VERSION:
            raise InputError(f"{where}: version {version!r}; this release reads up to {VERSION}", "upgrade llmcompress")
        try:
            trees = {str(key): Tree.from_dict(tree) for key, tree in data["trees"].items()}
            weights: Mapping[str, Any] = data["weights"]
            plan = cls(
                tuple(map(str, data["order"])),
                int(data["group_size"]),
                trees,
                {name: str(entry["tree"]) for name, entry in weights.items()},
                {name: (int(entry["shape"][0]), int(entry["shape"][1])) for name, entry in weights.items()},
                {name: {str(n): int(b) for n, b in entry["bits"].items()} for name, entry in weights.items()},
            )
            for problem in plan.problems():
                raise ValueError(problem)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"{where}: malformed: {error}", "export the family again") from error
        return plan

    def problems(self) -> Iterator[str]:
        """What contradicts itself: unknown trees and nodes, members without a leaf, paths without any node."""
        for key, tree in self.trees.items():
            if frozenset(tree.leaves) != frozenset(self.order):
                yield f"tree {key} is not over the family's members"
        for linear in self.linears:
            above = self.trees.get(self.tree_of[linear])
            if above is None:
                yield f"{linear}: no tree {self.tree_of[linear]!r}"
                continue
            unknown = set(self.bits[linear]) - set(above.ids)
            if unknown:
                yield f"{linear}: no node {min(unknown)!r} in its tree"
            for member in self.order:
                if not self.path(linear, member):
                    yield f"{linear}: nothing is stored for {member}"


def entry(node: str, linear: str) -> str:
    """Name of one node's residual of one weight inside a store."""
    return f"{node}{SEPARATOR}{linear}"
