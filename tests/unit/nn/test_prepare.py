from __future__ import annotations

import time

import pytest
import torch
from llmcompress_kernels import cpu
from torch import nn

from llmcompress.nn.linear import PackedLinear
from llmcompress.nn.prepare import prepare
from llmcompress.quant.spec import QuantSpec


@pytest.mark.skipif(not cpu.ready(), reason="no native kernels")
def test_reports_what_is_interleaved_and_why_the_rest_is_not() -> None:
    layers = [PackedLinear(64, rows, QuantSpec(bits, 16)) for rows, bits in ((32, 4), (24, 4), (32, 3), (48, 2))]
    model = nn.Sequential(*layers, nn.Linear(4, 4))
    before = sum(tensor.nbytes for tensor in model.buffers())
    began = time.perf_counter()
    found = prepare(model)
    assert found.seconds < time.perf_counter() - began
    assert (found.weights, found.interleaved) == (4, 2)
    assert found.bytes == sum(tensor.nbytes for layer in (layers[0], layers[3]) for tensor in layer.buffers())
    assert sum(found.declined.values()) == 2
    assert any("multiple of 16" in reason for reason in found.declined)
    assert any("do not begin at a word" in reason for reason in found.declined)
    assert found.seconds > 0
    assert sum(tensor.nbytes for tensor in model.buffers()) == before
    assert prepare(model) == found


def test_a_model_elsewhere_is_left_alone() -> None:
    found = prepare(nn.Sequential(PackedLinear(64, 32, QuantSpec(4, 16), device=torch.device("meta"))))
    assert (found.weights, found.interleaved, found.bytes) == (1, 0, 0)
