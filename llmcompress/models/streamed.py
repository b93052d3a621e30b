"""A model that does not fit into memory, run on many windows at once: one block is materialised at a time.

All windows go through a block before the next one is read, so every weight is read once, however many windows there
are. Only hidden states are kept between blocks, on the heap or in files.

Legend: S sequences, L length, H hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch

from llmcompress.models.assemble import apply_loan, apply_patch
from llmcompress.models.capture import constant, replaced_layers
from llmcompress.models.memory_limits import DEFAULT, Limits
from llmcompress.models.walker import Walker

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from llmcompress.models.handle import ModelHandle
    from llmcompress.quant.store import PackedStore


class StreamedModel:
    """Logits of windows that are all known beforehand.

    Args:
        handle: The source.
        store: Packed blocks that take the place of its own, decoded as they are needed; None for the dense model.
        parts: Windows, ``[S, L]`` int64 each; L may differ between parts.
        dtype: Compute type.
        device: Where blocks run.
        limits: Memory for activations.
        folder: Where activations beyond that go.
    """

    def __init__(
        self,
        handle: ModelHandle,
        store: PackedStore | None,
        parts: Sequence[Tensor],
        dtype: torch.dtype,
        device: str = "cpu",
        *,
        limits: Limits = DEFAULT,
        folder: Path | None = None,
    ) -> None:
        self.model = handle.skeleton(dtype)
        self._layers = [block.name for block in handle.layout.blocks]
        self._walkers = [Walker(self.model, part, device, limits=limits, folder=folder) for part in parts]
        self._hidden = [walker.embed(self._layers) for walker in self._walkers]
        for block in handle.layout.blocks:
            handle.load_block(self.model, block.index, device)
            if store is not None:
                apply_patch(self.model, handle.layout, store.read_block(block.index))
                apply_loan(self.model, handle.layout, block, store)
            for walker, hidden in zip(self._walkers, self._hidden):
                walker.forward(block, hidden)
            handle.free_block(self.model, block.index)

    @torch.inference_mode()
    def logits(self, part: int, rows: slice) -> Tensor:
        """Logits of some windows of a part, ``[rows, L, V]``, on the CPU."""
        walker, hidden = self._walkers[part], self._hidden[part]
        final = hidden[rows].clone()
        walker.cache.drop(hidden)
        # final norm, head and whatever the family does around them are the model's own
        with replaced_layers(self.model, self._layers, partial(constant, final)):
            found: Tensor = self.model(input_ids=walker.tokens[rows], use_cache=False).logits
        return found
