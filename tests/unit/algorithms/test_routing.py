"""RouterRule against the routers of transformers, family by family."""

from __future__ import annotations

import math

import pytest
import torch

from llmcompress.algorithms.routing import RouterRule
from llmcompress.models.registry import layout_from_config
from llmcompress.models.router import Router


def first_router(tiny, family, **changes):
    model = tiny.model(family, **changes)
    layout = layout_from_config(model.config.to_dict())
    bank = next(block.bank for block in layout.blocks if block.bank is not None)
    router = Router(model, bank.router)
    return router, router.rule(bank.top_k)


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
    others = {family for family in tiny.families if not first_router(tiny, family)[1].conserves}
    assert others == {"phimoe", "qwen2_moe", "olmoe", "deepseek_v2", "flex_olmo", "llama4_text"}


def test_a_correction_decides_the_choice_and_not_the_weights():
    logits = torch.tensor([[1.0, 0.9, 0.2, 0.0]])
    for kind, floor in (("softmax_topk", 1e-20), ("sigmoid_group_topk", 1e-6)):
        plain = RouterRule(2, kind=kind, renormalizes=True, floor=floor)
        moved = RouterRule(2, kind=kind, renormalizes=True, floor=floor, correction=torch.tensor([0.0, -1.0, 0.0, 1.0]))
        assert plain.select(logits).tolist() == [[0, 1]]
        assert moved.select(logits).tolist() == [[3, 0]]
        dense = logits.softmax(-1) if kind == "softmax_topk" else logits.sigmoid()
        share = dense[0, 3] / (dense[0, 3] + dense[0, 0] + floor)
        assert torch.equal(moved.weigh(logits, torch.tensor([[3, 0]]))[0, 0], share)
        banned = torch.tensor([[False, False, False, True]])
        assert moved.select(logits, banned).tolist() == [[0, 2]]


@pytest.mark.parametrize("kind", ["softmax_topk", "sigmoid_group_topk"])
def test_a_model_that_moves_after_its_rule_was_read_takes_the_correction_along(kind):
    """Skipping is attached where a model is assembled, on the CPU, and an evaluation moves it to the GPU."""
    rule = RouterRule(2, kind=kind, correction=torch.zeros(4))
    logits, banned = torch.zeros(3, 4, device="meta"), torch.zeros(3, 4, dtype=torch.bool, device="meta")
    assert rule.select(logits, banned).device.type == "meta"


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
