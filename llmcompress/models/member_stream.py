"""One member of a family while its activations pass through it, block by block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from llmcompress.models.memory_limits import resident_bytes
from llmcompress.models.visitor import DenseVisitor
from llmcompress.models.walker import Walker

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.algorithms.hessian import Gram
    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block, LinearGroup


class MomentCollector(DenseVisitor):
    """Keeps the second moments of every group and changes nothing."""

    def __init__(self) -> None:
        self.moments: dict[str, Tensor] = {}

    def linears(self, group: LinearGroup, gram: Gram | None) -> None:
        """Keep the group's Hessian under the name of its first linear."""
        assert gram is not None
        self.moments[group.linears[0].name] = gram.hessian()[0]


class MemberStream:
    """One member's activations: hidden states, on a GPU where they are small there, and a skeleton whose blocks come
    and go.

    Args:
        handle: The member.
        tokens: ``[S, L]``.
        device: Where blocks run.
        dtype: Name of the compute type.
        seed: Seed of the walker.
    """

    def __init__(self, handle: ModelHandle, tokens: Tensor, device: str, dtype: str, seed: int) -> None:
        self.handle, self.device = handle, device
        self.model = handle.skeleton(getattr(torch, dtype))
        layout = handle.layout
        widest = max(view.in_features for block in layout.blocks for view in block.linears())
        size = resident_bytes(tokens.numel(), layout.hidden, widest, self.model.dtype.itemsize)
        self.walker = Walker(self.model, tokens, device, seed, resident=device == "cuda" and size > 0)
        self.hidden = self.walker.embed([block.name for block in self.handle.layout.blocks])
        # embedding and head of every member together could be as large as a model
        handle.free_embeddings(self.model)

    def load(self, block: Block) -> None:
        """Materialise a block."""
        self.handle.load_block(self.model, block.index, self.device)

    def free(self, block: Block) -> None:
        """Give its memory back."""
        self.handle.free_block(self.model, block.index)

    def moments(self, block: Block, advance: bool = True) -> dict[str, Tensor]:
        """Run a block in full precision; return each group's Hessian by its first linear."""
        collector = MomentCollector()
        self.load(block)
        self.walker.forward(block, self.hidden, collector, advance)
        self.free(block)
        return collector.moments
