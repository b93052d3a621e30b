"""Mamba-2 mixer for training: the chunked scan with everything shared that can be.

transformers' own torch path repeats B and C for every head. Here C·Bᵀ, the chunk states and the
read-out of the carried state are one matrix product per chunk for all heads of a group.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def chunked_scan(
    x: torch.Tensor, dt: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return ``y_t = h_t C_t`` with ``h_t = exp(dt_t a) h_{t-1} + dt_t x_t ⊗ B_t`` (Mamba-2, SSD).

    Args:
        x: ``[batch, tokens, heads, P]``; tokens a multiple of ``chunk``.
        dt: ``[batch, tokens, heads]``, after softplus.
        a: ``[heads]``, negative.
        b: ``[batch, tokens, N]``; one group shared by all heads.
        c: As ``b``.
        chunk: Tokens per chunk.

    Returns:
        ``[batch, tokens, heads, P]`` in the dtype of ``x``.
    """
    batch, tokens, heads, width = x.shape
    parts = tokens // chunk
    xd = (x * dt[..., None].to(x.dtype)).view(batch, parts, chunk, heads, width)
    b, c = b.view(batch, parts, chunk, -1), c.view(batch, parts, chunk, -1)
    decay = (dt.float() * a.float()).view(batch, parts, chunk, heads).cumsum(2)

    by_head = decay.transpose(2, 3)
    gap = by_head[..., :, None] - by_head[..., None, :]
    future = torch.ones(chunk, chunk, dtype=torch.bool).triu(1)
    mask = gap.masked_fill(future, -torch.inf).exp().to(x.dtype)
    scores = (c @ b.transpose(-1, -2))[:, :, None] * mask
    y = scores @ xd.transpose(2, 3)

    left = (decay[:, :, -1:] - decay).exp()[..., None].to(x.dtype)
    states = (xd * left).flatten(-2).transpose(-1, -2) @ b
    total = decay[:, :, -1].transpose(1, 2).cumsum(-1)
    # state at the start of part i is the sum over earlier parts j of exp(total[i-1] - total[j]) states[j]
    before = F.pad(total, (1, 0))[..., :-1]
    carry = (before[..., :, None] - total[..., None, :]).masked_fill(
        torch.ones(parts, parts, dtype=torch.bool).triu(0), -torch.inf
    )
    flat = states.view(batch, parts, heads, -1).transpose(1, 2)
    start = (carry.exp().to(x.dtype) @ flat).transpose(1, 2).reshape(batch, parts, heads * width, -1)
    carried = (c @ start.transpose(-1, -2)).view(batch, parts, chunk, heads, width)
    y = y.transpose(2, 3) + carried * decay.exp()[..., None].to(x.dtype)
    return y.reshape(batch, tokens, heads, width)


def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Causal depthwise convolution of ``[batch, tokens, channels]`` with ``weight`` ``[channels, 1, width]``."""
    width = weight.shape[-1]
    padded = F.pad(x, (0, 0, width - 1, 0))
    out = padded[:, width - 1 :] * weight[:, 0, -1]
    for tap in range(width - 1):
        out = out + padded[:, tap : tap + x.shape[1]] * weight[:, 0, tap]
    return out if bias is None else out + bias


def mixer_forward(mixer: torch.nn.Module, hidden: torch.Tensor, chunk: int = 64) -> torch.Tensor:
    """What the transformers mixer computes for a whole sequence without a cache; one group of B and C."""
    inner, heads, state = mixer.intermediate_size, mixer.num_heads, mixer.ssm_state_size
    projected = mixer.in_proj(hidden)
    gate, mixed, dt = projected.split([inner, inner + 2 * state, heads], dim=-1)
    mixed = F.silu(depthwise_conv(mixed, mixer.conv1d.weight, mixer.conv1d.bias))
    x, b, c = mixed.split([inner, state, state], dim=-1)
    dt = F.softplus(dt.float() + mixer.dt_bias.float())
    heads_x = x.unflatten(-1, (heads, mixer.head_dim))
    short = -hidden.shape[1] % chunk
    if short:
        heads_x, b, c = (F.pad(t, (0, 0) * (t.ndim - 2) + (0, short)) for t in (heads_x, b, c))
        dt = F.pad(dt, (0, 0, 0, short))
    y = chunked_scan(heads_x, dt, -mixer.A_log.float().exp(), b, c, chunk)
    y = y[:, : hidden.shape[1]] + heads_x[:, : hidden.shape[1]] * mixer.D.to(x.dtype)[:, None]
    return mixer.out_proj(mixer.norm(y.flatten(-2), gate))


def use_fast_mixers(model: torch.nn.Module) -> int:
    """Give every Mamba-2 mixer of a model the forward above; return how many there were."""
    count = 0
    for module in model.modules():
        if hasattr(module, "A_log") and hasattr(module, "dt_bias"):

            def forward(hidden_states: torch.Tensor, *_: object, mixer: torch.nn.Module = module, **__: object):
                return mixer_forward(mixer, hidden_states)

            module.forward = forward  # type: ignore[method-assign]
            count += 1
    return count


def half_lives(model: torch.nn.Module, hidden_inputs: dict[str, torch.Tensor] | None = None) -> dict[str, list[float]]:
    """Half-life in tokens of every head: ``ln 2 / (|A| E[dt])``.

    Args:
        model: A model with Mamba-2 mixers.
        hidden_inputs: Mixer name → its inputs ``[tokens, hidden]``, over which dt is averaged;
            without it dt is taken at the bias alone.
    """
    import math

    lives = {}
    for name, module in model.named_modules():
        if not (hasattr(module, "A_log") and hasattr(module, "dt_bias")):
            continue
        dt = module.dt_bias.detach().float()
        if hidden_inputs is not None:
            rows = module.in_proj.weight.detach().float()[-module.num_heads :]
            dt = hidden_inputs[name].float() @ rows.T + dt
        dt = F.softplus(dt).reshape(-1, module.num_heads).mean(0)
        lives[name] = (math.log(2) / (module.A_log.detach().float().exp() * dt)).tolist()
    return lives
