"""Run a Mamba-2 mixer of transformers with another scan in the place of its own.

The mixer gets a copy of its forward in which the name of the scan function means ours; projections, convolution,
gates, norms and multipliers stay transformers' own, so this works for every family with that function.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from llmcompress.errors import InputError
from llmcompress.models.capture import replaced_forward

SCAN = "mamba2_chunk_scan"
# drive [S, T, H, P], decay [S, T, H], b and c [S, T, G, N], all fp32, to [S, T, H, P]
Scan = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def forward_with(mixer: nn.Module, ours: Mapping[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A copy of the forward of a mixer's class in which some names mean other functions; takes the mixer first.

    Args:
        mixer: A mixer of transformers.
        ours: Names of functions of its modelling file → what they shall mean.

    Raises:
        InputError: The installed transformers has another mixer.
    """
    original = inspect.unwrap(type(mixer).forward)
    code = original.__code__
    missing = [name for name in ours if name not in original.__globals__ or name not in code.co_names]
    if missing:
        raise InputError(
            f"{type(mixer).__name__} of the installed transformers has no {', '.join(missing)}",
            "install the version named in pyproject.toml",
        )
    scope = {**original.__globals__, **ours}
    forward = FunctionType(code, scope, original.__name__, original.__defaults__, original.__closure__)
    forward.__kwdefaults__ = original.__kwdefaults__
    return forward


@contextmanager
def scanned_by(mixer: nn.Module, scan: Scan) -> Iterator[None]:
    """Inside, the mixer's scan over a sequence without a cache is ``scan``; gradients flow through it.

    Args:
        mixer: A Mamba-2 mixer of transformers.
        scan: Given ``dt x``, ``exp(dt A)``, B and C; returns ``u C``.

    Raises:
        InputError: The installed transformers has another mixer.
    """

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

    forward = forward_with(mixer, {SCAN: ours})
    with replaced_forward(mixer, MethodType(forward, mixer)):
        yield
