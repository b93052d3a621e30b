"""Definitions of what Mamba-1 has of its own: states of channels that have time steps and decays of their own.

Per channel p with fresh state ``u [N]``, states rounded as in :mod:`~llmcompress_kernels.reference.state`, a head of P
channels sharing the scales of states::

    u[p] = exp(dt[p] A[p]) h[p] + (dt[p] x[p]) B        y[p] = u[p] C        h = Q(u)

Legend: S sequences, T tokens, H heads, P channels of a head, I = H P, N states, W tokens of a replay window.
"""

from __future__ import annotations

import torch
from torch import Tensor


def fresh_state(state: Tensor, drive: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``exp(dt A) h + drive ⊗ B``.

    Args:
        state: fp32 ``[S, I, N]``.
        drive: fp32 ``[S, I]``, ``dt x``.
        dt: fp32 ``[S, I]``, positive.
        a: fp32 ``[I, N]``, negative.
        b: fp32 ``[S, N]``.
    """
    return (dt.unsqueeze(-1) * a).exp() * state + drive.unsqueeze(-1) * b.unsqueeze(1)


def replayed(state: Tensor, recent: Tensor, count: Tensor, a: Tensor) -> Tensor:
    """A stored state with the tokens of its replay window taken in, one after the other.

    Args:
        state: fp32 ``[S, I, N]``.
        recent: fp32 ``[S, W - 1, 2 I + N]``, rows ``dt x | dt | B``.
        count: int ``[S]``, rows that are filled.
        a: As in :func:`fresh_state`.
    """
    inner, states = a.shape
    for k in range(recent.shape[1]):
        drive, dt, b = recent[:, k].split((inner, inner, states), -1)
        state = torch.where((count > k)[:, None, None], fresh_state(state, drive, dt, a, b), state)
    return state


def scan(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A prompt with a float state.

    Args:
        x: fp32 ``[S, T, I]``.
        dt: As ``x``, positive.
        a: fp32 ``[I, N]``, negative.
        b: fp32 ``[S, T, N]``.
        c: As ``b``.
        d: fp32 ``[I]``.
        state: fp32 ``[S, I, N]`` before the first token.

    Returns:
        ``y + d x`` as ``x``, and the state after the last token.
    """
    out = torch.empty_like(x)
    for t in range(x.shape[1]):
        state = fresh_state(state, dt[:, t] * x[:, t], dt[:, t], a, b[:, t])
        out[:, t] = (state @ c[:, t].unsqueeze(-1)).squeeze(-1) + d * x[:, t]
    return out, state
