"""Replace dense modules by packed ones, in place, on the meta device or anywhere else."""

from __future__ import annotations

import difflib

import torch
from torch import nn

from llmcompress.errors import InputError
from llmcompress.models.layout import Block, ExpertBank, ModelLayout
from llmcompress.nn.adapted_mixtures import adapt_mixtures
from llmcompress.nn.experts import PackedExperts
from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.packed import replace_module
from llmcompress.quant.spec import QuantPlan


def swap_modules(model: nn.Module, layout: ModelLayout, plan: QuantPlan, dtype: torch.dtype | None = None) -> None:
    """Put empty packed modules where ``plan`` names a weight.

    Args:
        model: A transformers causal language model of this layout.
        layout: Its layout.
        plan: Plan name → spec; weights that are not named stay as they are.
        dtype: Type of biases and of dense projections beside packed ones; the model's by default.

    Raises:
        InputError: The plan names a weight that the model does not have.
    """
    known = {name for name, *_ in layout.quantizable()}
    unknown = sorted(set(plan) - known)
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = f"the nearest is {near[0]}" if near else None
        raise InputError(f"{', '.join(unknown[:5])}: no such weight in a {layout.model_type} of this size", hint)
    adapt_mixtures(model, layout)
    for block in layout.blocks:
        _swap_linears(model, block, plan, dtype)
        bank = block.bank
        if bank is not None and (bank.gate_up in plan or bank.down in plan):
            _swap_experts(model, bank, plan, dtype)


def _swap_linears(model: nn.Module, block: Block, plan: QuantPlan, dtype: torch.dtype | None) -> None:
    for view in block.linears():
        spec = plan.get(view.name)
        if spec is None:
            continue
        old = model.get_submodule(view.name)
        has_bias = getattr(old, "bias", None) is not None
        weight = old.weight
        assert isinstance(weight, torch.Tensor)
        kept = dtype or weight.dtype
        replace_module(
            model,
            view.name,
            PackedLinear(view.in_features, view.out_features, spec, has_bias, kept, weight.device),
        )


def _swap_experts(model: nn.Module, bank: ExpertBank, plan: QuantPlan, dtype: torch.dtype | None) -> None:
    old = model.get_submodule(bank.module)
    weight = old.down_proj
    assert isinstance(weight, torch.Tensor)
    constants = {}
    if bank.activation == "gpt_oss":
        constants = {"alpha": float(old.alpha), "limit": float(old.limit)}  # type: ignore[arg-type]
    packed = PackedExperts(
        bank, plan.get(bank.gate_up), plan.get(bank.down), dtype or weight.dtype, weight.device, **constants
    )
    replace_module(model, bank.module, packed)
