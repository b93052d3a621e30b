"""The packed state cache in transformers' generate()."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llmcompress.models.registry import layout_from_config
from llmcompress.models.state_memory import sequence_bytes
from llmcompress.nn.mixers import attach
from llmcompress.nn.states import PackedState, cache_bytes
from llmcompress.quant.states import state_bytes

PROMPT = torch.randint(3, 64, (4, 9), generator=torch.Generator().manual_seed(0))
POLICIES: dict[str, dict[str, Any]] = {
    "dsq": {"bits": 4, "codec": "dsq"},
    "dither": {"bits": 4, "codec": "dsq", "rounding": "dither"},
    "window": {"bits": 6, "codec": "dsq", "window": 4},
    "window and dither": {"bits": 4, "codec": "dsq", "rounding": "dither", "window": 4},
    "window and noise": {"bits": 8, "codec": "per_channel", "rounding": "stochastic", "window": 3},
    "refitted": {"bits": 4, "codec": "dsq_als"},
    "stochastic": {"bits": 8, "codec": "per_channel", "rounding": "stochastic", "seed": 5},
    "group32": {"bits": 4, "codec": "group32"},
}


def quantized(tiny: Any, family: str, policy: dict[str, Any], **sizes: Any) -> tuple[Any, Any]:
    model = tiny.model(family, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("A_log"):
                parameter.sub_(3.0)
    model.generation_config.eos_token_id = None
    return model, attach(model, layout_from_config(model.config.to_dict()), policy)


def generate(model: Any, prompt: torch.Tensor = PROMPT, **options: Any) -> Any:
    return model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False,
        return_dict_in_generate=True, output_logits=True, **options,
    )  # fmt: skip


def cache_of(result: Any) -> Any:
    return result.past_key_values if getattr(result, "past_key_values", None) is not None else result.cache_params


@pytest.mark.parametrize("policy", POLICIES)
def test_fake_and_packed_give_the_same_tokens(policy: str, tiny: Any) -> None:
    model, runtime = quantized(tiny, "mamba2", POLICIES[policy])
    packed = generate(model)
    runtime.packed = False
    fake = generate(model)
    assert torch.equal(packed.sequences, fake.sequences)
    assert all(torch.equal(a, b) for a, b in zip(packed.logits, fake.logits))


def test_every_family_generates_the_same_in_both_ways(ssm_family: str, tiny: Any) -> None:
    model, runtime = quantized(tiny, ssm_family, POLICIES["dsq"])
    for options in ({}, {"num_beams": 3}):
        runtime.packed = True
        packed = generate(model, **options)
        runtime.packed = False
        assert torch.equal(packed.sequences, generate(model, **options).sequences)


@pytest.fixture(params=["dsq", "window and dither"])
def decoded_in_one_call(tiny: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """A model of a size whose decode step is one operator, here by its definition."""
    from llmcompress_kernels import cpu_state

    monkeypatch.setattr(cpu_state, "_kernels", lambda: None)
    sizes = {"num_heads": 4, "head_dim": 16, "n_groups": 2, "state_size": 32}
    return quantized(tiny, "mamba2", POLICIES[request.param], **sizes)


def test_beams_of_packed_and_float_states_are_the_same_to_the_last_bit(decoded_in_one_call: Any) -> None:
    """Another order of sums flips a code sooner or later, and then the beams part."""
    model, runtime = decoded_in_one_call
    packed = generate(model, num_beams=3, output_scores=True)
    assert cache_of(packed).layers[0].recurrent_states[0].codes
    runtime.packed = False
    fake = generate(model, num_beams=3, output_scores=True)
    assert torch.equal(packed.sequences, fake.sequences)
    assert all(torch.equal(one, two) for one, two in zip(packed.scores, fake.scores))


@pytest.mark.parametrize("policy", ["dsq", "dither", "window and dither"])
def test_states_of_a_delta_rule_packed_and_in_float_say_the_same(policy: str, tiny: Any) -> None:
    """Of a size with kernels, which ask codes and not values what they say of a key: other sums, the same state."""
    sizes = {"linear_key_head_dim": 32, "linear_value_head_dim": 16}
    model, runtime = quantized(tiny, "qwen3_5_text", POLICIES[policy], **sizes)
    with torch.no_grad():
        text = model.generate(PROMPT, max_new_tokens=24, do_sample=False)

        def scores() -> tuple[torch.Tensor, Any]:
            out = model(text[:, :9], use_cache=True)
            rows = []
            for at in range(9, text.shape[1]):
                out = model(text[:, at : at + 1], past_key_values=out.past_key_values, use_cache=True)
                rows.append(out.logits)
            return torch.cat(rows, 1), out.past_key_values

        packed, cache = scores()
        assert cache.layers[0].recurrent_states[0].codes
        runtime.packed = False
        fake, cache = scores()
        assert not cache.layers[0].recurrent_states[0].codes
        runtime.resting = True
        plain, _ = scores()
    # a scale that differs in its last bit gives its column another dither, for a whole window
    bound = 0.2 if "dither" in policy else 0.05
    assert float((packed - fake).norm()) < bound * float((fake - plain).norm())


def test_a_state_follows_its_beam(decoded_in_one_call: Any) -> None:
    """The score of each text is its likelihood when it is read without any search, 12 rows as in the search."""
    model, _ = decoded_in_one_call
    found = generate(model, num_beams=3, output_scores=True)
    assert (found.beam_indices[:, :24] != found.beam_indices[:, :1]).any(), "no beam ever moved: nothing is tested"
    text, start = found.sequences.repeat_interleave(3, 0), PROMPT.shape[1]
    with torch.no_grad():
        out = model(text[:, :start], use_cache=True)
        rows = [out.logits[:, -1]]
        for at in range(start, text.shape[1] - 1):
            out = model(text[:, at : at + 1], cache_params=out.cache_params, use_cache=True)
            rows.append(out.logits[:, -1])
    said = torch.stack(rows, 1).log_softmax(-1).gather(-1, text[:, start:, None])[..., 0].mean(-1)
    torch.testing.assert_close(found.sequences_scores, said[::3], atol=1e-5, rtol=0)


def test_sequences_do_not_influence_each_other(tiny: Any) -> None:
    model, _ = quantized(tiny, "mamba2", POLICIES["dsq"])
    together = generate(model)
    for row in range(4):
        alone = generate(model, PROMPT[row : row + 1])
        assert torch.equal(alone.sequences[0], together.sequences[row])


def test_memory_is_that_of_the_formula(tiny: Any) -> None:
    model, _ = quantized(tiny, "mamba2", POLICIES["dsq"])
    cache = cache_of(generate(model))
    measured = cache_bytes(cache)
    held = cache.layers[0].recurrent_states[0]
    assert isinstance(held, PackedState)
    expected = 4 * 2 * 8 * state_bytes(held.quantizer.spec, 8, 16)
    assert measured.states == pytest.approx(expected, rel=0.02)
    assert measured.convolution == 2 * 4 * (64 + 2 * 2 * 16) * 4 * 4
    assert measured.attention == 0


@pytest.mark.parametrize("policy", ["dsq", "window", "window and dither", "window and noise"])
def test_memory_tables_count_what_is_kept(policy: str, ssm_family: str, tiny: Any) -> None:
    model, _ = quantized(tiny, ssm_family, POLICIES[policy])
    cache = cache_of(generate(model))
    expected, convolution, _ = sequence_bytes(layout_from_config(model.config.to_dict()), POLICIES[policy], 4)
    measured = cache_bytes(cache)
    assert measured.states == 4 * expected
    assert measured.convolution == 4 * convolution
    held = [h for layer in cache.layers for h in getattr(layer, "recurrent_states", {}).values()]
    assert sum(h.quantizer.nbytes for h in held) == expected


@pytest.mark.parametrize("codec", ["dsq", "per_channel"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_sequences_stand_at_their_own_places_of_windows(family: str, codec: str, tiny: Any) -> None:
    """Sequences put together within their windows, moved and repeated go on as they do alone, in both forms."""
    from transformers import DynamicCache

    sizes = {"num_heads": 4, "head_dim": 16, "state_size": 32} if family == "mamba2" else {}
    floats, _ = quantized(tiny, family, {"bits": 16, "codec": "none"}, **sizes)
    model, runtime = quantized(tiny, family, {"bits": 4, "codec": codec, "window": 4}, **sizes)

    def started(row: int, steps: int, model: Any = model) -> Any:
        cache = DynamicCache(config=model.config)
        model(PROMPT[row : row + 1, :5], cache_params=cache, use_cache=True)
        for at in range(steps):
            model(PROMPT[row : row + 1, 5 + at, None], cache_params=cache, use_cache=True)
        return cache

    with torch.no_grad():
        for packed in (True, False):
            runtime.packed = packed
            both, second = started(0, 1), started(1, 3)
            for mine, other in zip(both.layers, second.layers):
                mine.recurrent_states[0] = mine.recurrent_states[0].append(other.recurrent_states[0])
                mine.conv_states[0] = torch.cat((mine.conv_states[0], other.conv_states[0]))
            held = both.layers[0].recurrent_states[0]
            assert held.count.tolist() == [1, 3]
            if packed:
                assert held.nbytes == 2 * held.quantizer.nbytes
            alone, plain = ([started(0, 1, each), started(1, 3, each)] for each in (model, floats))
            both.batch_repeat_interleave(2)
            both.batch_select_indices(torch.tensor([3, 0, 1]))
            near, off, rounding = [], 0.0, 0.0
            for word in PROMPT[2]:
                found = model(word.expand(3, 1), cache_params=both, use_cache=True).logits
                wanted, exact = (
                    torch.stack([each(word.view(1, 1), cache_params=one, use_cache=True).logits[0] for one in caches])
                    for each, caches in ((model, alone), (floats, plain))
                )
                near.append(torch.isclose(found, wanted[[1, 0, 0]], atol=1e-5, rtol=1e-5).all(-1))
                off += float((found - wanted[[1, 0, 0]]).square().sum())
                rounding += float((exact - wanted)[[1, 0, 0]].square().sum())
            # three rows sum in another order than one, on every processor in others: a value between two codes may go
            # either way
            assert float(torch.cat(near).float().mean()) > 0.5
            assert off < 0.01 * rounding
            assert both.layers[0].recurrent_states[0].count.tolist() == [0, 2, 2]


def test_more_of_a_prompt_within_a_window_rounds_at_its_end(tiny: Any) -> None:
    """As the simulator with a longer prompt, but for the rounding at the end of the first part."""
    from transformers import DynamicCache

    model, _ = quantized(tiny, "mamba2", {"bits": 8, "codec": "dsq", "window": 4})
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(PROMPT[:, :3], cache_params=cache, use_cache=True)
        for at in (3, 4):
            model(PROMPT[:, at, None], cache_params=cache, use_cache=True)
        held = cache.layers[0].recurrent_states[0]
        assert held.count.tolist() == [2] * 4
        before = held.load()
        assert not torch.equal(before, held._stored())
        model(PROMPT[:, 5:], cache_params=cache, use_cache=True)
        whole = DynamicCache(config=model.config)
        model(PROMPT, cache_params=whole, use_cache=True)
        held, wanted = (one.layers[0].recurrent_states[0] for one in (cache, whole))
        assert held.count.tolist() == [0] * 4
        # replayed: without them the state would lack two tokens
        assert float((held.load() - wanted.load()).norm() / wanted.load().norm()) < 0.03
        cache.reset()
        model(PROMPT[:, :3], cache_params=cache, use_cache=True)
        assert cache.layers[0].recurrent_states[0].count.tolist() == [0] * 4


def test_heads_of_different_widths_are_packed_apart(tiny: Any) -> None:
    widths = {f"backbone.layers.{i}.mixer": [4, 8, 6, 4, 4, 8, 8, 4] for i in range(2)}
    model, runtime = quantized(tiny, "mamba2", {"bits": 4, "codec": "dsq", "head_bits": widths})
    packed = generate(model)
    held = cache_of(packed).layers[0].recurrent_states[0]
    assert held.nbytes == held.quantizer.nbytes * 4
    runtime.packed = False
    assert torch.equal(packed.sequences, generate(model).sequences)


def test_a_cache_can_be_reset_and_continued(tiny: Any) -> None:
    """Two calls that continue each other equal one; a reset cache starts from nothing."""
    from transformers import DynamicCache

    for family in ("mamba", "mamba2"):
        model, _ = quantized(tiny, family, {"bits": 16, "codec": "none"})
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            first = model(PROMPT[:, :5], cache_params=cache, use_cache=True).logits
            # several tokens at once from a stored state: transformers' Mamba-1 scan would start from zeros
            rest = model(PROMPT[:, 5:], cache_params=cache, use_cache=True).logits
            whole = model(PROMPT, cache_params=DynamicCache(config=model.config), use_cache=True).logits
            torch.testing.assert_close(torch.cat((first, rest), 1), whole, atol=1e-4, rtol=1e-4)
            cache.reset()
            assert torch.equal(model(PROMPT[:, :5], cache_params=cache, use_cache=True).logits, first)


def test_rows_can_be_repeated_and_chosen(tiny: Any) -> None:
    from transformers import DynamicCache

    model, _ = quantized(tiny, "bamba", POLICIES["dsq"])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPT, past_key_values=cache, use_cache=True)
    before = cache.layers[0].recurrent_states[0].load()
    cache.batch_repeat_interleave(2)
    assert torch.equal(cache.layers[0].recurrent_states[0].load(), before.repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([0, 7]))
    assert torch.equal(cache.layers[0].recurrent_states[0].load(), before[[0, 3]])
