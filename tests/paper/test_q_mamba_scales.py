"""Q-Mamba's DSQ (spec: decoupled channel and state scales) against slow, independent loops. Seed 0."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from llmcompress_kernels.reference.state import dither_of

from llmcompress.algorithms.decoupled_scales import (
    dequantize,
    fake_quantize,
    pack_codes,
    qmax_of,
    quantize,
    rotate,
    rounding_noise,
    static_channel_scale,
    static_state_scale,
    step_size,
    unpack_codes,
)
from llmcompress.quant.states import BITS, CODECS, StateSpec, packed_length, state_bytes

SMALLEST, LARGEST = np.float32(2.0**-24), np.float32(65504.0)


def fold(values: list[np.float32]) -> np.float32:
    """Sum in halves, padded to a power of two."""
    while len(values) & (len(values) - 1):
        values.append(np.float32(0))
    if len(values) == 1:
        return values[0]
    half = len(values) // 2
    return fold([np.float32(a + b) for a, b in zip(values[:half], values[half:])])


def slow_dsq(u: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One head, value by value, in numpy fp32: codes, channel scale, state scale."""
    channels, states = u.shape
    qmax = np.float32(2 ** (bits - 1) - 1)
    s_p = np.empty(channels, np.float16)
    for p in range(channels):
        mean = fold(list(np.abs(u[p]))) / np.float32(states)
        s_p[p] = np.float16(min(max(np.sqrt(mean), SMALLEST), LARGEST))
    s_n = np.empty(states, np.float16)
    for n in range(states):
        largest = max(abs(u[p, n]) / np.float32(s_p[p]) for p in range(channels))
        s_n[n] = np.float16(min(max(np.float32(largest), SMALLEST), LARGEST))
    codes = np.empty((channels, states), np.int8)
    for p in range(channels):
        for n in range(states):
            step = np.float32(s_p[p]) * (np.float32(s_n[n]) / qmax)
            codes[p, n] = int(min(max(np.rint(u[p, n] / step), -qmax), qmax))
    return codes, s_p, s_n


def states(count: int, channels: int, width: int) -> torch.Tensor:
    """Random states with outliers on both axes, and degenerate and extreme ones among them."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    u = normal(count, channels, width) * normal(count, channels, 1).exp() * normal(count, 1, width).exp()
    u[0::20] = 0
    u[1::20] *= (torch.rand(u[1::20].shape, generator=generator) > 0.98).float()
    u[2::20] *= 1e-40  # denormal
    u[3::20] *= 1e4
    u[4::20, 0] = 0  # dead channel
    u[5::20, :, 0] = 0  # dead state
    u[6::20] = u[6::20].sign()
    u[7::20] *= 1e-7
    u[8::20] *= 1e12  # beyond fp16 scales: codes saturate
    return u


@pytest.mark.parametrize("bits", BITS)
def test_codes_equal_a_slow_loop_on_ten_thousand_states(bits: int) -> None:
    u = states(3334, 3, 5)
    found = quantize(u, StateSpec(bits))
    assert found.channel is not None
    assert found.state is not None
    for row in range(u.shape[0]):
        codes, s_p, s_n = slow_dsq(u[row].numpy(), bits)
        assert np.array_equal(found.codes[row].numpy(), codes), row
        assert np.array_equal(found.channel[row].numpy(), s_p), row
        assert np.array_equal(found.state[row].numpy(), s_n), row
    assert int(found.codes.abs().max()) <= qmax_of(bits)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(4, 64, 128), (2, 16, 16)])
def test_error_is_at_most_half_a_step(bits: int, shape: tuple[int, ...]) -> None:
    u = states(40, *shape[1:])[:, None]
    u = u[[row for row in range(40) if row % 20 != 8]]
    spec = StateSpec(bits)
    found = quantize(u, spec)
    step = step_size(found.channel, found.state, qmax_of(spec.bits), u.shape[-1])
    # scales round to fp16, which may clip the largest value by 2^-11 of qmax steps on each axis
    slack = 1.0 + qmax_of(spec.bits) * 2.0**-9
    assert bool(((dequantize(found, spec) - u).abs() <= 0.5 * step * slack + 1e-12).all())


def test_zero_is_preserved() -> None:
    for codec in CODECS:
        static = torch.ones(1, 8 if codec == "dsq_static_p" else 16, dtype=torch.float16)
        assert torch.equal(
            fake_quantize(torch.zeros(2, 1, 8, 16), StateSpec(4, codec), static), torch.zeros(2, 1, 8, 16)
        )


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 7, 16, 127, 128])
def test_codes_survive_packing(bits: int, count: int) -> None:
    qmax = (1 << (bits - 1)) - 1
    codes = torch.randint(-qmax, qmax + 1, (3, 2, count), generator=torch.Generator().manual_seed(count)).to(torch.int8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (3, 2, packed_length(count, bits))
    assert packed.shape[-1] == math.ceil(count * bits / 8) or bits == 6
    assert torch.equal(unpack_codes(packed, bits, count), codes)


def test_packed_bytes_are_little_end_first() -> None:
    assert pack_codes(torch.tensor([1, -1], dtype=torch.int8), 4).tolist() == [0xF1]
    value = 0b000001 | 0b111111 << 6 | 0b000010 << 12 | 0b100001 << 18
    assert pack_codes(torch.tensor([1, -1, 2, -31], dtype=torch.int8), 6).tolist() == list(value.to_bytes(3, "little"))


def test_storage_is_that_of_the_formula() -> None:
    """Codes plus 16 (P + N) bits per head: 4.375 bits per element for 64 x 128."""
    for bits in BITS:
        assert state_bytes(StateSpec(bits), 64, 128) * 8 / (64 * 128) == bits + 0.375
    assert state_bytes(StateSpec(4, "dsq_static_p"), 64, 128) * 8 / (64 * 128) == 4.25


def test_calibrated_channel_scale_commutes_with_decay() -> None:
    """For a scalar decay, codes do not move when the channel scale does not: 64 steps without any new error."""
    u = states(20, 16, 32)[10][None]
    static = static_channel_scale(u.abs().mean(-1))
    spec = StateSpec(4, "dsq_static_p")
    first = quantize(u, spec, static)
    value = dequantize(first, spec, static)
    for _ in range(64):
        stored = quantize(0.99 * value, spec, static)
        assert torch.equal(stored.codes, first.codes)
        value = dequantize(stored, spec, static)


def test_every_codec_beats_one_scale_per_head() -> None:
    generator = torch.Generator().manual_seed(0)
    outliers = torch.randn(64, 1, generator=generator).exp() * torch.randn(128, generator=generator).exp()
    u = torch.randn(8, 2, 64, 128, generator=generator) * outliers
    calibrated = {
        "dsq_static_p": static_channel_scale(u.abs().mean((0, -1))),
        "dsq_t": static_state_scale(u.abs().amax(0).log()),
    }

    def error(codec: str, bits: int = 4) -> float:
        return float((fake_quantize(u, StateSpec(bits, codec), calibrated.get(codec)) - u).norm() / u.norm())  # type: ignore[arg-type]

    found = {codec: error(codec) for codec in CODECS if codec not in ("none", "per_head")}
    assert max(found.values()) < error("per_head")
    assert found["dsq"] < min(found["per_channel"], found["per_state"], found["group32"], found["rotate"])
    assert found["dsq_als"] < found["dsq"]
    assert error("dsq", 8) < error("dsq", 6) < error("dsq", 4)


def test_widths_per_head_equal_each_width_alone() -> None:
    u = states(6, 8, 16)[None, 9:]
    u = states(30, 8, 16)[9:13][None]
    widths = torch.tensor([4, 8, 6, 4])
    together = fake_quantize(u, StateSpec(4), head_bits=widths)
    for head, bits in enumerate(widths.tolist()):
        assert torch.equal(together[:, head], fake_quantize(u[:, head : head + 1], StateSpec(bits))[:, 0])


def test_stochastic_rounding_is_unbiased_and_repeatable() -> None:
    u = states(30, 8, 16)[9][None]
    spec = StateSpec(4, rounding="stochastic", seed=3)
    rounds = [fake_quantize(u, spec, noise=rounding_noise((1, 8, 16), 3, 0, step)) for step in range(400)]
    assert torch.equal(rounds[5], fake_quantize(u, spec, noise=rounding_noise((1, 8, 16), 3, 0, 5)))
    bias = torch.stack(rounds).mean(0) - u
    nearest = fake_quantize(u, StateSpec(4)) - u
    assert float(bias.norm()) < 0.3 * float(nearest.norm())


@pytest.mark.parametrize("bits", BITS)
def test_dithered_codes_equal_a_slow_loop(bits: int) -> None:
    u = states(200, 3, 5)
    found = quantize(u, StateSpec(bits, rounding="dither"))
    qmax = np.float32(2 ** (bits - 1) - 1)
    for index, one in enumerate(u.numpy()):
        _, s_p, s_n = slow_dsq(one, bits)
        assert np.array_equal(found.channel[index].numpy(), s_p)
        assert np.array_equal(found.state[index].numpy(), s_n)
        for n, scale in enumerate(s_n):
            level = int(scale.view(np.uint16)) * 40503 % 65536 // 4096
            dither = np.float32((2 * level - 15) / 32)
            for p in range(3):
                part = np.float32(one[p, n] * (np.float32(1) / np.float32(s_p[p])))
                unstep = np.float32(1) / (np.float32(scale) / qmax)
                value = np.float32(np.float64(part) * np.float64(unstep) + np.float64(dither))
                assert found.codes[index, p, n] == min(max(np.rint(value), -qmax), qmax)


def test_dithers_are_even_over_scales_that_follow_each_other() -> None:
    every = dither_of(torch.arange(0x7C00, dtype=torch.int16).view(torch.float16))
    assert sorted(set(every.tolist())) == [(2 * level - 15) / 32 for level in range(16)]
    # runs of 32 neighbouring scales: a state that only decays moves through them
    runs = every[: len(every) // 32 * 32].view(-1, 32)
    assert float(runs.mean(1).abs().max()) < 0.08


def test_a_dither_takes_the_gain_out_of_a_rounding() -> None:
    """A state that is rounded at every token, driven by what is below half of a step in most channels."""
    generator = torch.Generator().manual_seed(0)
    shape, tokens = (8, 16, 32), 300
    drive = torch.randn(tokens, *shape, generator=generator) * torch.randn(*shape[:2], 1, generator=generator).exp()

    def gain(rounding: str) -> float:
        spec, held, along, energy = StateSpec(4, rounding=rounding), torch.zeros(shape), 0.0, 0.0  # type: ignore[arg-type]
        for one in drive:
            fresh = 0.98 * held + 0.1 * one + 0.05
            held = fake_quantize(fresh, spec)
            along, energy = along + float((held * fresh).sum()), energy + float(fresh.square().sum())
        return along / energy - 1

    assert abs(gain("dither")) < 0.3 * abs(gain("rtn"))


def test_a_dither_needs_a_state_scale() -> None:
    for codec in ("per_channel", "dsq_als", "dsq_refit", "dsq_t"):
        with pytest.raises(AssertionError, match=codec):
            StateSpec(4, codec, rounding="dither")  # type: ignore[arg-type]


def test_rotation_is_its_own_inverse() -> None:
    u = states(30, 16, 32)[9:12]
    assert torch.allclose(rotate(rotate(u)), u, atol=1e-4)


def test_square_root_can_take_the_other_axis() -> None:
    u = states(30, 8, 16)[9:12]
    swapped = fake_quantize(u.transpose(-1, -2).contiguous(), StateSpec(4))
    # equal but for the order in which the two scales are multiplied
    assert torch.allclose(fake_quantize(u, StateSpec(4, sqrt_axis="state")), swapped.transpose(-1, -2), rtol=1e-6)
