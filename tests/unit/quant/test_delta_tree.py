"""Codec of residuals: round trips, sizes, refusals."""

from __future__ import annotations

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.quant.codecs import codec, delta_tree
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("columns", [64, 100, 192, 300])
def test_round_trip(bits: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(bits * 1000 + columns)
    spec = delta_tree.node_spec(bits, 64)
    codes = torch.randint(0, 1 << bits, (5, columns), generator=generator, dtype=torch.uint8)
    scale = (torch.rand(5, spec.groups(columns), generator=generator) + 0.1).half()
    packed = delta_tree.encode(codes, scale, -13, spec)
    wide = scale.float().repeat_interleave(64, 1)[:, :columns]
    expected = wide * (codes.float() - ((1 << bits) - 1) / 2) * 2.0**-13
    assert torch.equal(codec("delta_tree").decode(packed), expected)
    assert packed.nbytes == delta_tree.nbytes((5, columns), spec)


def test_sum_of_nodes_is_exact_and_in_order() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = []
    for bits, exponent in ((4, 0), (1, -5), (2, -9)):
        spec = delta_tree.node_spec(bits, 32)
        codes = torch.randint(0, 1 << bits, (6, 64), generator=generator, dtype=torch.uint8)
        nodes.append(delta_tree.encode(codes, torch.rand(6, 2, generator=generator).half(), exponent, spec))
    total = delta_tree.decode(nodes[0]) + delta_tree.decode(nodes[1])
    total = total + delta_tree.decode(nodes[2])
    assert torch.equal(delta_tree.reconstruct(nodes), total)


def test_refusals() -> None:
    spec = delta_tree.node_spec(2, 32)
    good = delta_tree.encode(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), 0, spec)
    with pytest.raises(InputError, match="should have shape"):
        delta_tree.decode(PackedWeight((4, 96), spec, good.tensors))
    with pytest.raises(InputError, match="exponent"):
        wild = {**good.tensors, "weight_exponent": torch.tensor([400], dtype=torch.int32)}
        delta_tree.decode(PackedWeight((4, 64), spec, wild))
    with pytest.raises(InputError, match="without any node"):
        delta_tree.reconstruct([])
    with pytest.raises(ValueError, match="symmetric"):
        QuantSpec(2, 32, symmetric=False, codec="delta_tree")
    with pytest.raises(ValueError, match="bits"):
        delta_tree.node_spec(7, 32)
    with pytest.raises(ValueError, match="exponent"):
        delta_tree.encode(torch.zeros(4, 64, dtype=torch.uint8), torch.ones(4, 2), 101, spec)
