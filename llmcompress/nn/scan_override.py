"""Run a Mamba-2 mixer of transformers with another scan in the place of its own.

The mixer gets a copy of its forward in which the name of the scan function means ours; projections, convolution,
gates, norms and multipliers stay transformers' own, so this works for every family with that function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError

SCAN = "mamba2_chunk_scan"
# drive [S, T, H, P], decay [S, T, H], b and c [S, T, G, N], all fp32, to [S, T, H, P]
Scan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


@contextmanager
def scanned_by(mixer: nn.Module, scan: Scan) -> Iterator[None]:
    """Inside, the mixer's scan over a sequence without a cache is ``scan``; gradients flow through it.

    Args:
        mixer: A Mamba-2 mixer of transformers.
        scan: Given ``dt x``, ``exp(dt A)``, B and C; returns ``u C``.

    Raises:
        InputError: The installed transformers has another mixer.
    """
    original = inspect.unwrap(type(mixer).forward)
    if SCAN not in original.__code__.co_names:
        raise InputError(
            f"{type(mixer).__name__} of the installed transformers has no {SCAN}",
            "install the version named in pyproject.toml",
        )

    def ours(  # noqa: PLR0913, PLR0917 - the signature is transformers'
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, float("inf")),
        return_final_states: bool = False,
        **_: Any,
    ) -> Any:
        if dt_bias is not None:
            dt = dt + dt_bias.to(dt.dtype)
        dt = nn.functional.softplus(dt) if dt_softplus else dt
        dt = dt.clamp(dt_limit[0], dt_limit[1]).float()
        x = hidden_states.float()
        y = scan(x * dt.unsqueeze(-1), (dt * A.float()).exp(), B.float(), C.float())
        if D is not None:
            y = y + D.float()[:, None] * x
        y = y.to(hidden_states.dtype)
        return (y, torch.empty(0)) if return_final_states else y

    scope = {**original.__globals__, SCAN: ours}
    forward = FunctionType(original.__code__, scope, original.__name__, original.__defaults__, original.__closure__)
    forward.__kwdefaults__ = original.__kwdefaults__
    previous = mixer.__dict__.get("forward")
    mixer.forward = MethodType(forward, mixer)  # type: ignore[method-assign]
    try:
        yield
    finally:
        if previous is None:
            del mixer.forward
        else:
            mixer.forward = previous  # type: ignore[method-assign]
