from __future__ import annotations

import pytest
import torch

from llmcompress.models.layout import ExpertBank, RouterView
from llmcompress.models.orientation import canonical, family_orientation


def bank(transposed: bool, interleaved: bool) -> ExpertBank:
    router = RouterView("r", "softmax_topk", True)
    return ExpertBank("m", 2, 1, 5, 3, router, transposed=transposed, interleaved=interleaved)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_there_and_back(transposed: bool, interleaved: bool) -> None:
    experts = bank(transposed, interleaved)
    for name in (experts.gate_up, experts.down):
        stored = torch.randn(experts.stored_shape(name))
        found = canonical(experts, name, stored)
        assert found.shape == experts.shape(name)
        assert found.is_contiguous()
        assert torch.equal(family_orientation(experts, name, found), stored)


def test_gate_rows_come_first() -> None:
    experts = bank(True, True)
    stored = torch.randn(experts.stored_shape(experts.gate_up))
    found = canonical(experts, experts.gate_up, stored)
    assert torch.equal(found[1, 2], stored[1, :, 4])
    assert torch.equal(found[1, 3 + 2], stored[1, :, 5])
