"""A gated delta rule's step from packed states: codes, scales and windows of its definition to the last bit."""

from __future__ import annotations

import itertools

import pytest
import torch
from llmcompress_kernels import select, state
from llmcompress_kernels.delta_state import dsq_delta_update
from llmcompress_kernels.reference import delta_state as definition
from llmcompress_kernels.reference.delta import gated_delta_rule, unit
from llmcompress_kernels.reference.state import stored_state

HEADS, GROUPS, SEQUENCES = 4, 2, 2
ROUNDINGS = [(4, False, False), (4, False, True), (4, True, False), (8, False, False), (8, False, True)]


class Text:
    """Tokens through a rule, and states to start from."""

    def __init__(self, channels: int, states: int, seed: int = 0) -> None:
        self.channels, self.states = channels, states
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=self.generator)

    def token(self, sequences: int = SEQUENCES) -> tuple[torch.Tensor, ...]:
        """Value, decay, step, key and query."""
        decay, step = (torch.rand(sequences, HEADS, generator=self.generator) for _ in range(2))
        key, query = (unit(self.normal(sequences, GROUPS, self.states)) for _ in range(2))
        return self.normal(sequences, HEADS, self.channels), 0.7 + 0.3 * decay, step, key, query * self.states**-0.5

    def held(self, fixed: bool, window: int, bits: int, refit: bool, dither: bool) -> list[torch.Tensor | None]:
        """Codes, channel, scale, fixed, recent, count."""
        # outliers in both axes
        rows, columns = self.normal(1, HEADS, self.channels, 1).exp(), self.normal(1, HEADS, 1, self.states).exp()
        start = self.normal(SEQUENCES, HEADS, self.channels, self.states) * rows * columns
        scale = start.abs().mean((0, 3)).sqrt().half() if fixed else None
        codes, channel, side = state.dsq_pack(start, scale, bits, refit, dither)
        if window == 1:
            return [codes, channel, side, scale, None, None]
        width = HEADS * self.channels + HEADS + GROUPS * self.states
        # what is not filled yet must not be read
        recent = torch.full((SEQUENCES, window - 1, width), torch.nan)
        return [codes, channel, side, scale, recent, torch.zeros(SEQUENCES, dtype=torch.int32)]


def cloned(held: list[torch.Tensor | None]) -> list[torch.Tensor | None]:
    return [None if part is None else part.clone() for part in held]


def equal(one: list[torch.Tensor | None], other: list[torch.Tensor | None]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(
        a is b or (a is not None and b is not None and torch.equal(a.nan_to_num(), b.nan_to_num())) for a, b in pairs
    )


@pytest.mark.usefixtures("state_kernels")
@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("size", [(16, 32), (48, 64), (128, 128), (32, 256)])
def test_codes_are_the_definitions_to_the_last_bit(size: tuple[int, int], fixed: bool, window: int) -> None:
    for (bits, refit, dither), seed in itertools.product(ROUNDINGS, range(2)):
        text = Text(*size, seed)
        ours = text.held(fixed, window, bits, refit, dither)
        theirs, before = cloned(ours), cloned(ours)
        for _ in range(2 * window + 1):
            token = text.token()
            got = dsq_delta_update(*ours, *token, bits, refit, dither)
            wanted = definition.dsq_delta_update(*theirs, *token, bits, refit, dither)
            assert equal(ours, theirs)
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
        assert not equal(ours[:1], before[:1])


@pytest.mark.usefixtures("state_kernels")
def test_sequences_stand_at_different_places_of_their_windows() -> None:
    text = Text(32, 64)
    ours = text.held(False, 4, 4, False, True)
    assert ours[5] is not None
    ahead = [None if part is None else part[1:].clone() for part in ours]
    first = text.token(1)
    dsq_delta_update(*ahead, *first, 4, False, True)
    for whole, part in zip(ours, ahead, strict=True):
        if whole is not None and part is not None:
            whole[1:] = part
    theirs = cloned(ours)
    for _ in range(6):
        token = text.token()
        dsq_delta_update(*ours, *token, 4, False, True)
        definition.dsq_delta_update(*theirs, *token, 4, False, True)
        assert equal(ours, theirs)
    assert ours[5].tolist() == [2, 3]


@pytest.mark.parametrize("window", [1, 3])
def test_it_is_the_gated_delta_rule_of_the_stored_state(window: int) -> None:
    """Between two roundings nothing but the order of sums differs from the rule in float."""
    text = Text(16, 32)
    held = text.held(False, window, 8, False, False)
    wide = HEADS // GROUPS
    for _ in range(2):
        codes, channel, scale, fixed = held[:4]
        assert codes is not None
        assert scale is not None
        before, _ = stored_state(codes, channel, scale, fixed, 8)
        tokens = [text.token() for _ in range(window)]
        found = torch.stack([dsq_delta_update(*held, *token, 8) for token in tokens], 1)
        value, decay, step, key, query = (torch.stack(part, 1) for part in zip(*tokens, strict=True))
        for s in range(SEQUENCES):
            both = (part[s].repeat_interleave(wide, 1) for part in (query, key))
            wanted, _ = gated_delta_rule(*both, value[s], decay[s], step[s], before[s].mT)
            torch.testing.assert_close(found[s], wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))


def test_states_that_are_no_numbers_show_it() -> None:
    text = Text(16, 32)
    held = text.held(False, 1, 4, False, True)
    value, *rest = text.token()
    value[0, 1, 3] = torch.nan
    dsq_delta_update(*held, value, *rest, 4, False, True)
    assert held[2] is not None
    assert held[2][0, 1].isnan().all()
    assert not held[2][1].isnan().any()


def test_operator_checks() -> None:
    text = Text(16, 32)
    for window in (1, 3):
        arguments = (*text.held(False, window, 4, False, False), *text.token(), 4)
        if arguments[4] is not None:
            arguments[4].zero_()
        checks = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.llmcompress.dsq_delta_update, arguments, test_utils=checks)
    assert "dsq_delta_update" in {row.op for row in select.explain()}


def test_a_window_that_is_filled_too_far_is_refused() -> None:
    text = Text(16, 32)
    held = text.held(False, 3, 4, False, False)
    assert held[5] is not None
    held[5][1] = 3
    before = cloned(held)
    with pytest.raises(ValueError, match="replay window"):
        dsq_delta_update(*held, *text.token(), 4)
    assert equal(held, before)
