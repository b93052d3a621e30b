"""Tree: which models share which residuals. Torch-free.

A node is the set of models below it. Every internal node has two children, so M models make 2M-1 nodes; a
tree with more children per node, a star or a forest is the same tree with nodes of zero bits.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

ROOT = "root"
LONGEST_ID = 60

Members = frozenset[str]


def node_id(members: Members, total: int) -> str:
    """Name of a node, usable as a file name: ``root``, the member itself, or the members joined by ``+``.

    Args:
        members: Models below the node.
        total: Number of models in the family.
    """
    if len(members) == total and total > 1:
        return ROOT
    text = "+".join(sorted(members))
    if len(text) <= LONGEST_ID:
        return text
    return f"{min(members)}+{len(members) - 1}-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Tree:
    """A binary tree over models.

    Attributes:
        leaves: The models, depth first; models below any node are neighbours in this order.
        nodes: Models below each node, pre-order, the root first.
        parents: Position of each node's parent, None for the root.
        named: Names of the nodes where they are not those of :func:`node_id`: a node keeps its name when models
            are added to a family or removed from it.

    The order is canonical (of two children the one with the alphabetically first model comes first), so that it does
    not depend on the order in which models were named.
    """

    leaves: tuple[str, ...]
    nodes: tuple[Members, ...]
    parents: tuple[int | None, ...]
    named: tuple[str, ...] | None = None

    @classmethod
    def of(cls, names: Sequence[str], merges: Sequence[tuple[Members, Members]]) -> Tree:
        """Build from merges, each joining two sets that exist by then.

        Args:
            names: The models.
            merges: M-1 pairs.

        Raises:
            ValueError: The merges do not make one binary tree over the models.
        """
        children: dict[Members, tuple[Members, Members]] = {}
        open_sets = {frozenset([name]) for name in names}
        if len(open_sets) != len(names) or not names:
            raise ValueError("models need distinct names")
        for left, right in merges:
            if left not in open_sets or right not in open_sets or left == right:
                raise ValueError(f"cannot merge {sorted(left)} and {sorted(right)}")
            open_sets -= {left, right}
            open_sets.add(left | right)
            first, second = sorted((left, right), key=min)
            children[left | right] = (first, second)
        if len(open_sets) != 1:
            raise ValueError(f"{len(merges)} merges do not join {len(names)} models")
        nodes: list[Members] = []
        parents: list[int | None] = []

        def visit(node: Members, parent: int | None) -> None:
            position = len(nodes)
            nodes.append(node)
            parents.append(parent)
            for child in children.get(node, ()):
                visit(child, position)

        visit(frozenset(names), None)
        leaves = tuple(next(iter(node)) for node in nodes if len(node) == 1)
        return cls(leaves, tuple(nodes), tuple(parents))

    @classmethod
    def star(cls, names: Sequence[str]) -> Tree:
        """A chain of merges in alphabetical order; with bits at the root and the leaves only, it is a star."""
        ordered, merges, seen = sorted(names), [], frozenset[str]()
        for name in ordered:
            if seen:
                merges.append((seen, frozenset([name])))
            seen |= {name}
        return cls.of(ordered, merges)

    @cached_property
    def ids(self) -> tuple[str, ...]:
        """Names of the nodes, pre-order."""
        return self.named or tuple(node_id(node, len(self.leaves)) for node in self.nodes)

    @cached_property
    def children(self) -> tuple[tuple[int, ...], ...]:
        """Positions of each node's children, none for a leaf."""
        found: list[list[int]] = [[] for _ in self.nodes]
        for position, parent in enumerate(self.parents):
            if parent is not None:
                found[parent].append(position)
        return tuple(tuple(each) for each in found)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """Depth of each node, 0 for the root."""
        found: list[int] = []
        for parent in self.parents:
            found.append(0 if parent is None else found[parent] + 1)
        return tuple(found)

    def is_leaf(self, position: int) -> bool:
        """Whether a node is a model."""
        return not self.children[position]

    def path(self, member: str) -> tuple[int, ...]:
        """Positions of the nodes from the root down to a model.

        Raises:
            KeyError: There is no such model.
        """
        if member not in self.leaves:
            raise KeyError(member)
        return tuple(p for p, node in enumerate(self.nodes) if member in node)

    def preorder(self) -> Iterator[int]:
        """Positions, parents before children."""
        return iter(range(len(self.nodes)))

    def without(self, member: str) -> Tree:
        """The tree without one model; nodes keep their names, and one that is left with a single child stays.

        Raises:
            ValueError: It is the last model.
        """
        if len(self.leaves) == 1:
            raise ValueError(f"{member} is the last model")
        # a chain of nodes above nothing but this model goes with it
        kept = [p for p in self.preorder() if self.nodes[p] != {member}]
        return self._relabelled(kept, {p: self.nodes[p] - {member} for p in kept})

    def with_leaf(self, member: str, below: str) -> Tree:
        """The tree with one more model directly below the node called ``below``.

        Raises:
            ValueError: There is no such node, or it is a model.
        """
        if below not in self.ids or self.is_leaf(self.ids.index(below)) or member in self.ids:
            raise ValueError(f"{member} cannot be put below {below}")
        place = self.ids.index(below)
        own = self.nodes[place]
        sets = [node | {member} if p <= place and node >= own else node for p, node in enumerate(self.nodes)]
        # last among its siblings: pre-order puts it behind everything below the same node
        last = max(p for p, node in enumerate(self.nodes) if p >= place and node <= own)
        parents, ids = [_moved(parent, last) for parent in self.parents], list(self.ids)
        sets.insert(last + 1, frozenset({member}))
        ids.insert(last + 1, member)
        parents.insert(last + 1, place)
        wider = Tree(self.leaves, tuple(sets), tuple(parents), tuple(ids))
        return wider._relabelled(list(wider.preorder()), dict(enumerate(wider.nodes)))

    def _relabelled(self, kept: Sequence[int], nodes: Mapping[int, Members]) -> Tree:
        """Part of this tree with other models below its nodes, names as they are."""
        place = {old: new for new, old in enumerate(kept)}
        parents = tuple(None if (above := self.parents[p]) is None else place[above] for p in kept)
        has_child = {parent for parent in parents if parent is not None}
        leaves = tuple(next(iter(nodes[p])) for new, p in enumerate(kept) if new not in has_child)
        found = Tree(leaves, tuple(nodes[p] for p in kept), parents, tuple(self.ids[p] for p in kept))
        found.check()
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data: one entry per node, pre-order."""
        return {
            "leaves": list(self.leaves),
            "nodes": [
                {"id": self.ids[p], "members": sorted(node), "parent": None if parent is None else self.ids[parent]}
                for p, (node, parent) in enumerate(zip(self.nodes, self.parents))
            ],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Tree:
        """Rebuild from :meth:`to_dict` output.

        Raises:
            ValueError: It is not a tree.
        """
        try:
            sets = [frozenset(map(str, node["members"])) for node in data["nodes"]]
            places = {node["id"]: position for position, node in enumerate(data["nodes"])}
            parents = [None if node["parent"] is None else places[node["parent"]] for node in data["nodes"]]
            found = cls(tuple(map(str, data["leaves"])), tuple(sets), tuple(parents))
            names = tuple(str(node["id"]) for node in data["nodes"])
            if names != found.ids:
                found = cls(found.leaves, found.nodes, found.parents, names)
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"not a tree: {error}") from error
        found.check()
        return found

    def check(self) -> None:
        """Raise unless every node's models are the disjoint union of its children's.

        Raises:
            ValueError: They are not.
        """
        if not self.nodes or self.nodes[0] != frozenset(self.leaves) or self.parents[0] is not None:
            raise ValueError("the first node must hold every model")
        if len(set(self.ids)) != len(self.nodes):
            raise ValueError("two nodes have the same name")
        for position, below in enumerate(self.children):
            if not below and (len(self.nodes[position]) != 1 or self.ids[position] not in self.nodes[position]):
                raise ValueError(f"node {self.ids[position]}: a leaf is named after its one model")
            if below:
                parts = [self.nodes[child] for child in below]
                if (
                    sum(map(len, parts)) != len(self.nodes[position])
                    or frozenset().union(*parts) != self.nodes[position]
                ):
                    raise ValueError(f"node {self.ids[position]}: its children do not make it up")


def _moved(parent: int | None, last: int) -> int | None:
    """A parent's position once a node was put behind position ``last``."""
    return parent + 1 if parent is not None and parent > last else parent


def drawn(tree: Tree, label: Mapping[str, str] | None = None) -> list[str]:
    """Lines of text that draw a tree, one node each, leaves named in full.

    Args:
        tree: What to draw.
        label: Node id → text behind it.
    """
    lines: list[str] = []

    def visit(position: int, prefix: str, tail: str) -> None:
        name = tree.ids[position]
        shown = (
            name if tree.is_leaf(position) or tree.parents[position] is None else f"{len(tree.nodes[position])} models"
        )
        text = (label or {}).get(name, "")
        lines.append(f"{prefix}{tail}{shown}{'  ' + text if text else ''}")
        below = tree.children[position]
        inner = prefix + ("" if not tail else "│  " if tail == "├─ " else "   ")
        for number, child in enumerate(below):
            visit(child, inner, "├─ " if number + 1 < len(below) else "└─ ")

    visit(0, "", "")
    return lines


def effective_bits(tree: Tree, bits: Mapping[str, int], columns: int, group_size: int) -> float:
    """Stored bits per weight and model of one matrix: codes and scales.

    ``(1/M) Σ_v (b_v + 16·G/K)`` over nodes with bits, the formula of ``Σ_v (b_v + 16/g) / M`` where g divides K.

    Args:
        tree: Which models share.
        bits: Node id → code bits; nodes that are absent or 0 store nothing.
        columns: K.
        group_size: g.
    """
    groups = -(-columns // min(group_size, columns))
    beside = 16 * groups / columns
    total = sum(b + beside for name in tree.ids if (b := bits.get(name, 0)) > 0)
    return total / len(tree.leaves)


def by_level(tree: Tree, preset: str) -> Mapping[str, int]:
    """Widths of a preset such as ``4-1`` (root, leaves) or ``4-2-1`` (root, groups, leaves); node id → bits.

    With three or more numbers the nodes directly below the root, then those below them, take the numbers in turn; nodes
    deeper than the preset store nothing, leaves always take the last number.

    Raises:
        ValueError: The preset is not widths joined by hyphens.
    """
    try:
        levels = [int(part) for part in preset.split("-")]
    except ValueError as error:
        raise ValueError(f"preset {preset!r}: expected widths such as 4-1 or 4-2-1") from error
    if len(levels) < 2 or not all(0 <= level <= 6 for level in levels):
        raise ValueError(f"preset {preset!r}: expected two or more widths of 0 to 6 bits, such as 4-1")
    found = {}
    for position, depth in enumerate(tree.depths):
        above = levels[depth] if depth < len(levels) - 1 else 0
        found[tree.ids[position]] = levels[-1] if tree.is_leaf(position) else above
    return found
