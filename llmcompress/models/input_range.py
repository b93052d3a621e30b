"""The largest magnitude of each input channel of chosen linears, seen while a walker runs a block."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch

from llmcompress.models.stream_pairs import StreamRecorder

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.layout import LinearGroup


class InputRange(StreamRecorder):
    """Tap that keeps one maximum per channel.

    Args:
        planned: Names of first linears of the groups to look at.

    Attributes:
        largest: Name of the group's first linear → ``[K]`` fp32 largest magnitude over all tokens.
    """

    def __init__(self, planned: Collection[str]) -> None:
        super().__init__(planned)
        self.largest: dict[str, Tensor] = {}

    def linears(self, group: LinearGroup, x: Tensor) -> None:
        """Look at a batch of inputs, ``[T, K]``."""
        name, here = group.linears[0].name, x.abs().amax(0).to(torch.float32)
        known = self.largest.get(name)
        self.largest[name] = here if known is None else torch.maximum(known, here)

    def moe(self, bank: Any, x: Tensor) -> None:
        """Nothing: routed experts are not looked at."""
