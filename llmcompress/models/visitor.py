"""Who may look on, or change weights, while a :class:`~llmcompress.models.walker.Walker` runs a block.

Legend: T tokens, S sequences, L length, H hidden, K inputs of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from llmcompress.models.capture import Routing
    from llmcompress.models.layout import ExpertBank, LinearGroup, Sublayer
    from llmcompress.models.router import Router


class Visitor(Protocol):
    """What a quantizer sees of a block, in the order of the forward pass. Weights may be changed in place."""

    affinity: bool
    """Weight the tokens of an expert by their routing weights."""

    def wants(self, names: Sequence[str]) -> bool:
        """Whether second moments of the input of these weights are needed."""

    def linears(self, group: LinearGroup, gram: Any) -> None:
        """A group of linears is about to be used; ``gram`` is None unless wanted, ``Moments`` of a sharded walk."""

    def router(self, bank: ExpertBank, router: Router, x: Tensor) -> None:
        """A router is about to be used on ``x [T, H]``."""

    def routed(self, bank: ExpertBank, counts: list[int]) -> None:
        """Tokens per expert are known."""

    def experts(self, bank: ExpertBank, name: str, experts: slice, gram: Any, shared: Callable[[int], Any]) -> None:
        """Some experts' ``name`` projection is about to be used.

        ``shared(e)`` computes the Hessian ``[K, K]`` that expert e would have if it saw tokens of the whole layer; of a
        sharded walk the :class:`Moments` it is made from.
        """


class Tap(Protocol):
    """Sees the very inputs that statistics are taken of, batch by batch, without changing anything."""

    shard: int
    """Which shard the inputs that come next belong to."""

    def wants(self, names: Sequence[str]) -> bool:
        """Whether the inputs of these weights are to be shown."""

    def linears(self, group: LinearGroup, x: Tensor) -> None:
        """A batch of a group's inputs, ``[T, K]``."""

    def residual(self, sublayer: Sublayer, hidden: Tensor) -> None:
        """The residual stream ``[S, L, H]`` that a sublayer is about to add to."""

    def moe(self, bank: ExpertBank, x: Tensor) -> None:
        """Inputs of an expert bank, ``[T, H]``, before it is routed."""

    def routed(self, routing: Sequence[Routing]) -> None:
        """Where the tokens of the bank go, by shard."""

    def experts(
        self, bank: ExpertBank, name: str, experts: slice, expert: int, tokens: Tensor, x: Tensor, weight: Tensor | None
    ) -> None:
        """Inputs ``x [n, K]`` of one expert's projection for some tokens; ``experts`` is the chunk at work.

        ``weight [n]`` is what each token counts, or by what ``x`` is scaled where the bank says so.
        """


class DenseVisitor:
    """A visitor that looks at linears; it passes over what only models with experts have."""

    affinity = False

    def wants(self, names: Sequence[str]) -> bool:
        """Second moments of every group."""
        return True

    def router(self, bank: Any, router: Any, x: Any) -> None:
        """Nothing to do."""

    def routed(self, bank: Any, counts: Any) -> None:
        """Nothing to do."""

    def experts(self, bank: Any, name: str, experts: slice, gram: Any, shared: Any) -> None:
        """Nothing to do."""


class Onlooker(DenseVisitor):
    """A visitor that neither needs statistics nor changes anything."""

    def wants(self, names: Sequence[str]) -> bool:
        """Nothing."""
        return False

    def linears(self, group: LinearGroup, gram: Any) -> None:
        """Nothing to do."""
