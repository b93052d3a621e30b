"""Definition of ``moe_group_gemm``: expert by expert over the experts that have tokens.

Token t has k slots j with an expert ``e = index[t, j]`` (E for an empty slot) and its weight ``w = weights[t, j]``::

    y_t = Σ_j w D_e act(G_e x_t, U_e x_t)        act(g, u) = silu(g) u in most families, see :func:`gate`

``G_e`` and ``U_e`` are the halves of ``gate_up[e]`` ``[2I, H]``, ``D_e`` is ``down[e]`` ``[H, I]``; where there are
biases, each is added to its product.

Only weights of experts that have tokens are decoded, one expert at a time, so a few tokens cost a few experts and
the bank never exists in dense form.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from llmcompress_kernels.reference.group_gemm import canonical, decode, quantize_activations

# "bits" of a weight that is not packed
DENSE_BITS = 16
GATED = ("silu", "gelu", "gelu_pytorch_tanh", "gpt_oss")
# experts without a gate: the first projection has I rows instead of 2I
UNGATED = ("relu2",)
ACTIVATIONS = (*GATED, *UNGATED)


def first_rows(intermediate: int, activation: str) -> int:
    """Rows of an expert's first projection: gate and up, or up alone."""
    return intermediate if activation in UNGATED else 2 * intermediate


def gate(hidden: Tensor, activation: str, alpha: float, limit: float) -> Tensor:
    """Combine gate and up halves ``[..., 2I]`` into ``[..., I]``; without a gate ``[..., I]`` comes in.

    Raises:
        ValueError: The activation is unknown.
    """
    if activation == "relu2":
        return functional.relu(hidden).square()
    gates, ups = hidden.chunk(2, dim=-1)
    if activation == "silu":
        return functional.silu(gates) * ups
    if activation == "gelu":
        return functional.gelu(gates) * ups
    if activation == "gelu_pytorch_tanh":
        return functional.gelu(gates, approximate="tanh") * ups
    if activation == "gpt_oss":
        gates, ups = gates.clamp(max=limit), ups.clamp(min=-limit, max=limit)
        return (ups + 1) * (gates * torch.sigmoid(gates * alpha))
    raise ValueError(f"unknown activation {activation!r}")


def _expert_weight(
    expert: int,
    weight: Tensor,
    scale: Tensor | None,
    zero: Tensor | None,
    bits: int,
    group_size: int,
    columns: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense ``[N, K]`` weight of one expert."""
    if bits == DENSE_BITS:
        return weight[expert].to(dtype)
    if scale is None:
        raise ValueError("a packed weight needs its scale")
    zeros = None if zero is None else zero[expert]
    return decode(*canonical(weight[expert], scale[expert], zeros), bits, group_size, columns).to(dtype)


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, bits: int, group_size: int, int8: bool) -> Tensor:
    """One projection; only packed weights take quantized activations."""
    if not int8 or bits == DENSE_BITS:
        return functional.linear(x, weight, bias)
    rounded = quantize_activations(x, group_size)
    return functional.linear(rounded, weight.to(rounded.dtype), None if bias is None else bias.to(rounded.dtype)).to(
        x.dtype
    )


def moe_group_gemm(
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up: Tensor,
    gate_up_scale: Tensor | None,
    gate_up_zero: Tensor | None,
    gate_up_bias: Tensor | None,
    gate_up_bits: int,
    gate_up_group: int,
    down: Tensor,
    down_scale: Tensor | None,
    down_zero: Tensor | None,
    down_bias: Tensor | None,
    down_bits: int,
    down_group: int,
    intermediate: int,
    activation: str,
    alpha: float,
    limit: float,
    int8: bool = False,
) -> Tensor:
    """Experts over routed tokens; arguments as in :func:`llmcompress_kernels.ops.moe_group_gemm`.

    Contributions are added in fp32 and in the order of experts, so the result does not depend on
    how tokens are spread.
    """
    tokens, hidden = x.shape
    experts, slots = gate_up.shape[0], index.shape[-1]
    flat = index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    counts = torch.bincount(flat, minlength=experts + 1)[:experts].tolist()
    slot_weights = weights.reshape(-1)
    result = torch.zeros((tokens, hidden), dtype=torch.float32, device=x.device)
    start = 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        chosen = order[start : start + count]
        start += count
        rows = chosen // slots
        first = _expert_weight(
            expert, gate_up, gate_up_scale, gate_up_zero, gate_up_bits, gate_up_group, hidden, x.dtype
        )
        bias = None if gate_up_bias is None else gate_up_bias[expert].to(x.dtype)
        inner = gate(_product(x[rows], first, bias, gate_up_bits, gate_up_group, int8), activation, alpha, limit)
        del first
        second = _expert_weight(expert, down, down_scale, down_zero, down_bits, down_group, intermediate, x.dtype)
        bias = None if down_bias is None else down_bias[expert].to(x.dtype)
        outer = _product(inner, second, bias, down_bits, down_group, int8)
        # a token chooses an expert at most once, so the rows of one call are distinct
        result.index_add_(0, rows, outer.to(torch.float32) * slot_weights[chosen].to(torch.float32).unsqueeze(-1))
    return result.to(x.dtype)
