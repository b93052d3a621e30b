"""What a run says where there are fewer batches of responses than processes."""

from dataclasses import replace

import pytest

from llmcompress.distributed.world import World
from llmcompress.evaluation.sampling import Sampling
from llmcompress.stages.s2r.sampling import note_idle


@pytest.mark.parametrize(
    ("size", "batch", "idle"), [(1, 512, None), (4, 128, None), (4, 512, 3), (4, 200, 1), (2, 511, None)]
)
def test_idle_processes_are_told_of_and_how_to_employ_them(tiny, tmp_path, size, batch, idle):
    events = []
    note_idle(512, Sampling(8, batch=batch), replace(tiny.context(tmp_path, "s", events), world=World(0, size)))
    texts = [event.data["text"] for event in events]
    assert len(texts) == (idle is not None)
    if idle is not None:
        assert f"{idle} of {size} processes wait" in texts[0]
        assert "sampling.batch 128 employs all" in texts[0]
