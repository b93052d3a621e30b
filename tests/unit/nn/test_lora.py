import json

import pytest
import torch
from torch import nn

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.errors import InputError
from llmcompress.nn import lora
from llmcompress.nn.linear import PackedLinear
from llmcompress.quant.codecs import codec
from llmcompress.quant.spec import QuantSpec

SPEC = QuantSpec(bits=4, group_size=8)


def packed_linear(seed=0, n=12, k=16):
    weight = torch.randn(n, k, generator=torch.Generator().manual_seed(seed))
    scale, zero = find_grid(weight, SPEC, "minmax")
    packed = codec(SPEC.codec).encode(round_codes(weight, scale, zero, SPEC), scale, zero, SPEC)
    module = PackedLinear(k, n, SPEC)
    module.load_state_dict(packed.tensors)
    return module, codec(SPEC.codec).decode(packed)


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(16, 16, bias=False)
        self.second, self.decoded = packed_linear()

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def test_a_new_adapter_changes_nothing_and_learns_without_touching_the_base():
    torch.manual_seed(0)
    model, x = Two(), torch.randn(5, 16)
    before = model(x)
    codes = model.second.weight_packed.clone()
    parameters = lora.attach(model, ["first", "second"], 4, 8.0, seed=3)
    assert torch.equal(model(x), before)
    assert sorted(parameters) == ["first.lora_A", "first.lora_B", "second.lora_A", "second.lora_B"]
    optimizer = torch.optim.SGD(parameters.values(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()
    assert (model(x) - before).abs().max() > 1e-3
    assert torch.equal(model.second.base.weight_packed, codes)
    assert model.first.base.weight.grad is None


def test_gradients_pass_through_packed_weights_as_through_their_decoded_values():
    model, x = Two(), torch.randn(5, 16)
    lora.attach(model, ["first", "second"], 2, 4.0, seed=1)
    for module in lora.adapters(model).values():
        nn.init.normal_(module.lora_B)
    (model(x).square().sum()).backward()
    found = model.first.lora_A.grad.clone()
    model.zero_grad()
    dense = nn.Linear(16, 12, bias=False)
    dense.weight.data.copy_(model.decoded)
    model.second.base = dense.requires_grad_(False)
    (model(x).square().sum()).backward()
    torch.testing.assert_close(found, model.first.lora_A.grad, rtol=1e-4, atol=1e-4)


def test_with_its_first_values_an_adapter_changes_nothing_and_then_has_its_own_again():
    model, x = Two(), torch.randn(3, 16)
    base = model(x)
    parameters = lora.attach(model, ["second"], 2, 4.0, seed=1)
    start = {name: p.detach().clone() for name, p in parameters.items()}
    nn.init.normal_(parameters["second.lora_B"])
    tuned = model(x)
    with lora.switched(model, start):
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), tuned)


def test_what_an_adapter_adds_to_the_weight():
    model, x = Two(), torch.randn(3, 16)
    parameters = lora.attach(model, ["first"], 2, 4.0, seed=1)
    nn.init.normal_(parameters["first.lora_B"])
    tuned, adapter = model(x), model.first
    model.first = adapter.base
    model.first.weight.data += lora.added(adapter)
    torch.testing.assert_close(model(x), tuned)


def test_files_round_trip_and_damage_is_named(tmp_path):
    model, x = Two(), torch.randn(3, 16)
    parameters = lora.attach(model, ["first", "second"], 2, 4.0, seed=1)
    for name in ("first.lora_B", "second.lora_B"):
        nn.init.normal_(parameters[name])
    lora.save(model, tmp_path)
    again = Two()
    again.first.weight.data.copy_(model.first.base.weight)
    lora.load(again, tmp_path)
    assert torch.equal(again(x), model(x))
    with pytest.raises(InputError, match="does not fit"):
        lora.load(nn.Linear(2, 2), tmp_path)
    (tmp_path / lora.WEIGHTS).write_bytes(b"x" * 40)
    with pytest.raises(InputError, match="cannot read the adapter"):
        lora.load(Two(), tmp_path)


def test_a_config_of_another_rank_is_refused(tmp_path):
    model = Two()
    lora.attach(model, ["first"], 1, 4.0, seed=1)
    lora.save(model, tmp_path)
    config = json.loads((tmp_path / lora.CONFIG).read_text())
    (tmp_path / lora.CONFIG).write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(InputError, match=r"does not fit this model: first.lora_A is \[1, 16\], not \[4, 16\]"):
        lora.load(Two(), tmp_path)


def test_start_values_are_spread_evenly_within_the_bound_of_the_width():
    """As PEFT starts A (kaiming_uniform_ with a = √5); far from it, a learning rate means something else."""
    model = nn.Sequential(nn.Linear(64, 8))
    values = lora.attach(model, ["0"], 32, 4.0, seed=1)["0.lora_A"].detach() * 64**0.5
    assert 0.99 < float(values.max()) <= 1 and -1 <= float(values.min()) < -0.99
    assert abs(float(values.mean())) < 0.05 and abs(float(values.square().mean()) - 1 / 3) < 0.02
