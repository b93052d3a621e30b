"""EAC-MoE test 5: PESF (Eq. 6) on models: exact rule, no-ops, padding, empty slots, renormalisation, gpt_oss."""

from __future__ import annotations

import pytest
import torch

from llmcompress.models.registry import layout_from_config
from llmcompress.models.router import Router
from llmcompress.nn.skipping import attach

NOT_RENORMALIZED = {"phimoe", "qwen2_moe", "olmoe", "deepseek_v2", "flex_olmo", "llama4_text"}


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


def ids(batch=1, length=60):
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(3))


def routed(model, bank, tokens):
    seen = []
    experts = model.get_submodule(bank.module)
    handle = experts.register_forward_pre_hook(lambda _, args: seen.append((args[1], args[2])))
    logits = model(tokens, use_cache=False).logits
    handle.remove()
    return (*seen[0], logits)


def first_bank(layout):
    return next(block.bank for block in layout.blocks if block.bank is not None)


@pytest.mark.parametrize("alpha", [0.3, 0.7, 1.0])
def test_rule_and_renormalisation_of_every_family(tiny, moe_family, alpha):
    model = tiny.model(moe_family)
    layout = layout_from_config(model.config.to_dict())
    bank = first_bank(layout)
    tokens = ids()
    index, weights, _ = routed(model, bank, tokens)
    controller = attach(model, layout, {"alpha": alpha})
    new_index, new_weights, _ = routed(model, bank, tokens)
    counts = torch.bincount(index.flatten(), minlength=bank.num_experts)
    pruned = counts < alpha * tokens.shape[1] * bank.top_k / bank.num_experts
    assert torch.equal(new_index == bank.num_experts, pruned[index])
    kept = ~pruned[index]
    alive = kept.any(-1)
    assert (new_weights[~kept] == 0).all()
    factors = Router(model, bank.router).rule(bank.top_k).factors_of(index)
    if factors is not None:
        # shares of one, before each expert's factor
        weights, new_weights = weights / factors, new_weights / factors
    if moe_family not in NOT_RENORMALIZED:
        assert torch.allclose(new_weights[alive].sum(-1), weights[alive].sum(-1), atol=1e-5)
        ratio = weights.masked_fill(~kept, 0) / weights.masked_fill(~kept, 0).sum(-1, keepdim=True).clamp_min(1e-20)
        assert torch.allclose(new_weights[alive], (ratio * weights.sum(-1, keepdim=True))[alive], atol=1e-5)
    else:
        assert torch.equal(new_weights[kept], weights[kept])
    assert controller.statistics()["layers"][0]["experts_skipped"] == int((pruned & (counts > 0)).sum())


@pytest.mark.parametrize("alpha", [0.3, 0.7])
def test_short_prompts_are_left_alone(tiny, moe_family, alpha):
    """While alpha·l·k/N ≤ 1 an expert with one token is already above the threshold."""
    model = tiny.model(moe_family)
    layout = layout_from_config(model.config.to_dict())
    bank = first_bank(layout)
    length = int(bank.num_experts / (alpha * bank.top_k))
    before = model(ids(length=length)).logits
    controller = attach(model, layout, {"alpha": alpha})
    assert torch.equal(model(ids(length=length)).logits, before)
    assert controller.statistics()["total"]["slots"] == 0


def test_pruned_experts_receive_no_rows(tiny):
    """A counting experts function sees only the slots that the policy left."""
    model = tiny.model("olmoe")
    layout = layout_from_config(model.config.to_dict())
    bank = first_bank(layout)
    experts = model.get_submodule(bank.module)
    gate = experts._apply_gate
    rows = []
    experts._apply_gate = lambda inner: rows.append(inner.shape[0]) or gate(inner)
    controller = attach(model, layout, {"alpha": 1.0})
    model(ids(), use_cache=False)
    books = controller.statistics()["layers"][0]
    assert sum(rows) == books["slots"] - books["slots_dropped"] < books["slots"]
    assert len(rows) == books["experts_used"] - books["experts_skipped"]


def test_gpt_oss_runs_although_its_own_experts_cannot_skip(tiny):
    model = tiny.model("gpt_oss")
    model.set_experts_implementation("eager")
    layout = layout_from_config(model.config.to_dict())
    controller = attach(model, layout, {"alpha": 1.0})
    logits = model(ids()).logits
    assert torch.isfinite(logits).all() and controller.statistics()["total"]["slots_dropped"] > 0


def test_padded_batch_gives_each_prompt_its_own_result(tiny):
    model = tiny.model("qwen2_moe")
    attach(model, layout_from_config(model.config.to_dict()), {"alpha": 0.7})
    long, short = ids(length=50), ids(length=30) + 1
    batch = torch.cat((long, torch.cat((torch.zeros(1, 20, dtype=torch.int64), short), -1)))
    mask = (torch.arange(50) >= torch.tensor([[0], [20]])).long()
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    together = model(batch, attention_mask=mask, position_ids=positions).logits
    assert torch.allclose(together[0], model(long).logits[0], atol=1e-4)
    assert torch.allclose(together[1, 20:], model(short).logits[0], atol=1e-4)
