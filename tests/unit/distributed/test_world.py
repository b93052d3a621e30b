from __future__ import annotations

import pytest
import torch

from llmcompress.distributed.world import World
from llmcompress.errors import UsageError


def test_fewer_windows_than_processes_are_refused() -> None:
    with pytest.raises(UsageError, match="3 calibration windows cannot be shared by 4 processes"):
        World(0, 4).cut(3)
    assert World(0, 1, deterministic=True).cut(128).shards == World(3, 4, deterministic=True).cut(128).shards == 8
    assert World(0, 2).cut(128).shards == 2
    assert not World().cut(128).pooled


def test_alone_everything_stays_here() -> None:
    world = World(count=3)
    parts = [torch.full((2,), float(value)) for value in (1, 2, 4)]
    total = world.sum_in_order(parts, 0)
    assert total is not None and total.tolist() == [7.0, 7.0]
    assert parts[0].tolist() == [1.0, 1.0]
    assert world.tell({"a": 1}) == {"a": 1}
    assert world.add_counts([1, 2]) == [1, 2]
