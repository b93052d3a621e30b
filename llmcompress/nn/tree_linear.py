"""TreeLinear: a linear layer whose weight is a sum of nodes, shared by the models of a family."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from llmcompress_kernels import ops, tree
from llmcompress_kernels.reference.bitpack import pack
from torch import Tensor, nn

from llmcompress.nn.packed import buffers_of_fixed_type
from llmcompress.quant.codecs.delta_tree import EXPONENT
from llmcompress.quant.codecs.int_group import PACKED, SCALE
from llmcompress.quant.packed import PackedWeight


@dataclass
class BatchRows:
    """Which rows of the running batch belong to which member; one object shared by all modules of a family.

    Attributes:
        rows: Member → ``(lo, hi)`` rows of the batch, in the family's order, covering the batch.
        size: Rows of the batch.
    """

    rows: dict[str, tuple[int, int]] = field(default_factory=dict)
    size: int = 0

    def assign(self, members: Sequence[str]) -> None:
        """Set the batch: the member of each row; equal members must be neighbours.

        Raises:
            ValueError: They are not.
        """
        rows: dict[str, tuple[int, int]] = {}
        for index, member in enumerate(members):
            low, high = rows.get(member, (index, index))
            if high != index:
                raise ValueError(f"rows of {member} are not neighbours")
            rows[member] = (low, index + 1)
        self.rows, self.size = rows, len(members)

    def ranges(self, members: frozenset[str]) -> list[tuple[int, int]]:
        """Rows of any of ``members`` as few ranges as possible."""
        found: list[tuple[int, int]] = []
        for low, high in sorted(self.rows[m] for m in members if m in self.rows):
            if found and found[-1][1] == low:
                found[-1] = (found[-1][0], high)
            else:
                found.append((low, high))
        return found


class TreeLinear(nn.Module):
    """``y = x Wᵀ (+ b)`` where each row of the batch has its member's ``W``, the sum of the nodes on its path.

    Args:
        nodes: Node id → residual ``[N, K]``, parents before children.
        members_of: Node id → members below it.
        batch: Rows of the running batch.
        biases: Member → bias ``[N]``, or None.
    """

    def __init__(
        self,
        nodes: Mapping[str, PackedWeight],
        members_of: Mapping[str, frozenset[str]],
        batch: BatchRows,
        biases: Mapping[str, Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.names, self.batch = list(nodes), batch
        self.members = [members_of[name] for name in self.names]
        self.bits = [pw.spec.bits for pw in nodes.values()]
        self.out_features, self.in_features = next(iter(nodes.values())).shape
        self.group_size = next(iter(nodes.values())).spec.group(self.in_features)
        self.multipliers = [2.0 ** int(pw.tensors[EXPONENT][0]) for pw in nodes.values()]
        for index, pw in enumerate(nodes.values()):
            self.register_buffer(f"packed_{index}", pw.tensors[PACKED], persistent=False)
            self.register_buffer(f"scale_{index}", pw.tensors[SCALE], persistent=False)
        self.biases = dict(biases) if biases else {}
        self.planes: list[tree.Plane] = []

    def prepare(self) -> bool:
        """Bring the nodes into the CPU kernels' order, which replaces the stored one; whether they are in it.

        Done at the first call on the CPU. A move gives the stored order back.
        """
        if self.planes or self.weight.device.type != "cpu" or not tree.ready():
            return bool(self.planes)
        for index, (bits, multiplier) in enumerate(zip(self.bits, self.multipliers)):
            packed, scale = self._stored(index)
            parts = tree.planes([packed], [scale], [bits], [multiplier], self.group_size, self.in_features)
            self.planes += [replace(part, node=index) for part in parts]
            # one node at a time, so that the peak is one node and not the weight
            setattr(self, f"packed_{index}", packed.new_empty(0))
            setattr(self, f"scale_{index}", scale.new_empty(0))
        return True

    def _stored(self, index: int) -> tuple[Tensor, Tensor]:
        """Codes and scales of a node in the stored order."""
        own = [part for part in self.planes if part.node == index]
        if not own:
            return getattr(self, f"packed_{index}"), getattr(self, f"scale_{index}")
        codes = tree.codes_of(own, self.out_features, self.group_size, self.in_features)
        scale = own[0].scale.transpose(1, 2).flatten(0, 1)[: self.out_features].contiguous()
        return pack(codes, self.bits[index]), scale

    def _restore(self) -> None:
        if self.planes:
            for index in range(len(self.names)):
                packed, scale = self._stored(index)
                setattr(self, f"packed_{index}", packed)
                setattr(self, f"scale_{index}", scale)
            self.planes = []

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales in memory; planes of one node share their scales."""
        held = {t.data_ptr(): t.nbytes for part in self.planes for t in (part.words, part.scale)}
        return sum(held.values()) + sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn, recurse: bool = True):  # type: ignore[no-untyped-def]
        """Move buffers but never change their type."""
        self._restore()
        with buffers_of_fixed_type(self, fn):
            super()._apply(fn, recurse)
        self.biases = {name: fn(bias) for name, bias in self.biases.items()}
        return self

    @property
    def weight(self) -> Tensor:
        """The first node's codes: code that inspects ``.weight`` for a device finds one."""
        found = self.packed_0
        assert isinstance(found, Tensor)
        return found

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``[B, ..., K]`` into ``[B, ..., N]``; B is the batch that :class:`BatchRows` describes."""
        flat = x.reshape(-1, self.in_features)
        each = flat.shape[0] // self.batch.size
        spans = [
            (index, low * each, high * each)
            for index, members in enumerate(self.members)
            for low, high in self.batch.ranges(members)
        ]
        y = self._planed(flat, spans) if x.device.type == "cpu" and self.prepare() else self._operator(flat, spans)
        for member, bias in self.biases.items():
            if member in self.batch.rows:
                low, high = self.batch.rows[member]
                y[low * each : high * each] += bias.to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    def _planed(self, x: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        of_node: dict[int, list[tree.Plane]] = {}
        for part in self.planes:
            of_node.setdefault(part.node, []).append(part)
        pairs = [(part, (low, high)) for index, low, high in spans for part in of_node[index]]
        parts, ranges = [part for part, _ in pairs], [span for _, span in pairs]
        return tree.product(x, parts, ranges, self.out_features, self.group_size)

    def _operator(self, x: Tensor, spans: Sequence[tuple[int, int, int]]) -> Tensor:
        nodes = [index for index, _, _ in spans]
        return ops.delta_decode(
            x,
            [getattr(self, f"packed_{index}") for index in nodes],
            [getattr(self, f"scale_{index}") for index in nodes],
            torch.tensor([span[1:] for span in spans], dtype=torch.int64).reshape(-1, 2),
            [self.bits[index] for index in nodes],
            [self.multipliers[index] for index in nodes],
            self.group_size,
        )


class PerMember(nn.Module):
    """One dense module per member, each applied to its own rows: embeddings, norms, heads.

    Args:
        modules: Member → module.
        batch: Rows of the running batch.
    """

    def __init__(self, modules: Mapping[str, nn.Module], batch: BatchRows) -> None:
        super().__init__()
        self.names = list(modules)
        self.parts = nn.ModuleList(modules.values())
        self.batch = batch

    @property
    def weight(self) -> Tensor:
        """The first member's weight, for code that asks for its device or type."""
        found = self.parts[0].weight
        assert isinstance(found, Tensor)
        return found

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """Apply each member's module to its rows of ``[B, ...]``; one row, such as positions, is for all of them."""
        if len(self.batch.rows) == 1:
            member = next(iter(self.batch.rows))
            found: Tensor = self.parts[self.names.index(member)](x, *others, **named)
            return found
        ordered = sorted(self.batch.rows.items(), key=lambda item: item[1])
        outputs = []
        for name, rows in ordered:
            more = [self._own(value, rows) for value in others]
            by_name = {key: self._own(value, rows) for key, value in named.items()}
            found = self.parts[self.names.index(name)](self._own(x, rows), *more, **by_name)
            outputs.append(found.expand(rows[1] - rows[0], *found.shape[1:]) if found.shape[0] == 1 else found)
        return torch.cat(outputs)

    def _own(self, value: Any, rows: tuple[int, int]) -> Any:
        """What a tensor ``[B, ...]`` has of rows ``low`` to ``high``; other values as they are."""
        if not isinstance(value, Tensor) or value.ndim < 2 or value.shape[0] == 1:
            return value
        each = value.shape[0] // self.batch.size
        return value[rows[0] * each : rows[1] * each]
