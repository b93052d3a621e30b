"""Definition of a gated delta rule's step from a state packed by DSQ (arXiv 2412.06464; :mod:`.delta` has it in float).

Per head with the stored state ``h [P, N]`` (columns of a value by columns of a key)::

    change = (v - decay (h k)) step        u = decay h + change ⊗ k        y = u q        h = Q(u)

From ``u`` on this is Mamba-2's update (:mod:`.state`) with ``drive = change``, B = k and C = q, replay windows
included. What a state says of a key decides the codes of the next one, so the order of its sums is defined as well
(:func:`told`); the read-out ``y`` may be summed in any order.

Legend: S sequences, H heads, G groups of them that share keys and queries, P columns of a value, N of a key, R tokens
of a replay window.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmcompress_kernels.reference.state import dsq_replay_update, dsq_state_update, folded_sum, unpack


def told(
    codes: Tensor,
    channel: Tensor | None,
    scale: Tensor,
    fixed: Tensor | None,
    recent: Tensor | None,
    count: Tensor | None,
    key: Tensor,
    bits: int,
) -> Tensor:
    """What packed states say of a key, ``h k``, fp32 ``[S, H, P]``.

    A row is ``channel Σ_n code ((scale_n / qmax) k_n)``, summed in halves; the tokens of a window follow, oldest first,
    each ``(E_j (B_j k)) drive_j`` with the decays E_j after it, as products from the newest token on.

    Args:
        codes: uint8 ``[S, H, P, N * bits / 8]``.
        channel: fp16 ``[S, H, P]``, None with ``fixed``.
        scale: fp16 ``[S, H, N]``.
        fixed: fp16 ``[H, P]`` or None.
        recent: fp32 ``[S, R - 1, H P + H + G N]``, None where every token rounds.
        count: int32 ``[S]``, filled rows, None likewise.
        key: fp32 ``[S, G, N]``.
        bits: 4 or 8.
    """
    heads, channels, states = *codes.shape[1:3], scale.shape[-1]
    qmax = torch.tensor(float((1 << (bits - 1)) - 1), device=codes.device)
    wide = (fixed if channel is None else channel).to(torch.float32)  # type: ignore[union-attr]
    share = heads // key.shape[1]
    by = (scale.to(torch.float32) / qmax) * key.repeat_interleave(share, 1)
    found = wide * folded_sum(unpack(codes, bits, states).to(torch.float32) * by.unsqueeze(-2))
    if recent is None or count is None:
        return found
    kept = torch.ones_like(found[..., 0])
    factors: list[Tensor] = []
    for j in reversed(range(recent.shape[1])):
        _, decay, b = recent[:, j].split([heads * channels, heads, key[0].numel()], 1)
        dots = folded_sum(b.view_as(key) * key).repeat_interleave(share, 1)
        filled = (count > j)[:, None]
        factors.insert(0, kept * dots)
        kept = torch.where(filled, kept * decay, kept)
    found = kept.unsqueeze(-1) * found
    for j, factor in enumerate(factors):
        drive = recent[:, j, : heads * channels].unflatten(1, (heads, channels))
        found = torch.where((count > j)[:, None, None], found + factor.unsqueeze(-1) * drive, found)
    return found


def dsq_delta_update(
    codes: Tensor,
    channel: Tensor | None,
    scale: Tensor,
    fixed: Tensor | None,
    recent: Tensor | None,
    count: Tensor | None,
    value: Tensor,
    decay: Tensor,
    step: Tensor,
    key: Tensor,
    query: Tensor,
    bits: int,
    refit: bool = False,
    dither: bool = False,
) -> Tensor:
    """One token with packed states, which are replaced; see :mod:`llmcompress_kernels.delta_state`."""
    before = told(codes, channel, scale, fixed, recent, count, key, bits)
    change = (value - decay.unsqueeze(-1) * before) * step.unsqueeze(-1)
    held, token, how = (codes, channel, scale, fixed), (change, decay, key, query), (bits, refit, dither)
    if recent is None or count is None:
        return dsq_state_update(*held, *token, *how)
    return dsq_replay_update(*held, recent, count, *token, *how)
