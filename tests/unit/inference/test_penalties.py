"""Penalties and biases against sums written out token by token, and against transformers."""

from __future__ import annotations

import pytest
import torch

from llmcompress.inference.penalties import Penalties, Tally

PROMPT, WRITTEN = [3, 4, 3], [5, 6, 5, 5, 3]


def tally(how: Penalties) -> Tally:
    made = Tally(how, PROMPT, 12)
    for token in WRITTEN:
        made.take(token)
    return made


@pytest.mark.parametrize("presence", [0.0, 0.7, -1.5])
@pytest.mark.parametrize("frequency", [0.0, 0.4])
@pytest.mark.parametrize("repetition", [1.0, 1.3, 0.8])
@pytest.mark.parametrize("bias", [(), ((5, 2.0), (7, -100.0))])
def test_they_are_what_their_definitions_say(
    presence: float, frequency: float, repetition: float, bias: tuple[tuple[int, float], ...]
) -> None:
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1))
    expected = logits.tolist()
    for token, value in bias:
        expected[token] += value
    for token in {*PROMPT, *WRITTEN}:
        expected[token] = expected[token] / repetition if expected[token] > 0 else expected[token] * repetition
    for token in set(WRITTEN):
        expected[token] -= WRITTEN.count(token) * frequency + presence
    before = logits.clone()
    found = tally(Penalties(presence, frequency, repetition, bias)).apply(logits)
    torch.testing.assert_close(found, torch.tensor(expected))
    assert torch.equal(logits, before)


def test_repetition_is_transformers_repetition() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = torch.randn(12, generator=torch.Generator().manual_seed(2))
    processor = RepetitionPenaltyLogitsProcessor(1.2)
    expected = processor(torch.tensor([PROMPT + WRITTEN]), logits.clone().unsqueeze(0))[0]
    torch.testing.assert_close(tally(Penalties(repetition=1.2)).apply(logits), expected)


def test_what_is_forbidden_stays_so() -> None:
    logits = torch.full((12,), -torch.inf)
    logits[5] = 1.0
    found = tally(Penalties(1.0, 1.0, 1.5, ((4, 100.0),))).apply(logits)
    assert int(found.isfinite().sum()) == 1


def test_a_text_does_not_end_before_its_least_length() -> None:
    # -4 and 50 are no tokens, which a request may name all the same
    how = Penalties(least=2, ends=(-4, 3, 50))
    made, logits = Tally(how, PROMPT, 12), torch.zeros(12)
    for written in range(4):
        assert made.apply(logits).isfinite().tolist() == [written >= 2 or token != 3 for token in range(12)]
        made.take(5)
    # nothing else may come
    logits = torch.full((12,), -torch.inf)
    logits[3] = 0.0
    assert torch.equal(Tally(how, PROMPT, 12).apply(logits), logits)


def test_only_the_defaults_are_idle() -> None:
    assert Penalties().idle
    for how in (
        Penalties(0.1),
        Penalties(frequency=0.1),
        Penalties(repetition=1.1),
        Penalties(bias=((1, 1.0),)),
        Penalties(least=1),
    ):
        assert not how.idle
