from __future__ import annotations

import torch
from torch import nn

from llmcompress.models.alignment import align, aligned


def test_align_moves_only_what_is_misaligned_and_keeps_ties() -> None:
    memory = torch.arange(101.0)
    model = nn.Module()
    model.first, model.second = nn.Linear(10, 10, bias=False), nn.Linear(10, 10, bias=False)
    model.first.weight = nn.Parameter(memory[1:].view(10, 10))
    model.second.weight = model.first.weight
    model.register_buffer("mapped", memory[3:7])
    model.register_buffer("aligned", torch.ones(4))
    kept = model.aligned.data_ptr()
    align(model)
    assert model.first.weight is model.second.weight
    assert torch.equal(model.first.weight, torch.arange(1.0, 101.0).view(10, 10))
    assert torch.equal(model.mapped, torch.arange(3.0, 7.0))
    assert model.first.weight.data_ptr() % 64 == model.mapped.data_ptr() % 64 == 0
    assert model.aligned.data_ptr() == kept


def test_a_part_of_a_tensor_is_copied_only_where_it_begins_within_a_cache_line() -> None:
    whole = aligned(torch.arange(64.0))
    assert aligned(whole[16:]).data_ptr() == whole[16:].data_ptr()
    moved = aligned(whole[1:])
    assert moved.data_ptr() % 64 == 0 and torch.equal(moved, whole[1:])
