from __future__ import annotations

import copy

import pytest
import torch
from llmcompress_kernels import cpu

from llmcompress.algorithms.grids import find_grid, round_codes
from llmcompress.nn.linear import PackedLinear
from llmcompress.quant.codecs import codec
from llmcompress.quant.spec import QuantSpec


def filled(spec: QuantSpec, bias: bool = False) -> tuple[PackedLinear, torch.Tensor]:
    weight = torch.randn(24, 50)
    scale, zero = find_grid(weight, spec, "minmax")
    packed = codec("int_group").encode(round_codes(weight, scale, zero, spec), scale, zero, spec)
    layer = PackedLinear(50, 24, spec, bias, torch.float32)
    layer.load_state_dict({**packed.tensors, **({"bias": torch.randn(24)} if bias else {})})
    return layer, codec("int_group").decode(packed)


@pytest.mark.parametrize("spec", [QuantSpec(2, 16), QuantSpec(3, 32), QuantSpec(4, -1, True), QuantSpec(8, 64)])
def test_multiplies_with_the_decoded_weight(spec: QuantSpec) -> None:
    layer, weight = filled(spec)
    x = torch.randn(2, 3, 5, 50)
    expected = torch.nn.functional.linear(x, weight)
    assert float((layer(x) - expected).norm() / expected.norm()) < 2e-6


@pytest.mark.skipif(not cpu.ready(), reason="no native kernels")
@pytest.mark.parametrize("spec", [QuantSpec(2, 16), QuantSpec(3, 32), QuantSpec(4, -1, True), QuantSpec(8, 64)])
def test_stored_order_survives_the_first_call(spec: QuantSpec) -> None:
    layer = PackedLinear(64, 48, spec, dtype=torch.float32)
    for tensor in layer.buffers():
        tensor.copy_(
            torch.rand(tensor.shape) if tensor.dtype == torch.float16 else torch.randint(-99, 99, tensor.shape)
        )
    stored = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    before = compiled(x)
    assert not layer.interleaved
    found = layer(x)
    assert layer.interleaved
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-3)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), found)
    assert torch.equal(copy.deepcopy(layer)(x), found)
    for tensors in (layer.state_dict(), layer.packed_weight().tensors):
        assert all(torch.equal(tensors[key], stored[key]) for key in stored)
    assert sum(t.nbytes for t in layer.buffers()) == sum(t.nbytes for t in stored.values())
    layer.load_state_dict(stored)
    assert not layer.interleaved
    assert torch.equal(layer(x), found)
    layer.to(torch.bfloat16)
    assert torch.equal(layer(x), found)


@pytest.mark.skipif(not cpu.ready(), reason="no native kernels")
def test_a_weight_that_cannot_be_interleaved_says_why() -> None:
    layer = PackedLinear(64, 24, QuantSpec(4, 16))
    assert not layer.prepare()
    assert "multiple of 16" in str(layer.declined)
    layer = PackedLinear(64, 32, QuantSpec(3, 16))
    assert not layer.prepare()
    assert "do not begin at a word" in str(layer.declined)


@pytest.mark.skipif(not cpu.ready(), reason="no native kernels")
def test_int8_activations_are_opt_in() -> None:
    layer, weight = filled(QuantSpec(4, 16))
    x = torch.randn(64, 50)
    expected = torch.nn.functional.linear(x, weight)
    assert float((layer(x) - expected).norm() / expected.norm()) < 2e-6
    layer.int8_activations = True
    assert 1e-4 < float((layer(x) - expected).norm() / expected.norm()) < 8e-3


def test_bias() -> None:
    layer, weight = filled(QuantSpec(4, 16), bias=True)
    x = torch.randn(3, 50)
    torch.testing.assert_close(layer(x), torch.nn.functional.linear(x, weight, layer.bias))
    layer.to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer(x.to(torch.bfloat16)).dtype == torch.bfloat16


def test_looks_like_a_linear_to_code_that_peeks() -> None:
    layer, _ = filled(QuantSpec(4, 16))
    assert (layer.in_features, layer.out_features, layer.bias) == (50, 24, None)
    assert layer.weight is layer.weight_packed
    assert not isinstance(layer, torch.nn.Linear)
