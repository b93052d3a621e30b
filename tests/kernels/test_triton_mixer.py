"""Triton's Mamba-2 mixer of one token under the interpreter, against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from llmcompress_kernels import gpu
from llmcompress_kernels.reference import state as definition

triton = pytest.importorskip("triton", reason="triton is not installed")
if not triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET is not set", allow_module_level=True)
if triton.__version__ < "3.9" and np.__version__ >= "2.4":
    pytest.skip("the interpreter of this triton needs numpy < 2.4", allow_module_level=True)

from llmcompress_kernels.triton import mixer as kernels  # noqa: E402
from llmcompress_kernels.triton import state as triton_state  # noqa: E402

SEQUENCES, HEADS, P, N, WIDTH = 2, 6, 16, 32, 4
INNER = HEADS * P


def operands(groups: int, bias: bool, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, tuple[object, ...]]:
    """projected, conv, weights; time steps from far below zero to where softplus is the identity."""
    torch.manual_seed(groups)
    channels = INNER + 2 * groups * N
    projected = torch.randn(SEQUENCES, INNER + channels + HEADS)
    projected[:, -HEADS:] = torch.linspace(-30, 30, SEQUENCES * HEADS).reshape(SEQUENCES, HEADS)
    conv_bias = torch.randn(channels) if bias else None
    weights = (torch.randn(channels, WIDTH), conv_bias, torch.randn(HEADS), -torch.rand(HEADS) * 0.01)
    weights = (*weights, torch.randn(HEADS), torch.rand(INNER) + 0.5)
    cast = tuple(None if t is None else t.to(dtype) for t in weights)
    return projected.to(dtype), torch.randn(SEQUENCES, channels, WIDTH).to(dtype), cast


@pytest.mark.parametrize(("groups", "bias"), [(1, True), (2, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixer_with_a_state_in_floats(groups: int, bias: bool, dtype: torch.dtype) -> None:
    projected, conv, weights = operands(groups, bias, dtype)
    state = torch.randn(SEQUENCES, HEADS, P, N)
    other, expected_state = conv.clone(), state.clone()
    assert kernels.verify(projected, conv, weights, groups) is None
    assert kernels.verify_update(state) is None
    found = kernels.mamba2_decode(
        projected, conv, weights, groups, N, 1e-5, lambda *step: kernels.state_update(state, *step)
    )
    none = (None, None, None, None)
    expected = definition.mamba2_decode(projected, other, *weights, *none, expected_state, groups, N, 16, 1e-5)
    tight = {"rtol": 2e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-3, "atol": 1e-3}
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **tight)
    torch.testing.assert_close(state, expected_state, rtol=1e-5, atol=1e-5)
    assert torch.equal(conv, other)


def test_mixer_with_a_packed_state() -> None:
    projected, conv, weights = operands(2, True, torch.float32)
    held = list(definition.dsq_pack(torch.randn(SEQUENCES, HEADS, P, N), None, 4, dither=True))
    theirs, other = [t.clone() for t in held], conv.clone()
    found = kernels.mamba2_decode(
        projected,
        conv,
        weights,
        2,
        N,
        1e-5,
        lambda *step: triton_state.dsq_state_update(*held, None, *step, 4, dither=True),
    )
    expected = definition.mamba2_decode(projected, other, *weights, *theirs, None, None, 2, N, 4, 1e-5, dither=True)
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-4)
    # exponentials differ in their last bit, so a code near a boundary may fall to the other side
    assert (held[0] != theirs[0]).float().mean() < 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_mixer_within_a_window(monkeypatch, dtype: torch.dtype) -> None:
    """As a CUDA tensor's call is handed on: three launches, of which the middle one is that of windows."""
    monkeypatch.setattr(gpu, "no_triton", lambda: None)
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "triton")
    window, channels = 3, INNER + 2 * 2 * N
    held = list(definition.dsq_pack(torch.randn(SEQUENCES, HEADS, P, N), None, 4, dither=True))
    held += [torch.zeros(SEQUENCES, window - 1, INNER + HEADS + 2 * N), torch.tensor([0, 1], dtype=torch.int32)]
    theirs = [t.clone() for t in held]
    _, conv, weights = operands(2, True, dtype)
    other = conv.clone()
    for _ in range(window + 1):
        projected = torch.randn(SEQUENCES, INNER + channels + HEADS, dtype=dtype)
        sizes = (None, None, 2, N, 4, 1e-5, False, True)
        found = gpu.mamba2_decode(projected, conv, *weights, *held[:3], *sizes, *held[3:])
        expected = definition.mamba2_decode(projected, other, *weights, *theirs[:3], *sizes, *theirs[3:])
        close = 2e-4 if dtype == torch.float32 else 3e-3
        assert float((found - expected).norm() / expected.norm()) < close
        assert torch.equal(conv, other)
        assert torch.equal(held[4], theirs[4])
        torch.testing.assert_close(held[3], theirs[3], rtol=1e-5, atol=1e-5)
    assert held[4].tolist() == [1, 2]
    assert (held[0] != theirs[0]).float().mean() < 1e-2


def test_what_is_declined() -> None:
    projected, conv, weights = operands(1, True, torch.float32)
    assert "contiguous" in (kernels.verify(projected, conv.transpose(0, 1), weights, 1) or "")
    assert "floats" in (kernels.verify(projected.double(), conv, weights, 1) or "")
    assert "3 x 32" in (kernels.verify_update(torch.zeros(1, 1, 3, 32)) or "")
    assert "float32" in (kernels.verify_update(torch.zeros(1, 1, 16, 32), torch.zeros(1).half()) or "")
    empty = (projected[:0], conv[:0], weights, 1, N, 1e-5, lambda *step: step[0])
    assert kernels.mamba2_decode(*empty).shape == (0, INNER)
