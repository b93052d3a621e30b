"""The packed state of one layer by itself; whole models are in ``tests/paper/test_q_mamba_cache.py``."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from llmcompress.models.layout import ScanView
from llmcompress.nn.states import PackedState, StateQuantizer
from llmcompress.quant.states import StateSpec

SCAN = ScanView("mixer", "mamba2", heads=2, channels=16, states=32, groups=1, conv_channels=96, conv_width=4)


def state(sequences: int, spec: StateSpec) -> PackedState:
    held = PackedState(StateQuantizer(spec, SCAN, window=3))
    held.store(torch.randn(sequences, 2, 16, 32), 4)
    return held


def step(held: PackedState, sequences: int) -> None:
    x, dt, bc = torch.randn(sequences, 2, 16), torch.rand(sequences, 2, 1), torch.randn(sequences, 1, 32)
    assert held.decode(x, dt, torch.tensor([-0.1, -1.0]).view(2, 1, 1), bc, bc).shape == x.shape


@pytest.mark.parametrize("codec", ["dsq", "per_channel"])
def test_a_cleared_state_goes_on_with_another_number_of_sequences(codec: str) -> None:
    held = state(3, StateSpec(codec=codec))  # type: ignore[arg-type]
    step(held, 3)
    for sequences in (5, 2):
        held.zero_()
        held.store(torch.randn(sequences, 2, 16, 32), 4)
        assert held.recent is not None
        assert len(held.recent) == sequences
        for _ in range(4):
            step(held, sequences)
        assert held.count is not None
        assert held.count.tolist() == [1] * sequences


@pytest.mark.parametrize("codec", ["dsq", "per_channel"])
def test_nothing_may_be_left_of_a_batch(codec: str) -> None:
    held = state(2, StateSpec(codec=codec)).index_select(0, torch.tensor([], dtype=torch.int64))  # type: ignore[arg-type]
    step(held, 0)
    assert held.load().shape == (0, 2, 16, 32)


KNOWN = [
    (StateSpec(), True),
    (StateSpec(codec="dsq_refit"), True),
    (StateSpec(rounding="dither"), True),
    (StateSpec(rounding="stochastic"), False),
    (StateSpec(alpha=0.25), False),
    (StateSpec(sqrt_axis="state"), False),
    (StateSpec(codec="per_channel"), False),
    (StateSpec(bits=16), False),
]


@pytest.mark.parametrize(("spec", "known"), KNOWN)
def test_what_the_kernels_know(spec: StateSpec, known: bool) -> None:
    assert spec.has_kernel is known
    assert StateQuantizer(spec, SCAN).has_kernel is known
    assert not StateQuantizer(spec, replace(SCAN, kind="mamba1")).has_kernel
