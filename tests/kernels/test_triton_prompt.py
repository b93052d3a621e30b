"""Triton's prompt through a Mamba-2 mixer under the interpreter, against the definition."""

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

from llmcompress_kernels.triton import prompt as kernels  # noqa: E402

LIMITS, EPSILON = (0.01, 4.0), 1e-5
# the second head forgets everything at once, the third nearly nothing
RATES = (0.3, 200.0, 1e-4, 5.0)


def operands(
    sizes: tuple[int, int, int, int, int], tokens: int, dtype: torch.dtype, history: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, tuple[torch.Tensor | None, ...], torch.Tensor]:
    """projected, dt in the same rows, convolution, weights, state; sizes are S, H, P, N, G."""
    sequences, heads, channels, states, groups = sizes
    generator = torch.Generator().manual_seed(3)
    normal = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    inner, width = heads * channels, heads * channels + 2 * groups * states
    weights = (normal(width, 4), normal(width) if history else None, normal(heads), -torch.tensor(RATES[:heads]))
    weights = (*weights, normal(heads), 1 + 0.1 * normal(inner))
    conv = normal(sequences, width, 4).to(dtype) if history else None
    begin = normal(sequences, heads, channels, states) if history else torch.zeros(sequences, heads, channels, states)
    rows = normal(sequences, tokens, inner + width + heads).to(dtype)
    return rows[..., :-heads], rows[..., -heads:], conv, weights, begin


def apart(mine: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((mine.float() - theirs.float()).norm() / theirs.float().norm())


@pytest.mark.parametrize(
    ("sizes", "tokens", "dtype", "history"),
    [
        ((2, 4, 16, 32, 2), 37, torch.float32, True),
        ((2, 4, 16, 32, 1), 33, torch.bfloat16, False),
        ((1, 2, 48, 16, 1), 16, torch.float16, True),
        ((1, 3, 32, 16, 3), 1, torch.float32, False),
    ],
)
def test_prompt(
    monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, ...], tokens: int, dtype: torch.dtype, history: bool
) -> None:
    """As a CUDA tensor's call is handed on, against the definition in fp32."""
    monkeypatch.setattr(gpu, "no_triton", lambda: None)
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "triton")
    monkeypatch.setattr(gpu.reference_state, "mamba2_prefill", None)  # it must not be what answers
    projected, dt, conv, weights, state = operands(sizes, tokens, dtype, history)  # type: ignore[arg-type]
    other, before = state.clone(), projected.clone()
    found = gpu.mamba2_prefill(projected, dt, conv, *weights, state, sizes[-1], *LIMITS, EPSILON)
    monkeypatch.undo()
    wide = (projected.float(), dt.float(), None if conv is None else conv.float())
    expected = definition.mamba2_prefill(*wide, *weights, other, sizes[-1], *LIMITS, EPSILON)
    close = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    assert found.dtype == dtype
    assert apart(found, expected) < close
    for head in range(sizes[1]):
        assert apart(state[:, head], other[:, head]) < close
    assert torch.equal(projected, before)


def test_a_prompt_in_two_parts_is_the_prompt() -> None:
    """At a length that is no multiple of a chunk; sequences of a part lie apart, as rows of a wider tensor do."""
    sizes = (2, 4, 16, 32, 2)
    projected, dt, _, weights, state = operands(sizes, 40, torch.float32, False)
    rest = (2, LIMITS, EPSILON)
    again, inner = state.clone(), 64
    whole = kernels.mamba2_prefill(projected, dt, None, weights, state, *rest)
    first = kernels.mamba2_prefill(projected[:, :21], dt[:, :21], None, weights, again, *rest)
    conv = projected[:, 17:21, inner:].transpose(1, 2)
    second = kernels.mamba2_prefill(projected[:, 21:], dt[:, 21:], conv, weights, again, *rest)
    assert apart(torch.cat((first, second), 1), whole) < 2e-6
    assert apart(again, state) < 2e-6


def test_tiles_and_chunks_do_not_matter() -> None:
    projected, dt, conv, weights, state = operands((1, 2, 32, 32, 1), 40, torch.float32, True)
    found = []
    for chosen in (kernels.Launch(16, 16, 32, 1, 32, 1), kernels.Launch(32, 32, 16, 1, 16, 1)):
        held = state.clone()
        out = kernels.mamba2_prefill(projected, dt, conv, weights, held, 1, LIMITS, EPSILON, chosen)
        found.append((out, held))
    assert all(apart(mine, theirs) < 2e-6 for mine, theirs in zip(*found))


def test_a_decay_of_a_hundred_thousand_tokens_keeps_its_digits() -> None:
    """One token forgets nearly all, those after it next to nothing: their decays are no difference of large numbers."""
    tokens, rate = 16, -1e-5
    projected, dt, conv, weights, state = operands((1, 2, 16, 16, 1), tokens, torch.float32, True)
    state[:] = 1.0
    dt = torch.full((1, tokens, 2), 1.0)
    dt[:, 0] = 8e6  # exp(-80)
    weights = (*weights[:2], torch.zeros(2), torch.full((2,), rate), *weights[4:])
    other = state.clone().double()
    kernels.mamba2_prefill(projected, dt, conv, weights, state, 1, (0.0, float("inf")), EPSILON)
    exact = tuple(None if t is None else t.double() for t in weights)
    monkey = [t.double() for t in (projected, dt, conv)]
    inner = 32
    taps = torch.cat((monkey[2][..., 1:], monkey[0][..., inner:].transpose(1, 2)), -1)
    mixed = torch.nn.functional.silu(torch.nn.functional.conv1d(taps, exact[0][:, None], exact[1], groups=64))
    mixed = mixed.transpose(1, 2)
    x, b = mixed[..., :inner].unflatten(-1, (2, 16)), mixed[..., inner : inner + 16]
    step = torch.nn.functional.softplus(dt.double())
    for t in range(tokens):
        driven = (step[:, t, :, None] * x[:, t])[..., None] * b[:, t, None, None]
        other = other * (step[:, t] * rate).exp()[..., None, None] + driven
    assert apart(state.double(), other) < 3e-7


def test_what_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    projected, dt, conv, weights, state = operands((1, 2, 16, 16, 1), 3, torch.float32, True)
    plain = (projected, dt, conv, weights, state, 1)
    assert kernels.verify(*plain) is None
    assert "floats" in (kernels.verify(projected.double(), *plain[1:]) or "")
    assert "float32" in (kernels.verify(*plain[:4], state.half(), 1) or "")
    assert "contiguous" in (kernels.verify(*plain[:4], state.transpose(2, 3), 1) or "")
    assert "24 x 16" in (kernels.declines(2, 24, 16, 1, torch.float32) or "")
    assert "16 x 8" in (kernels.declines(2, 16, 8, 1, torch.float32) or "")
    assert "3 groups" in (kernels.declines(2, 16, 16, 3, torch.float32) or "")
    assert kernels.mamba2_prefill(projected[:, :0], dt[:, :0], conv, weights, state, 1, LIMITS, 1e-5).shape == (
        1,
        0,
        32,
    )
    monkeypatch.setattr(gpu, "no_triton", lambda: "no CUDA device")
    assert gpu.prompt_declined(2, 16, 16, 1, torch.float32) == "no CUDA device"
    monkeypatch.setattr(gpu, "no_triton", lambda: None)
    assert gpu.prompt_declined(2, 16, 16, 1, torch.float32) is None
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "reference")
    assert "LLMCOMPRESS_KERNELS" in (gpu.prompt_declined(2, 16, 16, 1, torch.float32) or "")


def test_states_are_packed_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CUDA tensor's call is handed on: codes and scales are the definition's."""
    monkeypatch.setattr(gpu, "no_triton", lambda: None)
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "triton")
    held = torch.randn(2, 3, 16, 32)
    scale = (held.abs().mean((0, 3)).sqrt()).half()
    for fixed, how in ((None, (False, True)), (scale, (False, False))):
        expected = definition.dsq_pack(held, fixed, 4, *how)
        monkeypatch.setattr(gpu.reference_state, "dsq_pack", None)
        found = gpu.dsq_pack(held, fixed, 4, *how)
        monkeypatch.undo()
        monkeypatch.setattr(gpu, "no_triton", lambda: None)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
