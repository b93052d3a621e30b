"""Operators on recurrent states: the C++ kernels give the definition's codes to the last bit, and its gradients."""

from __future__ import annotations

import pytest
import torch
from llmcompress_kernels import select, state
from llmcompress_kernels.reference import state as definition

from llmcompress.algorithms import decoupled_scales as dsq
from llmcompress.quant.states import StateSpec

SHAPES = [(16, 32), (64, 64), (32, 128), (16, 256)]
# spread of the outliers of both axes, and a factor on everything
# the last but one has subnormal state scales, whose codes need clamping
EXTREMES = [(0.0, 1.0), (1.0, 1.0), (4.0, 1e-3), (4.0, 1e6), (1.0, 0.0), (2.0, 1e-9), (0.5, 1e-30)]


def random_state(sequences: int, heads: int, channels: int, states: int, spread: float, factor: float) -> torch.Tensor:
    rows = torch.randn(sequences, heads, channels, 1).mul(spread).exp()
    columns = torch.randn(sequences, heads, 1, states).mul(spread).exp()
    return torch.randn(sequences, heads, channels, states) * rows * columns * factor


def token(sequences: int, heads: int, groups: int, channels: int, states: int) -> tuple[torch.Tensor, ...]:
    shapes = (
        (sequences, heads, channels),
        (sequences, heads),
        (sequences, groups, states),
        (sequences, groups, states),
    )
    drive, decay, b, c = (torch.randn(shape) for shape in shapes)
    return drive, 0.7 + 0.3 * decay.sigmoid(), b, c


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("codec", "rounding"),
    [("dsq", "rtn"), ("dsq_refit", "rtn"), ("dsq_static_p", "rtn"), ("dsq", "dither"), ("dsq_static_p", "dither")],
)
@pytest.mark.parametrize(("channels", "states"), SHAPES)
@pytest.mark.usefixtures("state_kernels")
def test_packed_update_gives_the_definitions_codes(
    bits: int, codec: str, rounding: str, channels: int, states: int
) -> None:
    spec, fixed = StateSpec(bits=bits, codec=codec, rounding=rounding), codec == "dsq_static_p"
    how = (bits, codec == "dsq_refit", rounding == "dither")
    for spread, factor in EXTREMES:
        start = random_state(2, 4, channels, states, spread, factor)
        scale = dsq.static_channel_scale(start.abs().mean((0, 3))) if fixed else None
        found = dsq.quantize(start, spec, scale)
        codes = dsq.pack_codes(found.codes, bits)
        mine = [codes, None if fixed else found.channel.contiguous(), found.state.contiguous(), scale]
        theirs = [None if t is None else t.clone() for t in mine]
        for _ in range(4):
            drive, *rest = token(2, 4, 2, channels, states)
            drive = drive * start.abs().mean(-1)
            got = state.dsq_state_update(*mine, drive, *rest, *how)
            expected = definition.dsq_state_update(*theirs, drive, *rest, *how)
            for a, b in zip(mine, theirs, strict=True):
                assert a is None or torch.equal(a, b)
            assert torch.allclose(got, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("rounding", ["rtn", "dither"])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.usefixtures("state_kernels")
def test_numbers_at_the_middle_between_codes(rounding: str, fixed: bool) -> None:
    """Enough of them that scales and codes come up which an approximation cannot decide; inputs that cancel the state,
    heads that forget everything or are far smaller than what comes in."""
    generator = torch.Generator().manual_seed(5)
    start = torch.randn(8, 8, 64, 128, generator=generator)
    start[1] = start[1].mul(2).round() / 2
    scale = dsq.static_channel_scale(start.abs().mean((0, 3))) if fixed else None
    codes, channel, side = definition.dsq_pack(start, scale, 4, False, rounding == "dither")
    mine = [codes.clone(), None if fixed else channel, side, scale]
    theirs = [None if t is None else t.clone() for t in mine]
    for turn in range(3):
        drive, c = (torch.randn(8, *shape, generator=generator) for shape in ((8, 64), (1, 128)))
        b, decay = torch.randn(8, 1, 128, generator=generator), torch.rand(8, 8, generator=generator) * 0.2 + 0.8
        decay[2], decay[3, 0], decay[3, 1] = 1.0, 0.0, 1e-12
        drive[4] *= 1e6
        if turn == 0:
            drive[5, 0, 0], decay[5] = 1.0, 1.0
            b[5, 0] = -start[5, 0, 0]
        drive[6] = 0.0
        state.dsq_state_update(*mine, drive, decay, b, c, 4, False, rounding == "dither")
        definition.dsq_state_update(*theirs, drive, decay, b, c, 4, False, rounding == "dither")
        for a, other in zip(mine, theirs, strict=True):
            assert a is None or torch.equal(a, other)


def test_definition_equals_the_codec_of_the_library() -> None:
    for spread, factor in EXTREMES:
        fresh = random_state(2, 3, 24, 40, spread, factor)
        for bits in (4, 6, 8):
            qmax = torch.full((1, 1, 1), float((1 << (bits - 1)) - 1))
            for codec, rounding in (("dsq", "rtn"), ("dsq_refit", "rtn"), ("dsq", "dither")):
                expected = dsq.quantize(fresh, StateSpec(bits=bits, codec=codec, rounding=rounding))
                how = (codec == "dsq_refit", rounding == "dither")
                codes, channel, scale, _ = definition.dsq_quantize(fresh, qmax, None, *how)
                assert torch.equal(codes.to(torch.int8), expected.codes)
                assert torch.equal(channel, expected.channel)
                assert torch.equal(scale, expected.state)
    codes = torch.randint(-7, 8, (3, 5, 64), dtype=torch.int8)
    assert torch.equal(definition.pack(codes, 4), dsq.pack_codes(codes, 4))
    assert torch.equal(definition.unpack(dsq.pack_codes(codes, 4), 4, 64), codes)


@pytest.mark.parametrize(("channels", "states"), SHAPES)
@pytest.mark.usefixtures("state_kernels")
def test_float_update(channels: int, states: int) -> None:
    held = torch.randn(3, 4, channels, states)
    other = held.clone()
    inputs = token(3, 4, 2, channels, states)
    got, expected = state.state_update(held, *inputs), definition.state_update(other, *inputs)
    assert torch.allclose(held, other, atol=1e-5)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


def sequence(channels: int, states: int, tokens: int = 41, leaf: bool = False) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    drive = torch.randn(2, tokens, 4, channels, generator=generator)
    decay = 0.8 + 0.199 * torch.rand(2, tokens, 4, generator=generator)
    b, c = (torch.randn(2, tokens, 2, states, generator=generator) for _ in range(2))
    return [t.requires_grad_(leaf) for t in (drive, decay, b, c)]


@pytest.mark.parametrize(
    ("bits", "first", "window", "kind"),
    [
        ((4, 4, 4, 4), 1, 1, "dsq"),
        ((4, 6, 8, 16), 9, 1, "dsq"),
        ((4, 8, 4, 8), 3, 4, "fixed"),
        ((4, 6, 8, 16), 2, 3, "refit"),
        ((4, 6, 8, 16), 1, 2, "dither"),
    ],
)
@pytest.mark.usefixtures("state_kernels")
def test_scan_and_its_gradients(bits: tuple[int, ...], first: int, window: int, kind: str) -> None:
    scale = (torch.rand(4, 16) + 0.1).half() if kind == "fixed" else None
    how = (kind == "refit", kind == "dither")
    start = random_state(2, 4, 16, 32, 0.5, 1.0)
    rest = (start, torch.tensor(bits, dtype=torch.int32), scale, first, window)
    plain = sequence(16, 32)
    out, last = state.selective_scan_q(*plain, *rest, *how)
    expected, wanted, kept = definition.selective_scan_q(*plain, *rest, True, *how)
    assert torch.equal(last, wanted)
    assert torch.allclose(out, expected, rtol=1e-4, atol=1e-4)
    exact, _ = state.selective_scan_q(*plain, start, torch.full((4,), 16), scale, first, window)
    assert float((exact - out).norm() / exact.norm()) > 1e-3
    weights = torch.randn(out.shape)
    leaves = sequence(16, 32, leaf=True)
    got = torch.autograd.grad((state.selective_scan_q(*leaves, *rest, *how)[0] * weights).sum(), leaves)
    by_hand = definition.selective_scan_q_backward(weights, *plain, kept, *rest[1:], *how)
    for mine, theirs in zip(got, by_hand, strict=True):
        assert float((mine - theirs).norm() / theirs.norm()) < 1e-5


def test_the_definitions_gradient_is_autograds() -> None:
    leaves = [t.double().detach()[:, :5].requires_grad_() for t in sequence(4, 8)]
    start, bits = torch.zeros(2, 4, 4, 8, dtype=torch.float64), torch.full((4,), 16)
    # along random directions: the whole Jacobian takes a hundred times as long
    assert torch.autograd.gradcheck(lambda *some: state.selective_scan_q(*some, start, bits)[0], leaves, fast_mode=True)


def test_sizes_without_a_kernel_run_by_the_definition() -> None:
    inputs = sequence(5, 10)
    rest = (torch.zeros(2, 4, 5, 10), torch.full((4,), 4), None, 1, 1)
    out, last = state.selective_scan_q(*inputs, *rest)
    expected, wanted, _ = definition.selective_scan_q(*inputs, *rest, False)
    assert torch.equal(out, expected)
    assert torch.equal(last, wanted)


def test_operator_checks() -> None:
    rest = (torch.zeros(2, 4, 16, 32), torch.full((4,), 4, dtype=torch.int32), None, 1, 1, False)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.llmcompress.selective_scan_q, (*sequence(16, 32, 5), *rest), test_utils=checks)
    held = torch.randn(2, 4, 16, 32)
    torch.library.opcheck(torch.ops.llmcompress.state_update, (held, *token(2, 4, 2, 16, 32)), test_utils=checks)
    found = dsq.quantize(held, StateSpec(bits=4))
    packed = (dsq.pack_codes(found.codes, 4), found.channel, found.state, None)
    arguments = (*packed, *token(2, 4, 2, 16, 32), 4)
    torch.library.opcheck(torch.ops.llmcompress.dsq_state_update, arguments, test_utils=checks)
    assert {row.op for row in select.explain()} >= set(state.SCHEMAS)


@pytest.mark.parametrize("bits", [4, 8, 32])
@pytest.mark.parametrize(("channels", "states", "groups"), [(16, 32, 2), (64, 128, 1)])
@pytest.mark.usefixtures("state_kernels")
def test_decode_step_of_a_mixer(bits: int, channels: int, states: int, groups: int) -> None:
    sequences, heads = 3, 4
    inner, width = heads * channels, heads * channels + 2 * groups * states
    start = random_state(sequences, heads, channels, states, 0.5, 1.0)
    found = dsq.quantize(start, StateSpec(bits=min(bits, 8)))
    packed = [dsq.pack_codes(found.codes, min(bits, 8)), found.channel, found.state, None, None]
    mine = packed if bits < 32 else [None, None, None, None, start]
    theirs = [None if t is None else t.clone() for t in mine]
    weights = (torch.randn(width, 4), torch.randn(width), torch.randn(heads), -torch.rand(heads), torch.randn(heads))
    gain, conv = torch.randn(inner), torch.randn(sequences, width, 4)
    other = conv.clone()
    for _ in range(3):
        projected = torch.randn(sequences, inner + width + heads)
        tail = (groups, states, bits, 1e-5)
        got = state.mamba2_decode(projected, conv, *weights, gain, *mine, *tail)
        expected = definition.mamba2_decode(projected, other, *weights, gain, *theirs, *tail)
        assert torch.equal(conv, other)
        # exp differs in the last bit, so a value between two codes may go either way
        assert float((got - expected).norm() / expected.norm()) < (1e-5 if bits == 32 else 2e-2)
    if bits < 32:
        differ = (dsq.unpack_codes(mine[0], bits, states) != dsq.unpack_codes(theirs[0], bits, states)).float().mean()
        assert float(differ) < 0.02


@pytest.mark.parametrize("history", [False, True])
@pytest.mark.parametrize(("channels", "states", "groups"), [(16, 32, 2), (32, 64, 2), (64, 128, 1)])
@pytest.mark.usefixtures("state_kernels")
def test_prompt_through_a_mixer(channels: int, states: int, groups: int, history: bool) -> None:
    sequences, heads, tokens = 2, 4, 300
    inner, width = heads * channels, heads * channels + 2 * groups * states
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    # the second head forgets everything at once, the third nearly nothing
    a = -torch.tensor([0.3, 200.0, 1e-4, 5.0])
    weights = (normal(width, 4), normal(width), normal(heads), a, normal(heads), 1 + 0.1 * normal(inner))
    conv = normal(sequences, width, 4) if history else None
    start = normal(sequences, heads, channels, states) if history else torch.zeros(sequences, heads, channels, states)
    projected = normal(sequences, tokens, inner + width + heads)
    other, limits = start.clone(), (0.01, 4.0)
    # time steps in the same tensor, and in one of their own
    projected, dt = projected[..., :-heads], projected[..., -heads:].clone() if history else projected[..., -heads:]
    got = state.mamba2_prefill(projected, dt, conv, *weights, start, groups, limits, 1e-5)
    expected = definition.mamba2_prefill(projected, dt, conv, *weights, other, groups, *limits, 1e-5)
    assert float((got - expected).norm() / expected.norm()) < 3e-6
    for head in range(heads):
        assert float((start[:, head] - other[:, head]).norm() / other[:, head].norm()) < 3e-6
    # a prompt in two parts is the prompt
    again = other.zero_() if conv is None else other.copy_(start)
    if conv is None:
        first = state.mamba2_prefill(projected[:, :123], dt[:, :123], None, *weights, again, groups, limits, 1e-5)
        mixed = projected[:, 119:123, inner : inner + width].transpose(1, 2).contiguous()
        second = state.mamba2_prefill(projected[:, 123:], dt[:, 123:], mixed, *weights, again, groups, limits, 1e-5)
        assert float((torch.cat((first, second), 1) - got).norm() / got.norm()) < 3e-6
        assert float((again - start).norm() / start.norm()) < 3e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.usefixtures("state_kernels")
def test_pack_gives_the_definitions_codes(bits: int, fixed: bool) -> None:
    for channels, states in SHAPES:
        for spread, factor in EXTREMES:
            held = random_state(2, 4, channels, states, spread, factor)
            scale = dsq.static_channel_scale(held.abs().mean((0, 3))) if fixed else None
            for how in ((False, False), (True, False), (False, True)):
                got, expected = state.dsq_pack(held, scale, bits, *how), definition.dsq_pack(held, scale, bits, *how)
                assert (got[1] is None) == fixed
                for mine, theirs in zip(got, expected, strict=True):
                    assert mine is None or torch.equal(mine, theirs)


def test_operator_checks_of_the_prompt() -> None:
    checks = ("test_schema", "test_faketensor")
    weights = (torch.randn(128, 4), None, torch.randn(4), -torch.rand(4), torch.randn(4), torch.randn(64))
    held = torch.zeros(2, 4, 16, 32)
    arguments = (torch.randn(2, 5, 64 + 128), torch.randn(2, 5, 4), None, *weights, held, 1, 0.0, 9.0, 1e-5)
    torch.library.opcheck(torch.ops.llmcompress.mamba2_prefill, arguments, test_utils=checks)
    torch.library.opcheck(torch.ops.llmcompress.dsq_pack, (held, None, 4), test_utils=checks)
