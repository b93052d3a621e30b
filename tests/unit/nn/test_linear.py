from __future__ import annotations

import pytest
import torch

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
    assert torch.equal(layer(x), torch.nn.functional.linear(x, weight))


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
