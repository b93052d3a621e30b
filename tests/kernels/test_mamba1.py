"""Mamba-1's states in C++ against their definition in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from llmcompress_kernels import mamba1, mamba2
from llmcompress_kernels.reference import mamba1 as definition
from torch import Tensor

from llmcompress.algorithms import decoupled_scales as dsq
from llmcompress.algorithms.decoupled_scales import QuantizedState
from llmcompress.quant.states import StateSpec

pytestmark = [
    pytest.mark.skipif(mamba2.unavailable() is not None, reason=f"no kernels: {mamba2.unavailable()}"),
    pytest.mark.usefixtures("state_kernels"),
]

SEQUENCES, HEADS, STATES = 3, 2, 16
KINDS = ("dsq", "dsq_refit", "dsq_static_p", "dither")


def spec_of(kind: str, bits: int) -> StateSpec:
    if kind == "dither":
        return StateSpec(bits, "dsq", rounding="dither")
    return StateSpec(bits, kind)


class Twin:
    """States of some sequences by the definition, beside those of the kernel."""

    def __init__(self, kind: str, bits: int, channels: int, window: int = 1) -> None:
        self.generator = torch.Generator().manual_seed(channels + bits + window)
        self.spec, self.bits, self.channels, self.window = spec_of(kind, bits), bits, channels, window
        self.inner = HEADS * channels
        self.fixed = None
        if kind == "dsq_static_p":
            self.fixed = dsq.static_channel_scale(torch.rand(HEADS, channels, generator=self.generator) + 0.01)
        self.keep(self.random(SEQUENCES, self.inner, STATES))
        self.recent = torch.zeros(SEQUENCES, window - 1, 2 * self.inner + STATES)
        # sequences stand at different places of their windows
        self.count = torch.arange(SEQUENCES, dtype=torch.int32) % window

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def keep(self, fresh: Tensor) -> None:
        """Round states ``[S, I, N]``."""
        found = dsq.quantize(fresh.unflatten(1, (HEADS, self.channels)), self.spec, self.fixed)
        self.codes, self.channel, self.state = dsq.pack_codes(found.codes, self.bits), found.channel, found.state

    def stored(self) -> Tensor:
        codes = dsq.unpack_codes(self.codes, self.bits, STATES)
        value = dsq.dequantize(QuantizedState(codes, self.channel, self.state), self.spec, self.fixed)
        return value.flatten(1, 2)

    def held(self) -> list[Tensor | None]:
        return [None if t is None else t.clone() for t in (self.codes, self.channel, self.state)]

    def step(self, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        old, drive = self.held(), dt * x
        fresh = definition.replayed(self.stored(), self.recent, self.count, a)
        fresh = definition.fresh_state(fresh, drive, dt, a, b)
        self.keep(fresh)
        due = self.count == self.window - 1
        self.codes, self.channel, self.state = (
            None if new is None else torch.where(due.view(-1, *[1] * (new.ndim - 1)), new, before)
            for new, before in zip((self.codes, self.channel, self.state), old)
        )
        for sequence in (~due).nonzero()[:, 0].tolist():
            row = torch.cat((drive[sequence], dt[sequence], b[sequence]))
            self.recent[sequence, int(self.count[sequence])] = row
        self.count = torch.where(due, 0, self.count + 1)
        return (fresh @ c.unsqueeze(-1)).squeeze(-1)


def token(twin: Twin, decays: bool) -> tuple[Tensor, ...]:
    x, b, c = twin.random(SEQUENCES, twin.inner), twin.random(SEQUENCES, STATES), twin.random(SEQUENCES, STATES)
    dt = twin.random(SEQUENCES, twin.inner).exp() * 0.2
    a = -twin.random(twin.inner, STATES).exp() if decays else torch.zeros(twin.inner, STATES)
    return x, dt, a, b, c


@pytest.mark.parametrize(("channels", "window"), [(16, 1), (64, 1), (32, 3)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("decays", [False, True])
def test_a_token_is_the_definitions(kind: str, bits: int, channels: int, window: int, decays: bool) -> None:
    """Without a decay to the last bit; the exponential is off by its last bits, which moves few codes."""
    twin, differ, total = Twin(kind, bits, channels, window), 0, 0
    for _ in range(2 * window + 2):
        x, dt, a, b, c = token(twin, decays)
        codes, channel, state = twin.held()
        recent, count = twin.recent.clone(), twin.count.clone()
        out = mamba1.update(
            codes, channel, state, twin.fixed, None, x, dt, a, b, c, channels, bits, twin.spec.refit, twin.spec.dither,
            recent if window > 1 else None, count if window > 1 else None,
        )  # fmt: skip
        expected = twin.step(x, dt, a, b, c)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        assert codes is not None
        assert state is not None
        torch.testing.assert_close(state, twin.state, rtol=0 if not decays else 2e-3, atol=0)
        if channel is not None:
            torch.testing.assert_close(channel, twin.channel, rtol=0 if not decays else 2e-3, atol=0)
        differ, total = differ + int((codes != twin.codes).sum()), total + codes.numel()
        if window > 1:
            assert torch.equal(recent, twin.recent)
            assert torch.equal(count, twin.count)
    assert differ <= (0.002 * total if decays else 0)


def test_float_states_and_prompts_are_the_definitions() -> None:
    twin = Twin("dsq", 8, 32)
    tokens = [token(twin, True) for _ in range(70)]
    a, d = tokens[0][2], twin.random(twin.inner)
    x, dt, b, c = (torch.stack([row[i] for row in tokens], 1) for i in (0, 1, 3, 4))
    before = twin.random(SEQUENCES, twin.inner, STATES)
    floats = mamba1.blocked(before)
    out = mamba1.scan(x, dt, a, b, c, d, floats)
    expected, after = definition.scan(x, dt, a, b, c, d, before)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(mamba1.unblocked(floats), after, rtol=1e-5, atol=1e-5)
    by_steps = mamba1.blocked(before)
    for t in range(70):
        row = x[:, t].contiguous(), dt[:, t].contiguous(), a, b[:, t].contiguous(), c[:, t].contiguous()
        y = mamba1.update(None, None, None, None, by_steps, *row, twin.channels)
        torch.testing.assert_close(y + d * x[:, t], out[:, t], rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(by_steps, floats, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["dsq", "dsq_static_p"])
def test_a_state_that_has_met_nan_shows_it(kind: str) -> None:
    twin = Twin(kind, 4, 16)
    x, dt, a, b, c = token(twin, True)
    x[1, 3] = float("nan")
    codes, channel, state = twin.held()
    mamba1.update(codes, channel, state, twin.fixed, None, x, dt, a, b, c, twin.channels, 4)
    twin.step(x, dt, a, b, c)
    assert state is not None
    assert twin.state is not None
    assert torch.equal(state.isnan(), twin.state.isnan())
    assert state[1, 0].isnan().all()
    assert not state[[0, 2]].isnan().any()


def test_zeros_and_large_numbers_stay_what_they_are() -> None:
    twin = Twin("dsq", 4, 16)
    x, dt, _, b, c = token(twin, False)
    for size in (0.0, 1e-9, 3e5):
        twin.keep(torch.zeros(SEQUENCES, twin.inner, STATES))
        codes, channel, state = twin.held()
        given = (x * size, dt, torch.zeros(twin.inner, STATES), b, c)
        mamba1.update(codes, channel, state, None, None, *given, twin.channels, 4)
        twin.step(*given)
        for found, expected in zip((codes, channel, state), (twin.codes, twin.channel, twin.state)):
            assert torch.equal(found, expected)


def test_what_does_not_fit_is_refused() -> None:
    twin = Twin("dsq", 4, 16, 3)
    given = token(twin, True)
    codes, channel, state = twin.held()
    with pytest.raises(ValueError, match="heads of 24"):
        mamba1.update(codes, channel, state, None, None, *given, 24, 4)
    with pytest.raises(ValueError, match="replay window"):
        mamba1.update(codes, channel, state, None, None, *given, 16, 4, False, False, twin.recent, twin.count + 3)
    with pytest.raises(ValueError, match="contiguous"):
        mamba1.update(codes, channel, state, None, None, given[0].T.contiguous().T, *given[1:], 16, 4)
