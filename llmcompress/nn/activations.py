"""Int8 activations: the input of a linear is rounded per token, with a scale taken from that token.

The product is computed on the rounded values, so results are those of an int8 kernel that accumulates exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError

if TYPE_CHECKING:
    from llmcompress.models.layout import ModelLayout

HOOKS = "_llmcompress_activations"


def round_per_token(x: Tensor, bits: int = 8) -> Tensor:
    """Symmetric rounding of each row, to nearest even; zero rows stay zero.

    Args:
        x: ``[..., K]`` in any float type.
        bits: Code width, at most 8.

    Returns:
        Values ``code * scale`` in the type of ``x``; ``scale = max|row| / (2^(bits-1) - 1)`` in fp32.
    """
    qmax = float((1 << (bits - 1)) - 1)
    wide = x.to(torch.float32)
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny * 256) / qmax
    return ((wide / scale).round().clamp(-qmax, qmax) * scale).to(x.dtype)


def names(layout: ModelLayout, roles: list[str]) -> list[str]:
    """Linears of the given roles. Routed experts are not among them: fused functions gather their inputs."""
    return [view.name for block in layout.blocks for view in block.linears() if view.role.value in roles]


def attach(model: nn.Module, layout: ModelLayout, policy: Mapping[str, Any]) -> None:
    """Round the inputs of the policy's linears from now on.

    Args:
        model: Of this layout.
        layout: Its layout.
        policy: ``bits`` and ``roles``.

    Raises:
        InputError: The policy is not one that this version knows.
    """
    if policy.get("bits") != 8 or not isinstance(policy.get("roles"), list):
        raise InputError(
            "quantization_config.policies.activations: not understood", "upgrade llmcompress, or export the model again"
        )
    bits = int(policy["bits"])
    switch = {"on": True}

    def hook(_module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        return (round_per_token(inputs[0], bits), *inputs[1:]) if switch["on"] else None

    for name in names(layout, list(policy["roles"])):
        model.get_submodule(name).register_forward_pre_hook(hook)
    setattr(model, HOOKS, switch)


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Inside, activations are not rounded."""
    switch: dict[str, bool] | None = getattr(model, HOOKS, None)
    if switch is None:
        yield
        return
    switch["on"] = False
    try:
        yield
    finally:
        switch["on"] = True
