"""Int8 activations: the input of a linear is rounded, with scales taken from the token at hand.

With one scale per token (``granularity: token``) the product is computed on rounded floats, so results are those of an
int8 kernel that accumulates exactly. With a scale per token and 64 columns (``chunk``) packed linears multiply in
int8; that is the finer grid and the faster product. Rows of a packed linear that stay dense then read float inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from llmcompress_kernels.reference.group_gemm import quantize_activations
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.nn.linear import PackedLinear

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
        model: Model of this layout.
        layout: Its layout.
        policy: ``bits``, ``roles`` and, unless it is ``token``, ``granularity``.

    Raises:
        InputError: The policy is not one that this version knows.
    """
    granularity = policy.get("granularity", "token")
    known = policy.get("bits") == 8 and isinstance(policy.get("roles"), list) and granularity in ("token", "chunk")
    if not known:
        raise InputError(
            "quantization_config.policies.activations: not understood", "upgrade llmcompress, or export the model again"
        )
    bits = int(policy["bits"])
    switch = Switch()

    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not switch.on:
            return None
        x = inputs[0]
        rounded = (
            round_per_token(x, bits) if granularity == "token" else quantize_activations(x, x.shape[-1]).to(x.dtype)
        )
        return (rounded, *inputs[1:])

    for name in names(layout, list(policy["roles"])):
        module = model.get_submodule(name)
        if granularity == "chunk" and isinstance(module, PackedLinear):
            switch.packed.append(module)
        else:
            module.register_forward_pre_hook(hook)
    switch.turn(True)
    setattr(model, HOOKS, switch)


class Switch:
    """Turns the rounding of a model's activations on and off.

    Attributes:
        on: Whether hooks round.
        packed: Linears whose own product rounds.
    """

    def __init__(self) -> None:
        self.on = True
        self.packed: list[PackedLinear] = []

    def turn(self, on: bool) -> None:
        """Round from now on, or do not."""
        self.on = on
        for module in self.packed:
            module.int8_activations = on


@contextmanager
def float_activations(model: nn.Module) -> Iterator[None]:
    """Inside, activations are not rounded."""
    switch: Switch | None = getattr(model, HOOKS, None)
    if switch is None:
        yield
        return
    switch.turn(False)
    try:
        yield
    finally:
        switch.turn(True)
