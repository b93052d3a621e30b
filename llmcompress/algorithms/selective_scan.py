"""The selective scan with a state that is stored in low bits: token by token, the definition of decoding.

Per head, with ``a_t = exp(dt_t A)`` and the fresh float state ``u_t`` (Mamba-2, and Mamba-1 where A has more axes)::

    u_t = a_t ĥ_{t-1} + dt_t x_t ⊗ B_t        y_t = u_t C_t + D x_t        ĥ_t = Q(u_t)

The output is read from the fresh state; only what is kept for the next token is rounded. A whole sequence
(:func:`scan`) and one decoding step (:func:`advance`, :func:`read`) run the same operations in the same order.

Legend: S sequences, T tokens, H heads, P channels of a head, N states, G groups that share B and C.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# what a fresh state [S, H, P, N] becomes by being stored after a token
Store = Callable[[Tensor, int], Tensor]


@dataclass(frozen=True, slots=True)
class ScanInputs:
    """What a mixer feeds its scan.

    Attributes:
        x: fp32 ``[S, T, H, P]`` not yet multiplied by dt.
        dt: fp32 ``[S, T, H, 1]`` (Mamba-2) or ``[S, T, H, P]`` (Mamba-1), after softplus and limits.
        a: fp32 ``[H, 1, 1]`` or ``[H, P, N]``, negative.
        b: fp32 ``[S, T, G, N]``; head h reads group ``h // (H / G)``.
        c: As ``b``.
    """

    x: Tensor
    dt: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    @property
    def tokens(self) -> tuple[int, int]:
        """Sequences and tokens of each."""
        return self.x.shape[0], self.x.shape[1]

    @property
    def log_decay(self) -> Tensor:
        """``dt A``, fp64 ``[S, T, H]``: the mean over channels and states where they differ."""
        return (self.dt.double() * self.a.double().mean(-1)).mean(-1)

    def run(self, state: Tensor | None, store: Store | None) -> tuple[Tensor, Tensor]:
        """The sequence token by token: see :func:`scan`."""
        return scan(self, state, store)

    def at(self, t: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``(x [S, H, P], dt [S, H, ·], b [S, G, N], c [S, G, N])`` of one token."""
        return self.x[:, t], self.dt[:, t], self.b[:, t], self.c[:, t]


def advance(state: Tensor, x: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The fresh state ``u_t``.

    Args:
        state: fp32 ``[S, H, P, N]`` stored state of the token before.
        x: ``[S, H, P]``.
        dt: ``[S, H, 1]`` or ``[S, H, P]``.
        a: ``[H, 1, 1]`` or ``[H, P, N]``.
        b: ``[S, G, N]``.

    Returns:
        fp32 ``[S, H, P, N]``, a new tensor.
    """
    return driven(state, dt * x, (dt.unsqueeze(-1) * a).exp(), b)


def driven(state: Tensor, drive: Tensor, decay: Tensor, b: Tensor) -> Tensor:
    """The fresh state ``u_t`` from ``dt_t x_t`` and ``a_t``.

    Args:
        state: fp32 ``[S, H, P, N]``.
        drive: fp32 ``[S, H, P]``.
        decay: fp32 ``[S, H, 1, 1]`` or ``[S, H, P, N]``.
        b: ``[S, G, N]``.

    Returns:
        fp32 ``[S, H, P, N]``, a new tensor.
    """
    sequences, heads, channels, states = state.shape
    groups = b.shape[1]
    drive = drive.reshape(sequences, groups, heads // groups, channels, 1)
    fresh = (decay * state).view(sequences, groups, heads // groups, channels, states)
    # product and sum apart: fused, their last bit would differ from the kernels', and a code with it
    return fresh.add_(drive * b[:, :, None, None, :]).view(state.shape)


def read(fresh: Tensor, c: Tensor) -> Tensor:
    """``u_t C_t``, fp32 ``[S, H, P]``, from a fresh state ``[S, H, P, N]`` and ``c [S, G, N]``."""
    # the same product as in the kernels' definition, so that both give the same bits
    wide = c.repeat_interleave(fresh.shape[1] // c.shape[1], 1)
    return (fresh @ wide.unsqueeze(-1)).squeeze(-1)


def scan(inputs: ScanInputs, state: Tensor | None, store: Store | None) -> tuple[Tensor, Tensor]:
    """Run a whole sequence token by token.

    Args:
        inputs: The sequence.
        state: fp32 ``[S, H, P, N]`` before the first token, None for zeros.
        store: Rounds the state after each token; None keeps it in float.

    Returns:
        ``u_t C_t`` of every token, fp32 ``[S, T, H, P]``, and the last state as stored.
    """
    sequences, tokens, heads, channels = inputs.x.shape
    if state is None:
        state = inputs.x.new_zeros(sequences, heads, channels, inputs.b.shape[-1])
    outputs = torch.empty_like(inputs.x)
    for t in range(tokens):
        x, dt, b, c = inputs.at(t)
        fresh = advance(state, x, dt, inputs.a, b)
        outputs[:, t] = read(fresh, c)
        state = fresh if store is None else store(fresh, t)
    return outputs, state


def half_life(mean_log_decay: Tensor) -> Tensor:
    """Tokens after which half of a state is forgotten: ``ln 2 / -E[log a]``; infinite where nothing is.

    Args:
        mean_log_decay: ``E[dt A]``, not positive.
    """
    return math.log(2) / -mean_log_decay
