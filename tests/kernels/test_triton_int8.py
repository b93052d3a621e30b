"""Products with int8 activations under Triton's interpreter, against the definition."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from llmcompress_kernels import gpu, ops
from llmcompress_kernels.reference import group_gemm as definition

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)
if triton.__version__ < "3.9" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this triton needs numpy < 2.4", allow_module_level=True)

from llmcompress_kernels.triton import int8_gemm as kernels  # noqa: E402

ROWS, TOKENS, ONE = 37, 19, 1 << 20


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize(
    ("bits", "group", "symmetric", "columns", "dtype"),
    [
        (8, ONE, True, 160, torch.float32),
        (8, ONE, False, 134, torch.float32),
        (8, 32, True, 96, torch.float16),
        (4, 64, False, 160, torch.bfloat16),
        (3, 128, True, 200, torch.float32),
        (2, 64, False, 128, torch.float32),
    ],
)
def test_rounded_activations(
    monkeypatch: pytest.MonkeyPatch,
    packed: Callable[..., ops.Stack],
    bits: int,
    group: int,
    symmetric: bool,
    columns: int,
    dtype: torch.dtype,
) -> None:
    """As a CUDA tensor's call is handed on; the definition rounds to the same codes."""
    monkeypatch.setattr(gpu, "no_triton", lambda: None)
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "triton")
    torch.manual_seed(bits)
    w = packed((ROWS, columns), bits, group, symmetric)
    x = torch.randn(2, TOKENS, columns).to(dtype)
    x[0, 3] = 0
    operands = (w.weight, w.scale, w.zero, bits, group, columns, True)
    expected = definition.group_gemm(x.float(), *operands)
    monkeypatch.setattr(gpu.reference_group_gemm, "group_gemm", None)  # it must not be what answers
    found = gpu.group_gemm(x, *operands)
    close = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]
    assert found.dtype == dtype
    assert found.shape == (2, TOKENS, ROWS)
    assert apart(found, expected) < close
    assert not found[0, 3].any()


@pytest.mark.parametrize("chunk", [64, 32])
def test_codes_are_the_definitions(chunk: int) -> None:
    x = torch.randn(7, 150) * torch.logspace(-6, 3, 7)[:, None]
    x[2, :64], x[3, 5] = 0, 1e-42
    codes, scales, sums = kernels.rounded(x, chunk, True)
    for number, first in enumerate(range(0, 150, chunk)):
        part = codes[:, first : first + chunk].int()
        assert torch.equal(sums[number], part.sum(-1).int())
        assert torch.equal(scales[number], x[:, first : first + chunk].abs().amax(-1) / 127)
    expected = definition.quantize_activations(x, chunk)
    spread = scales.T.repeat_interleave(chunk, 1)[:, :150]
    assert torch.equal(codes * spread, expected)


@pytest.mark.parametrize("bits", [8, 4])
def test_one_scale_per_token(packed: Callable[..., ops.Stack], bits: int) -> None:
    w = packed((ROWS, 150), bits, ONE, True)
    x = torch.randn(TOKENS, 150)
    x[4] = 0
    scale = x.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scale > 0, (x / scale).round(), 0) * scale
    expected = rounded @ definition.decode(w.weight, w.scale, None, bits, ONE, 150).T
    for chosen in (None, kernels.Launch(32, 64, 1, 1, 1)):
        assert apart(kernels.token_gemm(x, w.weight, w.scale, bits, 150, chosen), expected) < 1e-6


def test_what_is_declined(packed: Callable[..., ops.Stack]) -> None:
    x, w = torch.randn(3, 96), packed((32, 96), 4, 48, True)
    assert "48" in (kernels.verify(x, w.weight, 4, 48, 96) or "")
    assert kernels.verify(x, w.weight, 4, 96, 96) is None
    assert "interleaved" in (kernels.verify(x, w.weight[None], 4, 96, 96) or "")
    assert "float64" in (kernels.verify(x.double(), w.weight, 4, 96, 96) or "")
    assert kernels.group_gemm(x[:0], w.weight, w.scale, None, 4, 96, 96).shape == (0, 32)
