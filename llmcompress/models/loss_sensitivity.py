"""What a model's loss feels of errors in the outputs of its linears, from gradients, one block in memory at a time.

To second order an error ``δy`` of a linear's output moves the model's predictions by ``KL ≈ ½ E (g·δy)²``, where ``g``
is the gradient of the log-likelihood of tokens drawn from those predictions (the Fisher matrix; tokens of the text
would give another one). Rounding makes errors of weights without a direction, ``δy = δW x`` with variance σ² each:
that is ``½ σ² E ‖g‖²‖x‖²``, token by token, while the output's error is ``σ² N E‖x‖²`` with N outputs. An error that is
the share e of the output's energy therefore costs ``s · e`` nats a token, ``s = ½ E(‖g‖²‖x‖²) E‖y‖² / (N E‖x‖²)``;
that ``s`` is what this module measures. Tokens with enormous activations count by what the loss feels of them, which is
little: means of gradients and of outputs apart would not know.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmcompress.errors import InputError
from llmcompress.models.capture import constant, first_output, replaced_layers
from llmcompress.models.memory_limits import GRADIENT_TOKENS
from llmcompress.models.walker import Walker

if TYPE_CHECKING:
    from torch import nn

    from llmcompress.models.handle import ModelHandle
    from llmcompress.models.layout import Block


def sampled(tokens: Tensor) -> Tensor:
    """The first windows ``[s, L]`` of ``[S, L]``, at least one, that :func:`loss_sensitivity` takes."""
    return tokens[: max(1, GRADIENT_TOKENS // tokens.shape[1])]


def loss_sensitivity(handle: ModelHandle, tokens: Tensor, device: str, dtype: str, seed: int) -> dict[str, float]:
    """Nats a token that an error as large as a linear's output would cost, to second order.

    Args:
        handle: A dense model.
        tokens: ``[S, L]`` int64; see :func:`sampled`.
        device: Where blocks run.
        dtype: Name of the compute type.
        seed: Seed of the drawn tokens.

    Returns:
        Linear → s, for every linear of the layout's blocks.

    Raises:
        InputError: Gradients are not finite.
    """
    tokens = sampled(tokens)
    model: Any = handle.skeleton(getattr(torch, dtype))
    walker = Walker(model, tokens, device, seed, resident=device == "cuda")
    blocks = handle.layout.blocks
    names = [block.name for block in blocks]
    states = [walker.embed(names)]
    for block in blocks:
        layer = handle.load_block(model, block.index, device)
        states.append(torch.empty_like(states[-1]))
        for rows in walker.batches:
            with torch.no_grad():
                states[-1][rows] = _run(layer, states[-2][rows].to(device), walker.arguments(block, rows))
        handle.free_block(model, block.index)
    gradient = _of_head(model, names, tokens, states.pop(), device, seed)
    found: dict[str, float] = {}
    for block in reversed(blocks):
        layer = handle.load_block(model, block.index, device)
        found |= _through(model, layer, block, walker, states.pop(), gradient)
        handle.free_block(model, block.index)
    if not all(value < float("inf") for value in found.values()):
        raise InputError(
            f"{handle.path}: gradients contain NaN or infinity",
            "check the model's weights, or use run.compute_dtype=float32",
        )
    return {view.name: found[view.name] for block in blocks for view in block.linears()}


def _run(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Tensor:
    return first_output(layer(x, **arguments))


def _of_head(model: Any, names: Sequence[str], tokens: Tensor, hidden: Tensor, device: str, seed: int) -> Tensor:
    """Gradient of the summed negative log-likelihood of drawn tokens by the last block's output, ``[S, L, H]``."""
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for key, tensor in tensors.items():
                if tensor is not None and not tensor.is_meta:
                    tensors[key] = _moved(tensor, device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(seed)
    gradient = torch.empty_like(hidden)
    # window by window: logits of a large vocabulary are the largest tensors here
    for row in range(len(tokens)):
        last = hidden[row : row + 1].to(device).requires_grad_(True)
        with replaced_layers(model, names, partial(constant, last)), torch.enable_grad():
            logits = model(input_ids=tokens[row : row + 1].to(device), use_cache=False).logits[0].float()
            drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
            F.cross_entropy(logits, drawn, reduction="sum").backward()
        assert last.grad is not None
        gradient[row : row + 1] = last.grad
    return gradient


def _moved(tensor: Tensor, device: str) -> Tensor:
    moved = tensor.detach().to(device)
    return torch.nn.Parameter(moved, requires_grad=False) if isinstance(tensor, torch.nn.Parameter) else moved


def _through(
    model: Any, layer: nn.Module, block: Block, walker: Walker, inputs: Tensor, gradient: Tensor
) -> dict[str, float]:
    """Sensitivities of one block's linears; ``gradient`` becomes that by the block's inputs, in place."""
    names = [view.name for view in block.linears()]
    # per linear: squared gradients times squared inputs, squared inputs, squared outputs
    sums = {name: torch.zeros(3, dtype=torch.float64, device=walker.device) for name in names}
    for rows in walker.batches:
        x = inputs[rows].to(walker.device).requires_grad_(True)
        with torch.enable_grad(), _watched(model, names, sums):
            output = _run(layer, x, walker.arguments(block, rows))
            output.backward(gradient[rows].to(output))
        assert x.grad is not None
        gradient[rows] = x.grad.to(gradient)
    count = inputs.shape[0] * inputs.shape[1]
    found = {}
    for view in block.linears():
        felt, size, energy = (sums[view.name] / count).tolist()
        found[view.name] = 0.5 * felt * energy / (view.out_features * size) if size > 0 else 0.0
    return found


@contextmanager
def _watched(model: Any, names: Sequence[str], sums: dict[str, Tensor]) -> Iterator[None]:
    """Add up what the formula needs of inputs, outputs without their bias, and the gradients that come back."""

    def watch(module: nn.Module, name: str) -> Any:
        def seen(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            bias = getattr(module, "bias", None)
            plain = output.detach() if bias is None else output.detach() - bias
            size = inputs[0].detach().float().square().sum(-1)
            sums[name][1] += size.sum().double()
            sums[name][2] += plain.float().square().sum().double()

            def back(gradient: Tensor) -> None:
                sums[name][0] += (gradient.float().square().sum(-1) * size).sum().double()

            output.register_hook(back)

        return module.register_forward_hook(seen)

    handles = [watch(model.get_submodule(name), name) for name in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
