"""What a quantized state costs: measured by the operator as by the loop over tokens."""

from __future__ import annotations

import pytest
import torch

from llmcompress.algorithms.decoupled_scales import fake_quantize
from llmcompress.algorithms.selective_scan import ScanInputs, scan
from llmcompress.algorithms.state_statistics import HeadStatistics
from llmcompress.quant.states import StateSpec


@pytest.mark.parametrize("codec", ["dsq", "dsq_refit", "dsq_static_p", "per_channel"])
def test_errors_of_operator_and_loop_agree(codec: str) -> None:
    generator = torch.Generator().manual_seed(0)
    x, b, c = (torch.randn(2, 40, *shape, generator=generator) for shape in ((3, 16), (1, 32), (1, 32)))
    dt = 0.01 + 0.1 * torch.rand(2, 40, 3, 1, generator=generator)
    inputs = ScanInputs(x, dt, -torch.tensor([0.1, 1.0, 5.0])[:, None, None], b, c)
    statistics, spec = HeadStatistics(3), StateSpec(bits=4, codec=codec)
    exact = statistics.add_float(inputs)
    static = statistics.static(spec)
    statistics.add_error("4", inputs, exact, spec, static)
    looped, _ = scan(inputs, None, lambda fresh, _t: fake_quantize(fresh, spec, static))
    expected = (looped - exact).double().square().sum((0, 1, 3))
    torch.testing.assert_close(statistics.errors["4"], expected, rtol=1e-3, atol=0)
    assert bool((statistics.errors["4"] > 0).all())
