"""What parts of an adapter in PEFT's format do to a weight, each a function from the base's weight to the new one.

All compute in fp32 and round once, to the type of the base's weight, as ``merge_and_unload`` of PEFT does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Edit(Protocol):
    """One change of one weight."""

    def __call__(self, weight: Tensor) -> Tensor:
        """The new weight, of the same shape and type."""
        ...


@dataclass(frozen=True)
class Addition:
    """What an adapter adds to one matrix.

    Attributes:
        low: A, ``[r, K]``.
        high: B, ``[N, r]``.
        scale: α/r, or α/√r with rank-stabilised adapters.
        magnitude: DoRA's m, ``[N]``: the sum's rows get these norms (arXiv 2402.09353, equation 5). None without.
    """

    low: Tensor
    high: Tensor
    scale: float
    magnitude: Tensor | None = None

    def __call__(self, weight: Tensor) -> Tensor:
        """``[N, K]`` → ``[N, K]`` in the same type."""
        found = weight.float() + self.scale * (self.high.float() @ self.low.float())
        if self.magnitude is not None:
            found = (self.magnitude.float() / found.norm(dim=1)).unsqueeze(1) * found
        return found.to(weight.dtype)


@dataclass(frozen=True)
class StackedAddition:
    """What an adapter adds to stacked experts (PEFT's ``target_parameters``).

    PEFT numbers the rows of A by expert, then rank, and the columns of B by rank, then expert.

    Attributes:
        low: A, ``[E·r, I]``.
        high: B, ``[O, r·E]``.
        scale: As of :class:`Addition`.
        swapped: The weight is ``[E, I, O]``, not ``[E, O, I]``.
    """

    low: Tensor
    high: Tensor
    scale: float
    swapped: bool

    def __call__(self, weight: Tensor) -> Tensor:
        """``[E, …, …]`` → the same, an expert at a time."""
        experts = weight.shape[0]
        low = self.low.float().reshape(experts, -1, self.low.shape[1])
        high = self.high.float().reshape(self.high.shape[0], -1, experts)
        found = weight.clone()
        for expert in range(experts):
            more = self.scale * (high[:, :, expert] @ low[expert])
            # PEFT rounds what it adds to experts first
            more = (more.T if self.swapped else more).to(weight.dtype)
            found[expert] = (weight[expert].float() + more.float()).to(weight.dtype)
        return found


@dataclass(frozen=True)
class PartAdditions:
    """What an adapter adds to projections of single experts, from models that held experts one by one.

    Attributes:
        parts: An expert's number, the rows of its matrix and what is added there; the stack is copied once for all.
    """

    parts: list[tuple[int, slice, Addition]] = field(default_factory=list)

    def __call__(self, weight: Tensor) -> Tensor:
        """``[E, N, K]`` → the same."""
        found = weight.clone()
        for expert, rows, addition in self.parts:
            found[expert, rows] = addition(found[expert, rows])
        return found


@dataclass(frozen=True)
class Replacement:
    """A weight that was trained whole beside the adapter (``modules_to_save``)."""

    value: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """The new weight in the type of the old one."""
        return self.value.to(weight.dtype)


@dataclass(frozen=True)
class RowReplacement:
    """Rows of an embedding that were trained (``trainable_token_indices``).

    Attributes:
        rows: Token ids.
        values: Their new rows, ``[len(rows), H]``.
    """

    rows: tuple[int, ...]
    values: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        """``[V, H]`` → the same."""
        found = weight.clone()
        found[list(self.rows)] = self.values.to(weight.dtype)
        return found


@dataclass(frozen=True)
class InTurn:
    """Several changes of one weight."""

    edits: Sequence[Edit]

    def __call__(self, weight: Tensor) -> Tensor:
        """One after the other."""
        for edit in self.edits:
            weight = edit(weight)
        return weight
