from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.models import capture
from llmcompress.models.capture import (
    Routing,
    down,
    expert_weight,
    gated,
    identity,
    recorded_inputs,
    replaced_forward,
    write_expert_weight,
)
from llmcompress.models.registry import layout_from_config


def bank_of(model: Any) -> Any:
    banks = [block.bank for block in layout_from_config(model.config.to_dict()).blocks if block.bank is not None]
    return banks[0]


def test_routing_groups_tokens_by_expert() -> None:
    index = torch.tensor([[2, 0], [1, 2], [3, 4], [0, 4]])
    weights = torch.arange(8.0).view(4, 2)
    routing = Routing.of(index, weights, 4)
    assert routing.counts == [2, 1, 2, 1]
    found = {e: [(int(t), float(w)) for t, w in zip(*next(iter(routing.pieces(e))))] for e in range(4)}
    assert found == {0: [(0, 1.0), (3, 6.0)], 1: [(1, 2.0)], 2: [(0, 0.0), (1, 3.0)], 3: [(2, 4.0)]}


def test_routing_pieces_cover_everything_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "PIECE", 3)
    index = torch.randint(0, 3, (20, 1))
    routing = Routing.of(index, torch.rand(20, 1), 3)
    for expert in range(3):
        parts = [tokens for tokens, _ in routing.pieces(expert)]
        assert all(len(part) <= 3 for part in parts)
        assert torch.cat(parts).tolist() == (index[:, 0] == expert).nonzero()[:, 0].tolist()


def test_slices_of_experts_equal_the_whole_module(moe_family: str, tiny: Any) -> None:
    model = tiny.model(moe_family)
    bank = bank_of(model)
    module = model.get_submodule(bank.module)
    x = torch.randn(7, bank.hidden)
    for expert in (0, bank.num_experts - 1):
        with torch.no_grad():
            expected = module(x, torch.full((7, 1), expert), torch.ones(7, 1))
            found = down(module, bank, expert, gated(module, bank, expert, x))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_expert_weights_are_canonical_and_go_back(moe_family: str, tiny: Any) -> None:
    model = tiny.model(moe_family)
    bank = bank_of(model)
    module = model.get_submodule(bank.module)
    for name in (bank.gate_up, bank.down):
        before = model.get_parameter(name).detach().clone()
        taken = expert_weight(module, bank, name, slice(1, 3))
        assert taken.shape == (2, *bank.shape(name)[1:])
        write_expert_weight(module, bank, name, slice(1, 3), taken * 2)
        assert torch.equal(model.get_parameter(name)[1:3], before[1:3] * 2)
        assert torch.equal(model.get_parameter(name)[3:], before[3:])
        assert torch.equal(expert_weight(module, bank, name, slice(1, 3)), taken * 2)


def test_replaced_forward_is_undone() -> None:
    linear = torch.nn.Linear(3, 3)
    x = torch.randn(2, 3)
    before = linear(x)
    with replaced_forward(linear, identity):
        assert linear(x) is x
        with replaced_forward(linear, lambda y: y * 2):
            assert torch.equal(linear(x), x * 2)
        assert linear(x) is x
    assert torch.equal(linear(x), before)
    assert "forward" not in linear.__dict__


def test_recorded_inputs() -> None:
    first, second = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)
    seen: list[tuple[int, torch.Size]] = []
    with recorded_inputs([first, second], lambda position, x: seen.append((position, x.shape))):
        second(first(torch.randn(5, 3)))
    second(first(torch.randn(5, 3)))
    assert seen == [(0, torch.Size([5, 3])), (1, torch.Size([5, 4]))]
