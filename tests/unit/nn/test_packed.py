from __future__ import annotations

import pytest
import torch

from llmcompress.errors import InputError
from llmcompress.nn.packed import PackedTensors
from llmcompress.quant.spec import QuantSpec


def test_meta_allocates_nothing_and_knows_its_size() -> None:
    packed = PackedTensors((4, 6, 50), QuantSpec(3, 16), "meta")
    assert {name: tuple(t.shape) for name, t in packed.state_dict().items()} == {
        "weight_packed": (4, 6, 5), "weight_scale": (4, 6, 4), "weight_zero_point": (4, 6, 1),
    }  # fmt: skip
    assert packed.nbytes == 4 * 6 * (5 * 4 + 4 * 2 + 4)
    assert packed.packed_weight().shape == (4, 6, 50)


def test_symmetric_has_no_zero_point() -> None:
    assert PackedTensors((6, 32), QuantSpec(4, 16, symmetric=True)).zero is None
    assert PackedTensors((6, 32), QuantSpec(4, 16)).zero is not None


def test_type_changes_do_not_reach_packed_tensors() -> None:
    packed = PackedTensors((6, 32), QuantSpec(4, 16))
    packed.weight_scale.fill_(0.1)
    for change in (packed.half, packed.double, packed.bfloat16, packed.float):
        change()
        assert packed.weight_scale.dtype == torch.float16
        assert packed.weight_packed.dtype == torch.int32
    assert (packed.weight_scale == torch.tensor(0.1, dtype=torch.float16)).all()
    packed.to("meta")
    assert packed.weight_scale.device.type == "meta"


def test_a_group_never_exceeds_the_row() -> None:
    assert PackedTensors((6, 32), QuantSpec(4, 128)).columns_per_group == 32
    assert PackedTensors((6, 32), QuantSpec(4, -1)).columns_per_group == 32


def test_other_codecs_are_refused() -> None:
    with pytest.raises(InputError, match="delta_tree"):
        PackedTensors((6, 32), QuantSpec(4, 16, symmetric=True, codec="delta_tree"))


def test_printing() -> None:
    assert repr(PackedTensors((6, 32), QuantSpec(3, 16))).endswith("bits=3, group_size=16, asymmetric)")
    assert repr(PackedTensors((6, 32), QuantSpec(4, -1, True))).endswith("bits=4, group_size=-1, symmetric)")
