"""What calibration needs from inside a module: inputs of its linears, and experts one at a time.

No hooks on stacked experts: transformers dispatches them to fused functions where hooks never fire.
Experts are run here, slice by slice, with the module's own gate function and the layout's flags.

Legend: T tokens, E experts, k experts per token, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.models.layout import ExpertBank
from llmcompress.models.orientation import canonical, family_orientation

# families whose decoder layers return a tuple
TUPLES = frozenset({"bamba", "falcon_h1", "glm_moe_dsa", "gptj", "falcon", "gpt_neo"})
# rows of one expert that are pushed through at once; fixed, so that results do not depend on budgets
PIECE = 8192


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., object]) -> Iterator[None]:
    """Run ``forward`` instead of the module's own, inside the context."""
    previous = module.__dict__.get("forward")
    module.forward = forward  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        if previous is None:
            del module.forward
        else:
            module.forward = previous  # type: ignore[method-assign]


@contextmanager
def replaced_layers(model: Any, names: Sequence[str], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Run ``forward(hidden_states, …)`` instead of each of these decoder layers, inside the context."""
    answer: Callable[..., object] = forward
    if model.config.model_type in TUPLES:

        def answer(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
            return forward(*args, **kwargs), None

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(replaced_forward(model.get_submodule(name), answer))
        yield


@contextmanager
def recorded_inputs(modules: Sequence[nn.Module], seen: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Call ``seen(position, input)`` whenever one of the modules runs."""
    with ExitStack() as stack:
        for position, module in enumerate(modules):

            def hook(_module: nn.Module, inputs: tuple[Tensor, ...], position: int = position) -> None:
                seen(position, inputs[0])

            handle = module.register_forward_pre_hook(hook)
            stack.callback(handle.remove)
        yield


def identity(x: Tensor) -> Tensor:
    """Stand-in for an output projection: the module then returns that projection's input."""
    return x


def constant(value: Any, *_args: Any, **_kwargs: Any) -> Any:
    """Stand-in for a module whose result is known already; with ``functools.partial``."""
    return value


def first_output(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    """The hidden states of a module that may also return attention weights or router scores."""
    return result[0] if isinstance(result, tuple) else result


@dataclass(frozen=True, slots=True)
class Routing:
    """Tokens sorted by expert once.

    Attributes:
        token: int64 ``[T*k]`` token of each routed pair, sorted by expert, then by token.
        weight: ``[T*k]`` routing weights in the same order.
        bounds: ``E+1`` offsets; expert e owns ``bounds[e]:bounds[e+1]``.
    """

    token: Tensor
    weight: Tensor
    bounds: list[int]

    @classmethod
    def of(cls, index: Tensor, weights: Tensor, experts: int, first: int = 0) -> Routing:
        """Sort the routed pairs.

        Args:
            index: int64 ``[T, k]`` experts of each token; E or more means skipped.
            weights: ``[T, k]``.
            experts: E.
            first: Number of the first token.
        """
        flat = index.reshape(-1)
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat.clamp(max=experts), minlength=experts + 1)[:experts]
        bounds = [0, *counts.cumsum(0).tolist()]
        kept = order[: bounds[-1]]
        return cls(kept // index.shape[-1] + first, weights.reshape(-1)[kept], bounds)

    @property
    def counts(self) -> list[int]:
        """Tokens per expert."""
        return [after - before for before, after in zip(self.bounds, self.bounds[1:])]

    def pieces(self, expert: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(tokens, weights)`` of one expert, at most ``PIECE`` rows at a time."""
        start, stop = self.bounds[expert], self.bounds[expert + 1]
        for begin in range(start, stop, PIECE):
            end = min(begin + PIECE, stop)
            yield self.token[begin:end], self.weight[begin:end]


def gated(module: nn.Module, bank: ExpertBank, expert: int, x: Tensor, weight: Tensor | None = None) -> Tensor:
    """Input of one expert's down projection: ``act(gate x) * (up x)``, or ``act(up x)`` without a gate.

    Args:
        module: The stacked experts in the family's orientation.
        bank: Their flags.
        expert: Which expert.
        x: ``[n, H]``.
        weight: Gate and up projections to use instead of the module's, in the family's orientation.

    Returns:
        ``[n, I]``.
    """
    inner = _project(module, bank, bank.gate_up.rpartition(".")[2], expert, x, weight)
    activate: Callable[[Tensor], Tensor] = module._apply_gate if bank.gated else module.act_fn  # type: ignore[assignment]
    return activate(inner)


def down(module: nn.Module, bank: ExpertBank, expert: int, z: Tensor) -> Tensor:
    """One expert's down projection, ``[n, I]`` to ``[n, H]``."""
    return _project(module, bank, "down_proj", expert, z)


def expert_weight(module: nn.Module, bank: ExpertBank, name: str, experts: slice) -> Tensor:
    """Weights of some experts in canonical orientation, a copy, fp32 ``[e, N, K]``."""
    stored: Tensor = getattr(module, name.rpartition(".")[2])
    return canonical(bank, name, stored[experts].detach()).to(torch.float32, copy=True)


def write_expert_weight(module: nn.Module, bank: ExpertBank, name: str, experts: slice, value: Tensor) -> None:
    """Put canonical weights of some experts into the module, in place."""
    stored: Tensor = getattr(module, name.rpartition(".")[2])
    stored.data[experts] = family_orientation(bank, name, value).to(stored)


def _project(
    module: nn.Module, bank: ExpertBank, key: str, expert: int, x: Tensor, weight: Tensor | None = None
) -> Tensor:
    if weight is None:
        weight = getattr(module, key)[expert]
    assert weight is not None
    bias: Tensor | None = getattr(module, f"{key}_bias")[expert] if bank.bias else None
    return nn.functional.linear(x, weight.T if bank.transposed else weight, bias)
