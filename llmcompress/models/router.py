"""A router of a loaded model, called with tokens alone whatever its block hands it besides."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from llmcompress.algorithms.routing import RouterRule
from llmcompress.models.layout import RouterView


class Router:
    """A router and the correction of its choice, which some families keep in the block around it.

    Args:
        model: The model; the router's block is materialised.
        view: Which router.

    Attributes:
        view: As given.
        module: The router's module.
        correction: float ``[E]``, see :class:`~llmcompress.models.layout.RouterView`; None without one.
    """

    def __init__(self, model: nn.Module, view: RouterView) -> None:
        self.view, self.module = view, model.get_submodule(view.module)
        self.correction: Tensor | None = None
        if view.correction is not None:
            owner, _, name = view.correction.name.rpartition(".")
            self.correction = getattr(model.get_submodule(owner), name)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[T, E]``, weights ``[T, k]`` and experts int64 ``[T, k]`` of ``x [T, H]``."""
        x = x.unsqueeze(0) if self.view.sequences else x
        said: Any = self.module(x, self.correction) if self.view.handed else self.module(x)
        logits, weights, index = said[:3]
        return logits, weights, index

    def entered(self, x: Tensor) -> Tensor:
        """What the matrix reads, ``[T, H]``, where the module is called with ``x [T, H]``."""
        found: Tensor = self.module.entered(x) if self.view.normed else x  # type: ignore[operator]
        return found

    def parameters(self) -> dict[str, Tensor]:
        """Weight ``[E, H]`` and bias ``[E]``, if there is one, by run-time name."""
        matrix = self.module.get_parameter(self.view.matrix)
        found: dict[str, Tensor] = {self.view.weight: matrix}
        if self.view.bias:
            found[f"{self.view.module}.bias"] = self.module.get_parameter("bias")
        return found

    def rule(self, top_k: int) -> RouterRule:
        """How it turns logits into ``top_k`` experts and their weights."""
        correction = None if self.correction is None else self.correction.flatten()
        return RouterRule.of(self.module, self.view, top_k, correction)
