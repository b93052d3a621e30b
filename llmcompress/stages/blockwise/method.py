"""How a weight gets its codes: what a quantizing stage's config asks for, as an object that ``block_solver.py`` calls.

A new quantizer is a class of its own here or beside its stage: :meth:`Method.solve`, and ``hessians`` where it looks at
activations. Torch-free at import, as stages are.

Legend: E experts (1 for a linear), N rows, K columns, G groups per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from llmcompress.algorithms.gptq import GptqOptions
    from llmcompress.algorithms.grids import Search
    from llmcompress.algorithms.rounding import Rounded
    from llmcompress.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class RarePolicy:
    """What happens to experts with few tokens; fields as in the recipe.

    Attributes:
        min_tokens: Tokens needed for a solution by statistics alone, None for ``max(128, in_features / 16)``.
        blend: Mix in the layer's Hessian below that; otherwise round to nearest.
        affinity: Weight tokens by routing weights.
    """

    min_tokens: int | None = None
    blend: bool = True
    affinity: bool = False

    def needed(self, in_features: int) -> int:
        """Tokens from which an expert stands on its own."""
        return max(128, in_features // 16) if self.min_tokens is None else self.min_tokens


@dataclass(frozen=True)
class Method(ABC):
    """How weights are quantized.

    Attributes:
        rare: Policy for experts with few tokens.
        target_ridge: When set, weights are first fitted to the full-precision stream with this relative damping; needs
            Hessians.
        residuals: Also fit what writes to the residual stream to that of the full-precision stream.
    """

    hessians: ClassVar[bool] = False
    """Whether it looks at second moments of a weight's inputs: then there is a calibration set."""

    rare: RarePolicy = RarePolicy()
    target_ridge: float | None = None
    residuals: bool = False

    @abstractmethod
    def solve(
        self, w: Tensor, hessian: Tensor | None, spec: QuantSpec, usable: Sequence[bool] | None,
        dtype: torch.dtype | None, warn: Callable[[str], None],
    ) -> Rounded:  # fmt: skip
        """Choose codes and grids.

        Args:
            w: ``[E, N, K]``, unchanged; fp32 where there is a Hessian, else in the block's type.
            hessian: ``[E, K, K]`` fp32, twice the mean of ``x xᵀ`` over the inputs; None without statistics.
            spec: Bits, group size, symmetry.
            usable: Experts whose Hessian carries information, None for all.
            dtype: Type in which the block wants the values; None where nobody reads them.
            warn: Takes a sentence for the user.
        """

    def revision(self, device: str) -> dict[str, object]:
        """What decides the last bits beside the recipe; a resumed run says so where it has changed."""
        return {}


@dataclass(frozen=True)
class Nearest(Method):
    """To the nearest point of the grid.

    Attributes:
        grid: How grids are chosen.
    """

    grid: Search = "minmax"

    def solve(
        self, w: Tensor, hessian: Tensor | None, spec: QuantSpec, usable: Sequence[bool] | None,
        dtype: torch.dtype | None, warn: Callable[[str], None],
    ) -> Rounded:  # fmt: skip
        """Round every weight."""
        from llmcompress.algorithms.rounding import round_weights

        return round_weights(w, spec, self.grid, dtype)


@dataclass(frozen=True, kw_only=True)
class SecondOrder(Nearest):
    """By GPTQ; weights without a Hessian to the nearest point.

    Attributes:
        options: Its settings.
    """

    hessians: ClassVar[bool] = True

    options: GptqOptions

    def solve(
        self, w: Tensor, hessian: Tensor | None, spec: QuantSpec, usable: Sequence[bool] | None,
        dtype: torch.dtype | None, warn: Callable[[str], None],
    ) -> Rounded:  # fmt: skip
        """Solve, and tell where that was not possible as asked."""
        from llmcompress.algorithms.gptq import solve

        if hessian is None:
            return super().solve(w, hessian, spec, usable, dtype, warn)
        found = solve(w, hessian, spec, self.options, usable)
        failed = [e for e, damp in enumerate(found.damp) if damp == 0 and (usable is None or usable[e])]
        raised = [damp for damp in found.damp if damp > self.options.damp * 1.5]
        if raised:
            warn(f"damping raised to {max(raised):g} where Cholesky failed")
        if failed:
            warn(f"{len(failed)} singular Hessians; these weights are rounded to nearest")
        return found

    def revision(self, device: str) -> dict[str, object]:
        """Which form of the column loop runs, and the solver's number."""
        from llmcompress.algorithms.gptq import REVISION, column_loop

        return {"column_loop": column_loop(device), "solver": REVISION}
