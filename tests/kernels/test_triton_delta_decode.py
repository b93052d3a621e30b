"""The Triton kernel for residual trees under the interpreter, against dense sums over each row's path in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llmcompress_kernels import ops

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)
if triton.__version__ < "3.9" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this triton needs numpy < 2.4", allow_module_level=True)

from llmcompress_kernels.triton import delta_decode, tuning  # noqa: E402

CONFIG = tuning.Config(16, 32, 64, splits=2, stages=1)
TOLERANCE = {torch.float16: 1e-3, torch.bfloat16: 4e-3, torch.float32: 1e-6}


def node(rows: int, columns: int, bits: int, group: int, multiplier: float):
    """Packed codes, scales, and the dense residual."""
    codes = torch.randint(0, 1 << bits, (rows, columns), dtype=torch.uint8)
    scale = (torch.rand(rows, -(-columns // group)) + 0.1).to(torch.float16)
    wide = scale.double().repeat_interleave(group, 1)[:, :columns]
    return ops.pack(codes, bits), scale, multiplier * wide * (codes.double() - ((1 << bits) - 1) / 2)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("bits", "columns", "group"), [([4, 1, 1], 128, 64), ([2, 3, 2], 96, 32), ([5, 6, 1], 70, 128)], ids=str
)
def test_tree(dtype: torch.dtype, bits: list[int], columns: int, group: int) -> None:
    torch.manual_seed(columns)
    rows, tokens = 40, 19
    # a root over all rows but the last, two leaves below it, one of them across two tiles of tokens
    spans = torch.tensor([[0, 18], [0, 3], [3, 18]])
    multipliers = [1.0, 2.0**-6, 2.0**-7]
    made = [node(rows, columns, b, group, m) for b, m in zip(bits, multipliers)]
    x = torch.randn(tokens, columns).to(dtype)
    packed, scale = [m[0] for m in made], [m[1] for m in made]
    assert delta_decode.verify(x, bits, group) is None
    found = delta_decode.delta_decode(x, packed, scale, spans, bits, multipliers, group, CONFIG)
    expected = torch.zeros(tokens, rows, dtype=torch.float64)
    for (low, high), (_, _, dense) in zip(spans.tolist(), made):
        expected[low:high] += x[low:high].double() @ dense.T
    assert found.dtype == dtype
    assert (found.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]
    assert torch.equal(found[18], torch.zeros(rows, dtype=dtype))


def test_nodes_without_rows_are_not_read() -> None:
    packed, scale, dense = node(8, 64, 2, 64, 1.0)
    poisoned = torch.full_like(scale, float("nan"))
    x = torch.randn(2, 64)
    spans = torch.tensor([[0, 2], [2, 2]])
    found = delta_decode.delta_decode(x, [packed, packed], [scale, poisoned], spans, [2, 2], [1.0, 1.0], 64, CONFIG)
    torch.testing.assert_close(found, (x.double() @ dense.T).float(), rtol=1e-5, atol=1e-5)
    empty = torch.tensor([[0, 0], [2, 2]])
    found = delta_decode.delta_decode(x, [packed, packed], [scale, scale], empty, [2, 2], [1.0, 1.0], 64, CONFIG)
    assert torch.equal(found, torch.zeros(2, 8))


def test_what_the_kernel_declines() -> None:
    x = torch.zeros(1, 64)
    assert "7" in (delta_decode.verify(x, [2, 7], 64) or "")
    assert "24" in (delta_decode.verify(x, [2], 24) or "")
    assert "float64" in (delta_decode.verify(x.double(), [2], 64) or "")
