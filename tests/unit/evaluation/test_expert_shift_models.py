"""Shift of whole models: recording, forced routing, and the table of causes."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from llmcompress.evaluation.expert_shift import RoutingCost, measure_shift, moe_blocks, routing_cost, shift_report
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.skipping import attach


def pair(tiny, family, noise=0.3):
    """A model and a copy with disturbed expert weights and one disturbed router."""
    dense = tiny.model(family)
    other = copy.deepcopy(dense)
    generator = torch.Generator().manual_seed(1)
    layout = layout_from_config(dense.config.to_dict())
    with torch.no_grad():
        for _, bank in moe_blocks(layout):
            for name in (bank.gate_up, bank.down, bank.router.weight):
                weight = other.get_parameter(name)
                weight += noise * weight.std() * torch.randn(weight.shape, generator=generator)
    return dense, other, layout


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(3, 64, (3, 24), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def nll(model, tokens):
    logits = model(tokens).logits[:, :-1]
    return math.exp(torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()))


def test_a_model_does_not_shift_from_itself(tiny, moe_family, tokens):
    model = tiny.model(moe_family)
    layout = layout_from_config(model.config.to_dict())
    for row in measure_shift(model, copy.deepcopy(model), layout, tokens):
        assert row["cr_any"] == 0 and row["overlap"] == 1 and row["kl_topk"] == pytest.approx(0, abs=1e-6)
        assert row["tokens_per_expert"]["dense"] == row["tokens_per_expert"]["compressed"]
        assert row["tokens"] == tokens.numel()


def test_shift_rates_match_a_direct_comparison(tiny, tokens):
    dense, other, layout = pair(tiny, "olmoe")
    rows = measure_shift(dense, other, layout, tokens, batch=2)
    with torch.no_grad():
        logits = [m(tokens, output_router_logits=True).router_logits for m in (dense, other)]
    for row, left, right in zip(rows, *logits):
        k = layout.blocks[0].bank.top_k
        a, b = left.topk(k).indices.sort(-1).values, right.topk(k).indices.sort(-1).values
        assert row["cr_any"] == pytest.approx(float((a != b).any(-1).float().mean()))
        assert sum(row["tokens_per_expert"]["compressed"]) == tokens.numel() * k
    assert rows[0]["cr_any"] > 0


def test_routing_cost_columns(tiny, moe_family, tokens):
    dense, other, layout = pair(tiny, moe_family)
    cost = routing_cost(dense, other, layout, tokens, batch=2)
    assert cost.dense == pytest.approx(nll(dense, tokens), rel=1e-4)
    assert cost.compressed == pytest.approx(nll(other, tokens), rel=1e-4)
    assert cost.dense_shifted != pytest.approx(cost.dense, rel=1e-4)
    # a few tokens change little: the columns must differ by more than rounding
    assert cost.compressed_unshifted != pytest.approx(cost.compressed, rel=1e-5)


def test_costs_are_relative_to_the_dense_model():
    found = RoutingCost(10.0, 12.0, 11.0, 15.0, 3).to_dict()
    assert [found[key] for key in ("shift_alone", "weights_alone", "both")] == pytest.approx([0.2, 0.1, 0.5])


def test_forcing_removes_a_pure_router_disturbance(tiny, tokens):
    """Only the routers differ: the compressed model with dense routing is the dense model, and vice versa."""
    dense = tiny.model("mixtral")
    other = copy.deepcopy(dense)
    layout = layout_from_config(dense.config.to_dict())
    with torch.no_grad():
        for _, bank in moe_blocks(layout):
            other.get_parameter(bank.router.weight).neg_()
    cost = routing_cost(dense, other, layout, tokens)
    assert cost.compressed_unshifted == pytest.approx(cost.dense, rel=1e-5)
    assert cost.dense_shifted == pytest.approx(cost.compressed, rel=1e-5)
    assert cost.compressed != pytest.approx(cost.dense, rel=1e-3)


def test_hooks_are_gone_and_a_policy_comes_back(tiny, tokens):
    dense, other, layout = pair(tiny, "mixtral")
    attach(other, layout, {"alpha": 0.9})
    report = shift_report(dense, other, layout, tokens)
    assert other.llmcompress_skipping.policy.alpha == 0.9
    assert not any(m._forward_hooks for m in dense.modules())
    plain = copy.deepcopy(other)
    plain.llmcompress_skipping.detach()
    assert report["forced_routing"]["compressed"] == pytest.approx(nll(plain, tokens), rel=1e-4)
