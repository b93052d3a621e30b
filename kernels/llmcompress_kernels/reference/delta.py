"""The gated delta rule (Yang et al., arXiv 2412.06464) as Qwen3-Next has it, and two relatives: the definitions.

A head's state ``S [K, V]`` maps keys to values. A token lets it decay, compares what it says of the token's key with
the token's value, and moves it by a share of the difference. Kimi Delta Attention (arXiv 2510.26692, equation 1) has
a decay for each column of a key. Lightning attention (arXiv 2401.04658) adds the value itself.

Legend: T tokens, H value heads, G key heads, K and V columns of a key and of a value, C = 2 G K + H V channels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, step: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens one after the other through the states of their heads.

    Args:
        query: float32 ``[T, H, K]``.
        key: Likewise.
        value: float32 ``[T, H, V]``.
        decay: float32 ``[T, H]``, factor of the state before a token, within 0 and 1; ``[T, H, K]`` where the rows
            of a state have their own.
        step: float32 ``[T, H]``, share of the difference that the state takes, within 0 and 1.
        state: float32 ``[H, K, V]`` before the first token.

    Returns:
        Results ``[T, H, V]`` and the state after the last token.
    """
    told = []
    for q, k, v, g, b in zip(query, key, value, decay, step):
        state = state * (g[:, None, None] if g.ndim == 1 else g[:, :, None])
        change = b[:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
        state = state + k[:, :, None] * change[:, None, :]
        told.append(torch.einsum("hkv,hk->hv", state, q))
    return torch.stack(told), state


def lightning_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Tokens one after the other through states that decay by constants.

    Args:
        query: float32 ``[T, H, K]``.
        key: Likewise.
        value: float32 ``[T, H, V]``.
        decay: float32 ``[H]``, factor of the state before a token, within 0 and 1.
        state: float32 ``[H, K, V]`` before the first token.

    Returns:
        Results ``[T, H, V]`` and the state after the last token.
    """
    told = []
    for q, k, v in zip(query, key, value):
        state = state * decay[:, None, None] + k[:, :, None] * v[:, None, :]
        told.append(torch.einsum("hkv,hk->hv", state, q))
    return torch.stack(told), state


def unit(x: Tensor) -> Tensor:
    """Rows of length one, but for a small constant."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)


def gated_delta_mix(
    mixed: Tensor,
    gates: Tensor,
    steps: Tensor,
    conv_weight: Tensor,
    dt_bias: Tensor,
    decay: Tensor,
    gain: Tensor,
    epsilon: float,
    key_heads: int,
    inputs: Tensor,
    state: Tensor,
    most: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer with the rule between its projections.

    Args:
        mixed: float32 ``[T, C]``, all queries, all keys, all values.
        gates: float32 ``[T, H V]``.
        steps: float32 ``[T, 2 H]``, of step sizes and then of decays.
        conv_weight: float32 ``[taps, C]``.
        dt_bias: float32 ``[H]``; a state decays by ``exp(decay softplus(. + dt_bias))``.
        decay: Likewise.
        gain: float32 ``[V]``, weight of the norm.
        epsilon: Epsilon of the norm.
        key_heads: G.
        inputs: float32 ``[taps - 1, C]``, of the convolution before the first token.
        state: float32 ``[H, K, V]``.
        most: Bound of step sizes: 2 where eigenvalues may be negative (arXiv 2411.12537).

    Returns:
        Results ``[T, H V]``, the last inputs and the state after the last token.
    """
    count, (heads, keys, values) = len(mixed), state.shape
    seen = torch.cat([inputs, mixed])
    taps = len(conv_weight)
    x = silu(sum((conv_weight[i] * seen[i : i + count] for i in range(taps)), torch.zeros_like(mixed)))
    query, key, value = x.split([key_heads * keys, key_heads * keys, heads * values], dim=-1)
    both = (unit(part.unflatten(-1, (key_heads, keys))) for part in (query, key))
    query, key = (part.repeat_interleave(heads // key_heads, dim=1) for part in both)
    sizes, times = steps.split(heads, dim=-1)
    told, state = gated_delta_rule(
        query * keys**-0.5, key, value.unflatten(-1, (heads, values)), (decay * softplus(times + dt_bias)).exp(),
        most * sizes.sigmoid(), state,
    )  # fmt: skip
    normed = gain * (told * torch.rsqrt(told.square().mean(-1, keepdim=True) + epsilon))
    return (normed * silu(gates.unflatten(-1, (heads, values)))).flatten(1), seen[count:], state


def kimi_delta_mix(
    mixed: Tensor,
    gates: Tensor,
    steps: Tensor,
    times: Tensor,
    conv_weight: Tensor,
    dt_bias: Tensor,
    decay: Tensor,
    gain: Tensor,
    epsilon: float,
    inputs: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """A layer with Kimi Delta Attention between its projections; G is H.

    Args:
        mixed: float32 ``[T, C]``, all queries, all keys, all values.
        gates: float32 ``[T, H V]``, which open by a sigmoid.
        steps: float32 ``[T, H]``, of step sizes.
        times: float32 ``[T, H K]``, of decays.
        conv_weight: float32 ``[taps, C]``.
        dt_bias: float32 ``[H K]``; row k of a state decays by ``exp(decay softplus(times + dt_bias))``.
        decay: float32 ``[H]``.
        gain: float32 ``[V]``, weight of the norm.
        epsilon: Epsilon of the norm.
        inputs: float32 ``[taps - 1, C]``, of the convolution before the first token.
        state: float32 ``[H, K, V]``.

    Returns:
        Results ``[T, H V]``, the last inputs and the state after the last token.
    """
    count, (heads, keys, values) = len(mixed), state.shape
    seen = torch.cat([inputs, mixed])
    x = silu(sum((tap * seen[i : i + count] for i, tap in enumerate(conv_weight)), torch.zeros_like(mixed)))
    query, key, value = (part.unflatten(-1, (heads, -1)) for part in x.split([heads * keys] * 2 + [heads * values], -1))
    factors = (decay[:, None] * softplus(times + dt_bias).unflatten(-1, (heads, keys))).exp()
    told, state = gated_delta_rule(unit(query) * keys**-0.5, unit(key), value, factors, steps.sigmoid(), state)
    normed = gain * (told * torch.rsqrt(told.square().mean(-1, keepdim=True) + epsilon))
    return (normed * gates.unflatten(-1, (heads, values)).sigmoid()).flatten(1), seen[count:], state


def lightning_mix(
    mixed: Tensor, gates: Tensor, decay: Tensor, gain: Tensor, epsilon: float, state: Tensor
) -> tuple[Tensor, Tensor]:
    """A layer with lightning attention between its projections (MiniMax-01, arXiv 2501.08313).

    Args:
        mixed: float32 ``[T, H (2 K + V)]``, a head's query, key and value side by side.
        gates: float32 ``[T, H V]``, which open by a sigmoid.
        decay: float32 ``[H]``, logarithm of the factor of a state before a token.
        gain: float32 ``[H V]``, weight of the norm over all heads together.
        epsilon: Epsilon of the norm.
        state: float32 ``[H, K, V]``.

    Returns:
        Results ``[T, H V]`` and the state after the last token.
    """
    heads, keys, values = state.shape
    query, key, value = silu(mixed).unflatten(-1, (heads, -1)).split([keys, keys, values], dim=-1)
    told, state = lightning_attention(query, key, value, decay.exp(), state)
    told = told.flatten(1)
    return gain * (told * torch.rsqrt(told.square().mean(-1, keepdim=True) + epsilon)) * gates.sigmoid(), state
