"""Edges of the DSQ functions; their equations are tested in tests/paper/test_q_mamba_scales.py."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.decoupled_scales import folded_mean, qmax_of, quantize, static_channel_scale
from llmcompress.quant.states import StateSpec


def test_inactive_spec_says_so() -> None:
    assert not StateSpec(16).active
    assert not StateSpec(4, "none").active
    assert qmax_of(6) == 31


def test_odd_widths_are_averaged_exactly() -> None:
    values = torch.arange(15, dtype=torch.float32).view(3, 5)
    assert torch.equal(folded_mean(values, -1), values.mean(-1))
    assert torch.equal(folded_mean(values, -2), values.mean(-2))


def test_calibrated_codec_needs_its_scale() -> None:
    with pytest.raises(AssertionError, match="calibrated channel scale"):
        quantize(torch.ones(2, 3), StateSpec(4, "dsq_static_p"))


def test_silent_channel_keeps_a_usable_scale() -> None:
    scale = static_channel_scale(torch.tensor([[1.0, 1.0, 0.0]]))
    assert float(scale[0, 2]) == pytest.approx(1e-3, rel=1e-3)
