"""The run-time policy on real (tiny) models: what it changes, what it must not change, and its books."""

from __future__ import annotations

import json

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.models.registry import layout_from_config
from llmcompress.models.router import Router
from llmcompress.nn.skipping import attach

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def layout_of(model):
    return layout_from_config(model.config.to_dict())


def prompt(batch: int = 2, length: int = 48, seed: int = 0) -> torch.Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def routing_of(model, bank, ids, **kwargs):
    """(index, weights) that reach the experts of a bank."""
    seen = []

    def watch(module, args):
        seen.append((args[1].clone(), args[2].clone()))

    handle = model.get_submodule(bank.module).register_forward_pre_hook(watch)
    model(ids, use_cache=False, **kwargs)
    handle.remove()
    return seen[-1]


def reference_routing(index, weights, bank, alpha, lengths, renormalize):
    """Eq. 6 token by token, for the ``sequence`` scope without padding."""
    index, weights = index.clone(), weights.clone()
    start = 0
    for length in lengths:
        rows = range(start, start + length)
        counts = [sum(e in index[t].tolist() for t in rows) for e in range(bank.num_experts)]
        bad = {e for e, c in enumerate(counts) if c < alpha * length * bank.top_k / bank.num_experts}
        for t in rows:
            before = weights[t].sum()
            for slot in range(bank.top_k):
                if int(index[t, slot]) in bad:
                    index[t, slot], weights[t, slot] = bank.num_experts, 0
            if renormalize and float(weights[t].sum()) > 0:
                weights[t] *= before / weights[t].sum()
        start += length
    return index, weights


def test_first_moe_layer_follows_equation_6(tiny, moe_family):
    model = tiny.model(moe_family)
    layout = layout_of(model)
    bank = next(block.bank for block in layout.blocks if block.bank is not None)
    ids = prompt()
    index, weights = routing_of(model, bank, ids)
    controller = attach(model, layout, {"alpha": 0.9})
    got_index, got_weights = routing_of(model, bank, ids)
    renormalize = moe_family not in ("phimoe", "qwen2_moe", "olmoe", "deepseek_v2", "flex_olmo", "llama4_text")
    # shares of one, before each expert's factor
    factors = Router(model, bank.router).rule(bank.top_k).factors_of(index)
    factors = torch.ones_like(weights) if factors is None else factors
    expected = reference_routing(index, weights / factors, bank, 0.9, [48, 48], renormalize)
    assert torch.equal(got_index, expected[0])
    assert torch.allclose(got_weights / factors, expected[1], atol=1e-6)
    assert (got_index == bank.num_experts).any(), "the example must skip something"
    books = controller.statistics()["layers"][0]
    assert books["slots_dropped"] == int((got_index == bank.num_experts).sum())
    assert books["slots"] == index.numel()


def test_experts_compute_exactly_the_kept_slots(tiny, moe_family):
    """Dense experts with the sentinel give what zero weights give on the untouched implementation."""
    model = tiny.model(moe_family)
    layout = layout_of(model)
    bank = next(block.bank for block in layout.blocks if block.bank is not None)
    experts = model.get_submodule(bank.module)
    x = torch.randn(20, bank.hidden, generator=torch.Generator().manual_seed(2))
    index = torch.stack([torch.randperm(bank.num_experts)[: bank.top_k] for _ in range(20)])
    weights = torch.rand(20, bank.top_k)
    drop = torch.rand(20, bank.top_k) < 0.4
    drop[0] = True
    expected = experts(x, index, weights.masked_fill(drop, 0))
    attach(model, layout, {"alpha": 0.5})
    got = experts(x, index.masked_fill(drop, bank.num_experts), weights.masked_fill(drop, 0))
    assert torch.allclose(got, expected, atol=1e-5)
    assert torch.equal(got[0], torch.zeros(bank.hidden))


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_a_policy_that_cannot_act_changes_no_bit_and_detaches_cleanly(tiny, implementation):
    model = tiny.model("mixtral")
    model.set_experts_implementation(implementation)
    ids = prompt(length=12)
    before = model(ids).logits
    controller = attach(model, layout_of(model), {"alpha": 0.3})  # 0.3 * 12 * 2 / 8 < 1
    assert torch.equal(model(ids).logits, before)
    assert controller.statistics()["calls"] == {"prefill": 0, "short": 1, "decode": 0}
    controller.detach()
    assert model.config._experts_implementation == implementation
    assert torch.equal(model(ids).logits, before)
    assert not hasattr(model, "llmcompress_skipping")
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_alpha_towards_zero_is_the_dense_model(tiny, moe_family):
    model = tiny.model(moe_family)
    model.set_experts_implementation("eager")
    ids = prompt(length=64)
    before = model(ids).logits
    attach(model, layout_of(model), {"alpha": 1e-6, "min_len": 1})
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_real_tokens(tiny, side):
    model = tiny.model("mixtral")
    attach(model, layout_of(model), {"alpha": 0.9})
    ids = prompt(batch=1, length=40)
    alone = model(ids).logits
    pad = torch.zeros(1, 9, dtype=torch.int64)
    ones = torch.ones_like(ids)
    order = (pad, ids) if side == "left" else (ids, pad)
    mask = (torch.zeros_like(pad), ones) if side == "left" else (ones, torch.zeros_like(pad))
    mask = torch.cat(mask, -1)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    padded = model(torch.cat(order, -1), attention_mask=mask, position_ids=positions).logits
    kept = padded[:, 9:] if side == "left" else padded[:, :40]
    assert torch.allclose(kept, alone, atol=1e-4)


def test_padding_without_a_mask_is_told_by_lengths(tiny):
    model = tiny.model("mixtral")
    controller = attach(model, layout_of(model), {"alpha": 0.9})
    ids = prompt(batch=2, length=60)
    short = ids[:1, :40]
    alone = model(short).logits
    ids[0, 40:] = 0
    assert not torch.allclose(model(ids).logits[:1, :40], alone, atol=1e-4), "the example must tell"
    with controller.padded(torch.tensor([40, 60])):
        together = model(ids).logits
    assert torch.allclose(together[:1, :40], alone, atol=1e-4)
    assert torch.allclose(together[1:], model(ids[1:]).logits, atol=1e-4)


def test_a_prompt_below_min_len_is_left_alone_in_any_company(tiny):
    model = tiny.model("mixtral")
    ids = prompt(batch=2, length=60)
    ids[0, 40:] = 0
    plain = model(ids[:1, :40]).logits
    mask = (torch.arange(60) < torch.tensor([[40], [60]])).long()
    attach(model, layout_of(model), {"alpha": 0.9, "min_len": 50})
    together = model(ids, attention_mask=mask).logits
    assert torch.allclose(together[:1, :40], plain, atol=1e-4)
    assert torch.allclose(together[1:], model(ids[1:]).logits, atol=1e-4)


def test_sequence_scope_does_not_see_the_rest_of_the_batch_and_batch_scope_does(tiny):
    model = tiny.model("mixtral")
    layout = layout_of(model)
    ids = prompt(batch=3, length=40)
    controller = attach(model, layout, {"alpha": 0.9})
    together = model(ids).logits
    assert torch.allclose(together[1:2], model(ids[1:2]).logits, atol=1e-4)
    controller.detach()
    attach(model, layout, {"alpha": 0.9, "scope": "batch"})
    assert not torch.allclose(model(ids).logits[1:2], model(ids[1:2]).logits, atol=1e-4)


def test_batch_scope_skips_whole_experts(tiny):
    model = tiny.model("olmoe")
    layout = layout_of(model)
    bank = layout.blocks[0].bank
    attach(model, layout, {"alpha": 0.9, "scope": "batch"})
    free = routing_of(tiny.model("olmoe"), bank, prompt())[0]
    index, _ = routing_of(model, bank, prompt())
    threshold = 0.9 * 96 * bank.top_k / bank.num_experts
    counts = torch.bincount(free.flatten(), minlength=bank.num_experts)
    gone = (counts < threshold).nonzero().flatten().tolist()
    assert gone and not set(gone) & set(index.flatten().tolist())


def generate(model, ids, **kwargs):
    return model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0, **kwargs)


def test_decode_is_left_alone_unless_sticky(tiny):
    model = tiny.model("mixtral")
    layout = layout_of(model)
    ids = prompt(batch=2, length=40)
    controller = attach(model, layout, {"alpha": 0.9})
    generate(model, ids)
    off = controller.statistics()
    assert off["calls"]["prefill"] == 1 and off["calls"]["decode"] == 5
    assert off["total"]["tokens"] == 2 * 40 * 2, "only prompt tokens are on the books"
    controller.detach()
    controller = attach(model, layout, {"alpha": 0.9, "decode": "sticky"})
    generate(model, ids)
    sticky = controller.statistics()
    assert sticky["total"]["tokens"] == 2 * (40 + 5) * 2
    assert sticky["total"]["slots_dropped"] >= off["total"]["slots_dropped"]


def test_top_k_minus_one_drops_one_slot_per_prompt_token(tiny, moe_family):
    model = tiny.model(moe_family)
    layout = layout_of(model)
    controller = attach(model, layout, {"method": "top_k_minus_one"})
    model(prompt(batch=2, length=10))
    for books, block in zip(controller.statistics()["layers"], (b for b in layout.blocks if b.bank)):
        assert books["slots_dropped"] == 20 and books["slots"] == 20 * block.bank.top_k


def test_reroute_leaves_no_slot_empty_here(tiny, moe_family):
    model = tiny.model(moe_family)
    layout = layout_of(model)
    controller = attach(model, layout, {"alpha": 0.6, "fallback": "reroute"})
    logits = model(prompt()).logits
    total = controller.statistics()["total"]
    assert torch.isfinite(logits).all() and total["slots_dropped"] > 0
    if moe_family != "deepseek_v3":  # its group limit may leave fewer than k candidates
        assert total["tokens_without_expert"] == 0


def test_keep_top1_leaves_no_token_without_expert(tiny):
    model = tiny.model("mixtral")
    layout = layout_of(model)
    lost = []
    for keep in (False, True):
        controller = attach(model, layout, {"alpha": 1.0, "keep_top1": keep})
        model(prompt())
        lost.append(controller.statistics()["total"]["tokens_without_expert"])
        controller.detach()
    assert lost[0] > 0 and lost[1] == 0


def test_statistics_are_json_and_reset(tiny):
    model = tiny.model("qwen2_moe")
    controller = attach(model, layout_of(model), {"alpha": 0.9})
    model(prompt())
    books = json.loads(json.dumps(controller.statistics()))
    assert 0 < books["expert_skip_rate"] < 1 and 0 < books["slot_drop_rate"] < 0.9 and books["seconds"] > 0
    assert books["total"]["experts_skipped"] <= books["total"]["experts_used"]
    controller.reset()
    assert controller.statistics()["total"]["slots"] == 0 and controller.statistics()["seconds"] == 0


def test_refusals(tiny):
    model = tiny.model("mixtral")
    layout = layout_of(model)
    for policy in ({"alpha": 0.0}, {"alpha": 1.5}, {"scope": "token"}, {"beta": 1}):
        with pytest.raises(InputError):
            attach(model, layout, policy)
    attach(model, layout, {})
    with pytest.raises(InputError, match="already follows"):
        attach(model, layout, {})
    dense = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4,
             "num_key_value_heads": 2, "intermediate_size": 48, "vocab_size": 64}  # fmt: skip
    with pytest.raises(InputError, match="no experts"):
        attach(model, layout_from_config(dense), {})
