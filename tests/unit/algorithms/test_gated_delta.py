"""The gated delta rule token by token: the kernels' definition of it in float, and what rounding its state does."""

from __future__ import annotations

import pytest
import torch
from llmcompress_kernels.reference.delta import gated_delta_rule, unit

from llmcompress.algorithms.decoupled_scales import fake_quantize
from llmcompress.algorithms.gated_delta import DeltaInputs, difference, scan
from llmcompress.quant.states import StateSpec

HEADS, GROUPS, VALUES, KEYS = 4, 2, 12, 8


def text(tokens: int, decay: float = 0.9, seed: int = 0) -> DeltaInputs:
    generator = torch.Generator().manual_seed(seed)
    query, key = (unit(torch.randn(2, tokens, GROUPS, KEYS, generator=generator)) for _ in range(2))
    value = torch.randn(2, tokens, HEADS, VALUES, generator=generator)
    step = torch.rand(2, tokens, HEADS, generator=generator)
    return DeltaInputs(query, key, value, torch.full((2, tokens, HEADS), decay), step)


def test_without_rounding_it_is_the_rule() -> None:
    given, start = text(20), torch.randn(2, HEADS, VALUES, KEYS, generator=torch.Generator().manual_seed(1))
    found, last = scan(given, start, None)
    for s in range(2):
        both = (part[s].repeat_interleave(HEADS // GROUPS, 1) for part in (given.query, given.key))
        wanted, after = gated_delta_rule(*both, given.value[s], given.decay[s], given.step[s], start[s].mT)
        torch.testing.assert_close(found[s], wanted, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(last[s], after.mT, atol=1e-5, rtol=1e-5)
    first, state = scan(text(20), None, None)
    assert torch.equal(first, given.run(torch.zeros_like(start), None)[0])
    assert state.shape == start.shape


def test_decays_along_a_key_are_those_of_kimi_delta_attention() -> None:
    from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention

    given, start = text(20), torch.randn(2, HEADS, VALUES, KEYS, generator=torch.Generator().manual_seed(1))
    query, key = (part.repeat_interleave(HEADS // GROUPS, 2) for part in (given.query, given.key))
    decay = torch.rand(2, 20, HEADS, KEYS, generator=torch.Generator().manual_seed(3))
    found, last = scan(DeltaInputs(query, key, given.value, decay, given.step), start, None)
    wanted, after = recurrent_kimi_delta_attention(
        query * KEYS**0.5, key, given.value, decay.log(), given.step, initial_state=start.mT, output_final_state=True
    )
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(last, after.mT, atol=1e-5, rtol=1e-5)
    same = DeltaInputs(query, key, given.value, given.decay.unsqueeze(-1).expand_as(decay), given.step)
    torch.testing.assert_close(scan(same, start, None)[0], scan(given, start, None)[0], atol=1e-5, rtol=1e-5)
    assert same.log_decay.shape == (2, 20, HEADS)


def test_a_whole_step_replaces_what_a_state_says_of_a_key() -> None:
    given = text(1, decay=1.0)
    state = torch.randn(2, HEADS, VALUES, KEYS, generator=torch.Generator().manual_seed(2))
    key, ones = given.key[:, 0], torch.ones(2, HEADS)
    change = difference(state, given.value[:, 0], ones, ones, key)
    wide = key.repeat_interleave(HEADS // GROUPS, 1)
    after = state + change.unsqueeze(-1) * wide.unsqueeze(-2)
    torch.testing.assert_close((after * wide.unsqueeze(-2)).sum(-1), given.value[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rounding", ["rtn", "dither"])
def test_states_are_stored_after_every_token(rounding: str) -> None:
    given, outputs, seen = text(30), {}, []
    for bits in (4, 8):
        spec = StateSpec(bits, rounding=rounding)  # type: ignore[arg-type]

        def store(fresh: torch.Tensor, token: int, spec: StateSpec = spec) -> torch.Tensor:
            seen.append(token)
            return fake_quantize(fresh, spec)

        outputs[bits], last = scan(given, None, store)
        assert torch.equal(fake_quantize(last, StateSpec(16, "none")), last)
    exact, _ = scan(given, None, None)
    errors = {bits: float((out - exact).norm() / exact.norm()) for bits, out in outputs.items()}
    assert seen == [*range(30)] * 2
    assert torch.equal(outputs[4][:, 0], exact[:, 0]), "the first token reads what was not stored yet"
    assert 10 * errors[8] < errors[4] < 0.3
