"""Replay windows: decoding gives, to the last bit, the states of a scan that rounds every R-th token."""

from __future__ import annotations

import pytest
import torch
from llmcompress_kernels import cpu_state, select, state
from llmcompress_kernels.reference import state as definition

HEADS, GROUPS = 4, 2
ROUNDINGS = [(4, False, False), (4, False, True), (4, True, False), (8, False, False)]


def text(sequences: int, tokens: int, channels: int, states: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(7)
    drive = torch.randn(sequences, tokens, HEADS, channels, generator=generator)
    decay = torch.rand(sequences, tokens, HEADS, generator=generator) * 0.3 + 0.7
    b, c = (torch.randn(sequences, tokens, GROUPS, states, generator=generator) for _ in range(2))
    return drive, decay, b, c


def empty_window(sequences: int, window: int, channels: int, states: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = HEADS * channels + HEADS + GROUPS * states
    # what is not filled yet must not be read
    return torch.full((sequences, window - 1, width), torch.nan), torch.zeros(sequences, dtype=torch.int32)


@pytest.mark.parametrize("window", [1, 2, 4, 7])
@pytest.mark.parametrize(("bits", "refit", "dither"), ROUNDINGS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize(("channels", "states"), [(16, 64), (64, 128)])
def test_a_window_gives_the_states_of_a_scan(
    channels: int, states: int, fixed: bool, bits: int, refit: bool, dither: bool, window: int
) -> None:
    start = torch.randn(2, HEADS, channels, states, generator=torch.Generator().manual_seed(1))
    scale = start.abs().mean((0, 3)).sqrt().half() if fixed else None
    codes, channel, side = state.dsq_pack(start, scale, bits, refit, dither)
    kept = empty_window(2, window, channels, states)
    drive, decay, b, c = text(2, 10, channels, states)
    stored, _ = definition.stored_state(codes, channel, side, scale, bits)
    widths = torch.full((HEADS,), bits, dtype=torch.int32)
    wanted, last, _ = definition.selective_scan_q(
        drive, decay, b, c, stored, widths, scale, window, window, False, refit, dither
    )
    for t in range(10):
        token = (drive[:, t], decay[:, t], b[:, t], c[:, t])
        got = state.dsq_replay_update(codes, channel, side, scale, *kept, *token, bits, refit, dither)
        assert torch.allclose(got, wanted[:, t], rtol=1e-4, atol=1e-5 * float(wanted[:, t].abs().max()))
    now, _ = definition.stored_state(codes, channel, side, scale, bits)
    assert torch.equal(definition.replayed(now, *kept, GROUPS), last)
    assert kept[1].tolist() == [10 % window] * 2


def test_sequences_stand_at_different_places_of_their_windows() -> None:
    start = torch.randn(2, HEADS, 16, 64, generator=torch.Generator().manual_seed(2))
    packed = state.dsq_pack(start, None, 4)
    together = [t.clone() for t in packed if t is not None]
    recent, count = empty_window(2, 3, 16, 64)
    drive, decay, b, c = text(2, 6, 16, 64)
    # the second sequence is one token ahead
    first = (drive[1:, 0], decay[1:, 0], b[1:, 0], c[1:, 0])
    part = [t[1:] for t in together]
    state.dsq_replay_update(*part, None, recent[1:], count[1:], *first, 4)
    for t in range(5):
        token = [torch.cat((x[:1, t], x[1:, t + 1])) for x in (drive, decay, b, c)]
        state.dsq_replay_update(*together, None, recent, count, *token, 4)
    assert count.tolist() == [2, 0]
    for row, tokens in ((0, 5), (1, 6)):
        alone, kept = [t[row : row + 1].clone() for t in packed if t is not None], empty_window(1, 3, 16, 64)
        for t in range(tokens):
            at = slice(row, row + 1)
            state.dsq_replay_update(*alone, None, *kept, drive[at, t], decay[at, t], b[at, t], c[at, t], 4)
        assert all(torch.equal(x[0], y[row]) for x, y in zip(alone, together, strict=True))


def test_a_window_of_one_token_is_the_update() -> None:
    start = torch.randn(3, HEADS, 16, 32, generator=torch.Generator().manual_seed(3))
    codes, channel, side = state.dsq_pack(start, None, 4)
    others = [codes.clone(), channel.clone(), side.clone()]
    token = [t[:, 0] for t in text(3, 1, 16, 32)]
    got = state.dsq_replay_update(codes, channel, side, None, *empty_window(3, 1, 16, 32), *token, 4)
    wanted = state.dsq_state_update(*others, None, *token, 4)
    assert torch.allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(x, y) for x, y in zip((codes, channel, side), others, strict=True))


def test_operator_checks() -> None:
    codes, channel, side = state.dsq_pack(torch.randn(2, HEADS, 16, 32), None, 4)
    recent, count = empty_window(2, 3, 16, 32)
    arguments = (codes, channel, side, None, recent.zero_(), count, *(t[:, 0] for t in text(2, 1, 16, 32)), 4)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.llmcompress.dsq_replay_update, arguments, test_utils=checks)
    assert "dsq_replay_update" in {row.op for row in select.explain()}


@pytest.mark.parametrize("window", [1, 3])
def test_a_mixer_within_a_window(window: int) -> None:
    sequences, channels, states = 2, 16, 32
    inner, width = HEADS * channels, HEADS * channels + 2 * GROUPS * states
    generator = torch.Generator().manual_seed(4)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    weights = (normal(width, 4), normal(width), normal(HEADS), -normal(HEADS).abs(), normal(HEADS), normal(inner))
    held = [*state.dsq_pack(normal(sequences, HEADS, channels, states), None, 4)]
    theirs = [t.clone() for t in held]
    kept, conv = empty_window(sequences, window, channels, states), normal(sequences, width, 4)
    kept_too, other = empty_window(sequences, window, channels, states), conv.clone()
    sizes = (GROUPS, states, 4, 1e-5, False, True)
    for _ in range(2 * window):
        projected = normal(sequences, inner + width + HEADS)
        got = state.mamba2_decode(projected, conv, *weights, *held, None, None, *sizes, *kept)
        wanted = definition.mamba2_decode(projected, other, *weights, *theirs, None, None, *sizes, *kept_too)
        # exp may differ in its last bit, so that a value between two codes goes the other way
        assert float((got - wanted).norm() / wanted.norm()) < 2e-2
        assert torch.equal(kept[1], kept_too[1])


def test_a_count_beyond_the_window_is_refused() -> None:
    if cpu_state.unavailable() is not None or cpu_state._kernels() is None:
        pytest.skip(f"no native state kernels: {cpu_state.unavailable()}")
    held = state.dsq_pack(torch.randn(2, HEADS, 16, 32), None, 4)
    recent, count = empty_window(2, 3, 16, 32)
    token = [t[:, 0] for t in text(2, 1, 16, 32)]
    for wrong in (-1, 3):
        count[1] = wrong
        with pytest.raises(ValueError, match="replay window"):
            state.dsq_replay_update(*held, None, recent, count, *token, 4)
