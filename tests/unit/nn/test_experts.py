from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.models.layout import ExpertBank, RouterView
from llmcompress.nn.experts import PackedExperts
from llmcompress.quant.codecs import codec
from llmcompress.quant.spec import QuantSpec

BANK = ExpertBank("m", 4, 2, 16, 12, RouterView("r", "softmax_topk", True))
SPEC = QuantSpec(4, 8)


def fill(module: PackedExperts, bank: ExpertBank) -> dict[str, torch.Tensor]:
    """Random weights in ``module``; returns what they decode to."""
    torch.manual_seed(0)
    dense = {}
    for key, name in (("gate_up_proj", bank.gate_up), ("down_proj", bank.down)):
        weight, side = torch.randn(bank.shape(name)), getattr(module, key)
        if isinstance(side, torch.nn.Parameter):
            side.data.copy_(weight)
            dense[key] = weight
            continue
        scale, zero = find_grid(weight, SPEC, "minmax")
        packed = codec("int_group").encode(round_codes(weight, scale, zero, SPEC), scale, zero, SPEC)
        side.load_state_dict(dict(packed.tensors))
        dense[key] = codec("int_group").decode(packed)
    for parameter in (module.gate_up_proj_bias, module.down_proj_bias):
        if parameter is not None:
            parameter.data.normal_()
    return dense


@pytest.mark.parametrize(("gate_up", "down"), [(SPEC, SPEC), (SPEC, None), (None, SPEC)])
def test_against_dense_experts(gate_up: QuantSpec | None, down: QuantSpec | None) -> None:
    module = PackedExperts(BANK, gate_up, down)
    dense = fill(module, BANK)
    x, index, weights = torch.randn(5, 16), torch.tensor([[0, 1], [3, 2], [4, 4], [1, 4], [2, 0]]), torch.rand(5, 2)
    expected = torch.zeros(5, 16)
    for token, slot in torch.cartesian_prod(torch.arange(5), torch.arange(2)).tolist():
        expert = int(index[token, slot])
        if expert < 4:
            gate, up = (dense["gate_up_proj"][expert] @ x[token]).chunk(2)
            inner = torch.nn.functional.silu(gate) * up
            expected[token] += weights[token, slot] * (dense["down_proj"][expert] @ inner)
    torch.testing.assert_close(module(x, index, weights), expected, atol=1e-4, rtol=1e-4)


def test_a_weight_that_is_replaced_after_the_first_call_is_used() -> None:
    module, twin = PackedExperts(BANK, SPEC, SPEC), PackedExperts(BANK, SPEC, SPEC)
    fill(module, BANK)
    x, index, weights = torch.randn(3, 16), torch.randint(0, 4, (3, 2)), torch.rand(3, 2)
    before = module(x, index, weights)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    state["down_proj.weight_scale"] *= 2
    module.down_proj.load_state_dict({n.rpartition(".")[2]: t for n, t in state.items() if n.startswith("down")})
    twin.load_state_dict(state)
    assert torch.equal(module(x, index, weights), twin(x, index, weights))
    assert not torch.equal(module(x, index, weights), before)


def test_interleaved_biases_keep_the_order_of_the_family() -> None:
    plain = replace(BANK, bias=True)
    module, twin = PackedExperts(replace(plain, interleaved=True), SPEC, SPEC), PackedExperts(plain, SPEC, SPEC)
    fill(module, plain)
    twin.load_state_dict(module.state_dict())
    bias = module.gate_up_proj_bias
    twin.gate_up_proj_bias.data = torch.cat((bias[:, 0::2], bias[:, 1::2]), dim=1)
    x, index, weights = torch.randn(3, 16), torch.randint(0, 4, (3, 1)), torch.ones(3, 1)
    assert torch.equal(module(x, index, weights), twin(x, index, weights))


def test_state_dict_names() -> None:
    module = PackedExperts(replace(BANK, bias=True), SPEC, None, device="meta")
    assert set(module.state_dict()) == {
        "gate_up_proj.weight_packed", "gate_up_proj.weight_scale", "gate_up_proj.weight_zero_point",
        "down_proj", "gate_up_proj_bias", "down_proj_bias",
    }  # fmt: skip
    assert "experts=4" in repr(module)
    assert not any(parameter.requires_grad for parameter in module.parameters())
