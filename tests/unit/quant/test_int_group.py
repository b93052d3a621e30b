from __future__ import annotations

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.quant.codecs import codec, int_group
from llmcompress.quant.packed import PackedWeight
from llmcompress.quant.spec import QuantSpec


def slow_decode(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, spec: QuantSpec) -> torch.Tensor:
    out = torch.empty(codes.shape)
    size = spec.group(codes.shape[-1])
    for column in range(codes.shape[-1]):
        group = column // size
        offset = spec.midpoint if zero is None else zero[..., group].float()
        out[..., column] = scale[..., group].float() * (codes[..., column].float() - offset)
    return out


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("columns", "group"), [(64, 32), (80, 32), (45, 64), (40, -1)])
@pytest.mark.parametrize("lead", [(6,), (3, 6)])
def test_round_trip(bits: int, symmetric: bool, columns: int, group: int, lead: tuple[int, ...]) -> None:
    spec = QuantSpec(bits, group, symmetric)
    groups = spec.groups(columns)
    codes = torch.randint(0, spec.levels, (*lead, columns), dtype=torch.uint8)
    scale = torch.rand(*lead, groups).half()
    zero = None if symmetric else torch.randint(0, spec.levels, (*lead, groups), dtype=torch.uint8)
    packed = int_group.encode(codes, scale, zero, spec)
    expected = slow_decode(codes, scale, zero, spec)
    assert torch.equal(int_group.decode(packed), expected)
    assert torch.equal(int_group.decode(packed, torch.bfloat16), expected.bfloat16())
    assert packed.nbytes == int_group.nbytes(packed.shape, spec)
    stored = {name: (tuple(t.shape), str(t.dtype).removeprefix("torch.")) for name, t in packed.tensors.items()}
    assert stored == int_group.tensor_shapes(packed.shape, spec)
    again = int_group.unpack_parts(packed)
    assert torch.equal(again[0], codes)
    assert torch.equal(again[1], scale)
    assert (again[2] is None) if zero is None else torch.equal(again[2], zero)


def test_damage_is_reported() -> None:
    spec = QuantSpec(4, 32)
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    good = int_group.encode(codes, torch.ones(4, 2), torch.zeros(4, 2, dtype=torch.uint8), spec)
    lacking = PackedWeight(good.shape, spec, {k: v for k, v in good.tensors.items() if k != "weight_scale"})
    with pytest.raises(InputError, match="weight_scale should have shape"):
        int_group.decode(lacking)
    with pytest.raises(ValueError, match="zero point"):
        int_group.encode(codes, torch.ones(4, 2), None, spec)
    with pytest.raises(ValueError, match="scale has shape"):
        int_group.encode(codes, torch.ones(4, 3), None, QuantSpec(4, 32, True))


def test_registry() -> None:
    assert codec("int_group") is int_group
    with pytest.raises(InputError, match="unknown codec") as caught:
        codec("int_groups")
    assert "int_group" in str(caught.value.hint)
