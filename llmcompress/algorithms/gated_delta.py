"""The gated delta rule with a state that is stored in low bits: token by token, the definition of decoding.

Yang et al. (arXiv 2412.06464), as Qwen3-Next and Qwen3.5 have it. Per head, with unit keys k, scaled unit queries q::

    d_t = (v_t - a_t ĥ_{t-1} k_t) β_t      u_t = a_t ĥ_{t-1} + d_t ⊗ k_t      y_t = u_t q_t      ĥ_t = Q(u_t)

A state maps keys to values, and a token moves what it says of its key towards its value. From ``d_t`` on this is
Mamba-2's recurrence (:mod:`~llmcompress.algorithms.selective_scan`) with ``dt x = d``, B = k and C = q, so DSQ has a
scale for each column of a value (channel) and for each column of a key (state). Ours: the paper of Q-Mamba knows
Mamba only. An error of the state is decayed by a and, along keys that come again, erased by (1 - β).

Kimi Delta Attention (Kimi Team, arXiv 2510.26692) has a decay for each column of a key: ``a_t`` is then a vector that
multiplies the columns of the state, and ``ĥ_{t-1} (a_t k_t)`` is what that says of a key.

Legend: S sequences, T tokens, H heads, G key heads that value heads share, P columns of a value, N columns of a key.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from llmcompress_kernels.reference.state import folded_sum
from torch import Tensor

from llmcompress.algorithms.selective_scan import Store, driven, read


@dataclass(frozen=True, slots=True)
class DeltaInputs:
    """What a mixer feeds its rule.

    Attributes:
        query: fp32 ``[S, T, G, N]``, of length one and scaled; value head h reads group ``h // (H / G)``.
        key: fp32 ``[S, T, G, N]``, of length one.
        value: fp32 ``[S, T, H, P]``.
        decay: fp32 ``[S, T, H]``, or ``[S, T, H, N]`` of Kimi Delta Attention, a.
        step: fp32 ``[S, T, H]``, β.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    decay: Tensor
    step: Tensor

    @property
    def tokens(self) -> tuple[int, int]:
        """Sequences and tokens of each."""
        return self.value.shape[0], self.value.shape[1]

    @property
    def log_decay(self) -> Tensor:
        """``log a``, fp64 ``[S, T, H]``, the mean over a key's columns where they differ.

        A state may forget more than that, where keys come again.
        """
        log = self.decay.double().log()
        return log if log.ndim == 3 else log.mean(-1)

    def run(self, state: Tensor | None, store: Store | None) -> tuple[Tensor, Tensor]:
        """The sequence token by token: see :func:`scan`."""
        return scan(self, state, store)


def difference(state: Tensor, value: Tensor, decay: Tensor, step: Tensor, key: Tensor) -> Tensor:
    """``d_t``: the share that a state takes of what it says wrongly of a value.

    Args:
        state: fp32 ``[S, H, P, N]`` before the token.
        value: fp32 ``[S, H, P]``.
        decay: fp32 ``[S, H]`` or ``[S, H, N]``.
        step: fp32 ``[S, H]``.
        key: fp32 ``[S, G, N]``.

    Returns:
        fp32 ``[S, H, P]``.
    """
    wide = key.repeat_interleave(state.shape[1] // key.shape[1], 1)
    if decay.ndim == 3:
        told = folded_sum(state * (decay * wide).unsqueeze(-2))
    else:
        told = decay.unsqueeze(-1) * folded_sum(state * wide.unsqueeze(-2))
    return (value - told) * step.unsqueeze(-1)


def over_state(decay: Tensor) -> Tensor:
    """Decays ``[S, H]`` or ``[S, H, N]`` as they multiply a state ``[S, H, P, N]``."""
    return decay[..., None, None] if decay.ndim == 2 else decay.unsqueeze(-2)


def scan(inputs: DeltaInputs, state: Tensor | None, store: Store | None) -> tuple[Tensor, Tensor]:
    """Run a whole sequence token by token.

    Args:
        inputs: The sequence.
        state: fp32 ``[S, H, P, N]`` before the first token, None for zeros.
        store: Rounds the state after each token; None keeps it in float.

    Returns:
        ``u_t q_t`` of every token, fp32 ``[S, T, H, P]``, and the last state as stored.
    """
    value = inputs.value
    if state is None:
        state = value.new_zeros(value.shape[0], *value.shape[2:], inputs.key.shape[-1])
    outputs = torch.empty_like(value)
    for t in range(value.shape[1]):
        decay, key = inputs.decay[:, t], inputs.key[:, t]
        change = difference(state, value[:, t], decay, inputs.step[:, t], key)
        fresh = driven(state, change, over_state(decay), key)
        outputs[:, t] = read(fresh, inputs.query[:, t])
        state = fresh if store is None else store(fresh, t)
    return outputs, state
