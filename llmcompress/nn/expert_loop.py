"""Routed experts one after the other: the plain definition of what transformers' experts functions compute.

Legend: T tokens, H hidden, E experts, k experts per token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def run_experts(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Run those experts that some token chose.

    Args:
        experts: A transformers experts module with the flags of ``use_experts_implementation``.
        hidden_states: ``[T, H]``.
        top_k_index: int64 ``[T, k]``, ``E`` marks a skipped slot.
        top_k_weights: ``[T, k]``.

    Returns:
        ``[T, H]``; zero rows for tokens without an expert.
    """
    output = torch.zeros_like(hidden_states)
    for expert in top_k_index.unique().tolist():
        if expert >= experts.num_experts:
            continue
        token, slot = torch.where(top_k_index == expert)
        inner = _project(experts, "gate_up_proj" if experts.has_gate else "up_proj", hidden_states[token], expert)
        inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
        result = _project(experts, "down_proj", inner, expert)
        if experts.has_post_expert_norm:
            result = experts.post_expert_norm(result)
        output.index_add_(0, token, (result * top_k_weights[token, slot, None]).to(output.dtype))
    return output


def _project(experts: Any, name: str, x: Tensor, expert: int) -> Tensor:
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return nn.functional.linear(x, weight.mT if experts.is_transposed else weight, bias)
