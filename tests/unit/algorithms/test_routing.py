"""RouterRule against the routers of transformers, family by family."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.algorithms.routing import RouterRule
from llmcompress.models.registry import layout_from_config


def first_router(tiny, family, **changes):
    model = tiny.model(family, **changes)
    layout = layout_from_config(model.config.to_dict())
    bank = next(block.bank for block in layout.blocks if block.bank is not None)
    router = model.get_submodule(bank.router.module)
    return router, RouterRule.of(router, bank.router, bank.top_k)


def sorted_by_expert(index, weights):
    order = index.argsort(-1)
    return index.gather(-1, order), weights.gather(-1, order)


@torch.no_grad()
def check(router, rule):
    x = torch.randn(300, 32, generator=torch.Generator().manual_seed(7)) * 2
    logits, weights, index = router(x)
    chosen = rule.select(logits)
    expected, given = sorted_by_expert(index, weights.float()), sorted_by_expert(chosen, rule.weigh(logits, chosen))
    assert torch.equal(expected[0], given[0])
    assert torch.allclose(expected[1], given[1], atol=1e-6)


def test_rule_equals_the_transformers_router(tiny, moe_family):
    check(*first_router(tiny, moe_family))


def test_group_limited_deepseek_v2(tiny):
    router, rule = first_router(tiny, "deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2)
    assert (rule.groups, rule.top_groups) == (4, 2)
    check(router, rule)


def test_only_conserving_families_say_so(tiny):
    conserving = {family for family in tiny.families if first_router(tiny, family)[1].conserves}
    assert conserving == {"mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"}


@pytest.mark.parametrize("kind", ["softmax_topk", "topk_softmax", "sparsemixer", "sigmoid_group_topk"])
def test_banned_experts_are_never_chosen_nor_weighed(kind):
    rule = RouterRule(2, kind=kind, renormalizes=kind == "sigmoid_group_topk")
    logits = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    banned = torch.zeros_like(logits, dtype=torch.bool)
    banned[:, :3] = True
    index = rule.select(logits, banned)
    assert int(index.min()) >= 3
    weights = rule.weigh(logits, index, banned)
    smaller = RouterRule(2, kind=kind, renormalizes=rule.renormalizes)
    assert torch.allclose(weights, smaller.weigh(logits[:, 3:], index - 3), atol=1e-6)
    assert math.isfinite(float(weights.sum()))
