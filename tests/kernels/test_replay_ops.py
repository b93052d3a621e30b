"""Replay windows: decoding gives, to the last bit, the states of a scan that rounds every R-th token."""

from __future__ import annotations

import ctypes
import itertools

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


class Case:
    """A sequence of tokens that is hard on arithmetic which is not the definition's.

    Args:
        kind: What is hard.
        seed: Of the generator.
        size: P and N.
    """

    SEQUENCES = 2

    def __init__(self, kind: str, seed: int, size: tuple[int, int]) -> None:
        self.kind, (self.channels, self.states) = kind, size
        self.generator = torch.Generator().manual_seed(seed)
        start = self.normal(self.SEQUENCES, HEADS, *size)
        if kind == "spread":
            start *= self.normal(self.SEQUENCES, HEADS, size[0], 1).mul(2).exp()
            start *= self.normal(self.SEQUENCES, HEADS, 1, size[1]).mul(2).exp()
        elif kind in ("tiny", "subnormal"):
            start *= {"tiny": 1e-6, "subnormal": 1e-30}[kind]
            start *= self.normal(self.SEQUENCES, HEADS, 1, size[1]).mul(1.5).exp()
        elif kind == "halves":
            start = start.mul(2).round() / 2
        self.start, self.scale = start, start.abs().mean(-1)
        self.last: tuple[torch.Tensor, torch.Tensor] | None = None

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.rand(shape, generator=self.generator)

    def token(self) -> tuple[torch.Tensor, ...]:
        """drive, decay, b and c."""
        sequences, kind = self.SEQUENCES, self.kind
        factor = {"strong": 30.0, "halves": 0.2, "zero": 0.0}.get(kind, 1.0)
        drive, b = factor * self.scale * self.normal(*self.scale.shape), self.normal(sequences, GROUPS, self.states)
        decay = 0.7 + 0.3 * self.uniform(sequences, HEADS)
        if kind == "forgetful":
            decay = self.uniform(sequences, HEADS) ** 8
        elif kind == "growing":
            decay = 3 * self.uniform(sequences, HEADS)
        elif kind == "sparse":
            b = b * (self.uniform(*b.shape) < 0.2)
        elif kind == "cancelling" and self.last is not None:
            # what the last token brought goes, nearly
            drive, b = -decay[..., None] * self.last[0] * (1 + 1e-6 * self.normal(*drive.shape)), self.last[1]
            self.last = None
        elif kind == "cancelling":
            drive = 1e3 * drive
            self.last = drive, b
        return drive, decay, b, self.normal(sequences, GROUPS, self.states)


KINDS = (
    "random",
    "spread",
    "tiny",
    "subnormal",
    "halves",
    "strong",
    "forgetful",
    "growing",
    "zero",
    "sparse",
    "cancelling",
)


@pytest.mark.parametrize("window", [*range(1, 9), 16, 17])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("state_kernels")
def test_codes_are_the_definitions_to_the_last_bit(kind: str, window: int) -> None:
    size = ((64, 128), (16, 64), (32, 256))[(window + KINDS.index(kind)) % 3]
    for fixed, dither in ((False, True), (True, False), (False, False), (True, True)):
        case = Case(kind, window, size)
        scale = case.scale.mean(0).sqrt().clamp(1e-7, 6e4).half() if fixed else None
        start = definition.dsq_pack(case.start, scale, 4, False, dither)
        held = [[start[0].clone(), None if fixed else start[1].clone(), start[2].clone(), scale] for _ in range(2)]
        kept = [empty_window(case.SEQUENCES, window, *size) for _ in range(2)]
        most = 0.0
        for _ in range(2 * window + 1):
            token = case.token()
            got = state.dsq_replay_update(*held[0], *kept[0], *token, 4, False, dither)
            wanted = definition.dsq_replay_update(*held[1], *kept[1], *token, 4, False, dither)
            for mine, theirs in zip((*held[0], kept[0][1]), (*held[1], kept[1][1]), strict=True):
                assert mine is None or torch.equal(mine, theirs)
            # read in another order: what has cancelled since may be a thousand times what is left
            most = max(most, float(wanted.abs().max()))
            assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * most + 1e-35)


# the others have no kernels that compute again
@pytest.mark.parametrize("state_kernels", ["avx512"], indirect=True)
@pytest.mark.parametrize("window", [1, 4, 8, 16])
@pytest.mark.usefixtures("state_kernels")
def test_few_numbers_are_computed_again(window: int) -> None:
    size, sequences, turns = (64, 128), 4, 8
    held = state.dsq_pack(
        torch.randn(sequences, HEADS, *size, generator=torch.Generator().manual_seed(5)), None, 4, dither=True
    )
    kept = empty_window(sequences, window, *size)
    drive, decay, b, c = text(sequences, turns * window, *size)
    counts = torch.zeros(4, dtype=torch.int64)
    count = ctypes.CDLL(cpu_state._kernels()._name).llmc_state_count
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    count(ctypes.c_void_p(counts.data_ptr()))
    try:
        for t in range(turns * window):
            state.dsq_replay_update(*held, None, *kept, drive[:, t], decay[:, t], b[:, t], c[:, t], 4, dither=True)
    finally:
        count(None)
        torch.set_num_threads(threads)
    roots, scales, codes, heads = (counts / (sequences * HEADS * turns)).tolist()
    # of 64, 128 and 8192 a head; bounds of scales grow with the roundings before
    assert 0 < roots < 0.3 + 0.1 * window
    assert 0 < scales < 1 + 0.25 * window
    assert 0 < codes < 4
    assert heads == 0


@pytest.mark.usefixtures("state_kernels")
def test_a_count_beyond_the_window_is_refused() -> None:
    held = state.dsq_pack(torch.randn(2, HEADS, 16, 32), None, 4)
    recent, count = empty_window(2, 3, 16, 32)
    token = [t[:, 0] for t in text(2, 1, 16, 32)]
    for wrong in (-1, 3):
        count[1] = wrong
        # not by way of the dispatcher, whose C++ exceptions sanitizers do not pass on
        with pytest.raises(ValueError, match="replay window"):
            cpu_state.dsq_replay_update(*held, None, recent, count, *token, 4)


@pytest.mark.parametrize("size", [(16, 32), (16, 64), (64, 128)])
@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.usefixtures("state_kernels")
def test_what_is_not_a_number_stays_so(window: int, size: tuple[int, int]) -> None:
    """In the sequence and the head that have met it; a state that comes out finite would hide what went wrong."""
    for bits, fixed, dither, where in itertools.product((4, 8), (False, True), (False, True), range(3)):
        case = Case("random", where, size)
        scale = case.scale.mean(0).sqrt().half() if fixed else None
        start = definition.dsq_pack(case.start, scale, bits, False, dither)
        held = [[start[0].clone(), None if fixed else start[1].clone(), start[2].clone(), scale] for _ in range(2)]
        kept = [empty_window(case.SEQUENCES, window, *size) for _ in range(2)]
        for t in range(2 * window + 2):
            token = case.token()
            if t == 1:
                token[where].view(case.SEQUENCES, -1)[0, 1] = torch.nan
            got = state.dsq_replay_update(*held[0], *kept[0], *token, bits, False, dither)
            wanted = definition.dsq_replay_update(*held[1], *kept[1], *token, bits, False, dither)
            assert torch.equal(got.isnan(), wanted.isnan())
            assert torch.equal(held[0][2].isnan(), held[1][2].isnan())
        assert bool(wanted[0].isnan().any()) and not bool(wanted[1].isnan().any())


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.usefixtures("state_kernels")
def test_prompts_and_scans_keep_what_is_not_a_number(fixed: bool) -> None:
    case = Case("random", 1, (16, 64))
    scale = case.scale.mean(0).sqrt().half() if fixed else None
    drive, decay, b, c = text(2, 5, 16, 64)
    case.start[0, 1, 3, 5] = drive[1, 2, 0, 4] = torch.nan
    got, wanted = state.dsq_pack(case.start, scale, 4), definition.dsq_pack(case.start, scale, 4)
    assert torch.equal(got[2].isnan(), wanted[2].isnan())
    given = (drive, decay, b, c, case.start, torch.full((HEADS,), 4, dtype=torch.int32), scale)
    mine, theirs = state.selective_scan_q(*given), definition.selective_scan_q(*given, 1, 1, False)
    for found, expected in zip(mine, theirs[:2], strict=True):
        assert torch.equal(found.isnan(), expected.isnan())
    assert bool(mine[1][0, 1].isnan().any()) and not bool(mine[1][1, 1].isnan().any())


def test_no_sequences_are_no_work() -> None:
    held = [t[:0] for t in state.dsq_pack(torch.randn(1, HEADS, 16, 64), None, 4)]
    got = state.dsq_replay_update(*held, None, *empty_window(0, 3, 16, 64), *(t[:, 0] for t in text(0, 1, 16, 64)), 4)
    assert got.shape == (0, HEADS, 16)
