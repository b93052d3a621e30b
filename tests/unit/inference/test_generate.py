"""Generation: the same greedy tokens by both engines, sampling, stopping, streaming."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from llmcompress_kernels import decode as native
from llmcompress_kernels import mamba2

from llmcompress.errors import InputError
from llmcompress.inference.generate import Generator, Sampling, choose
from llmcompress.models.registry import layout_from_config
from llmcompress.nn.mixers import attach

needs_native = pytest.mark.skipif(native.unavailable() is not None, reason="no native kernels")
PROMPTS = ([5, 6, 7], list(range(3, 60)), [9])


@needs_native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_greedy_tokens_are_those_of_transformers(decoders: Any, family: str, bits: int) -> None:
    model = decoders.packed(family, bits)
    own, theirs = Generator(model, "native"), Generator(model, "transformers")
    assert (own.engine, own.reason, theirs.engine) == ("native", None, "transformers")
    how = Sampling(24)
    found, expected = own.generate(PROMPTS, how), theirs.generate(PROMPTS, how)
    assert [f.tokens for f in found] == [e.tokens for e in expected]
    assert all(len(f.tokens) == 24 and 0 < f.prompt_seconds < f.seconds for f in found)


@needs_native
@pytest.mark.parametrize("penalty", [0.7, 1.3])
def test_repetitions_cost_as_in_transformers(decoders: Any, penalty: float) -> None:
    model = decoders.dense("llama")
    own, theirs = Generator(model, "native"), Generator(model, "transformers")
    how = Sampling(24, repetition=penalty)
    found, plain = [one.tokens for one in own.generate(PROMPTS, how)], own.generate(PROMPTS, Sampling(24))
    assert found == [one.tokens for one in theirs.generate(PROMPTS, how)] != [one.tokens for one in plain]
    # once the first has ended, each of the others still has its own count
    ended = [one.tokens for one in own.generate(PROMPTS, how, {found[0][2]})]
    assert ended == [one.tokens for one in theirs.generate(PROMPTS, how, {found[0][2]})]
    assert len(ended[0]) < max(map(len, ended[1:]))


@needs_native
def test_stop_tokens_end_each_sequence_alone(decoders: Any) -> None:
    model = decoders.packed("llama", 4)
    own = Generator(model)
    free = [c.tokens for c in own.generate(PROMPTS, Sampling(20))]
    stop = {free[0][6], free[2][9]}
    found = [c.tokens for c in own.generate(PROMPTS, Sampling(20), stop)]
    assert found == [c.tokens for c in Generator(model, "transformers").generate(PROMPTS, Sampling(20), stop)]
    for tokens, all_tokens in zip(found, free):
        first = next((i for i, t in enumerate(all_tokens) if t in stop), 19)
        assert tokens == all_tokens[: first + 1]


def test_what_the_checkpoint_sets_beside_changes_nothing(decoders: Any) -> None:
    model = decoders.dense("llama")
    theirs = Generator(model, "transformers")
    how, hot = Sampling(12), Sampling(12, temperature=2.0, top_k=40, seed=3)
    plain = [[c.tokens for c in theirs.generate(PROMPTS, each)] for each in (how, hot)]
    for setting in ({"no_repeat_ngram_size": 1}, {"num_beams": 3}, {"min_p": 0.9}, {"max_time": 0.0}):
        model.generation_config.update(**setting)
        assert [[c.tokens for c in theirs.generate(PROMPTS, each)] for each in (how, hot)] == plain
    assert model.generation_config.num_beams == 3


@needs_native
def test_more_prompts_than_one_step_takes(decoders: Any) -> None:
    model = decoders.dense("llama")
    prompts = [[3 + i, 4 + i] for i in range(11)]
    own = Generator(model)
    assert [c.tokens for c in own.generate(prompts, Sampling(6))] == [
        own.generate([p], Sampling(6))[0].tokens for p in prompts
    ]


@needs_native
def test_sampling_repeats_with_its_seed(decoders: Any) -> None:
    own = Generator(decoders.packed("mixtral", 4))

    def draw(seed: int) -> list[int]:
        return own.generate([[5, 6]], Sampling(30, temperature=1.2, top_p=0.9, seed=seed))[0].tokens

    assert draw(1) == draw(1) != draw(2)


class Only:
    """A grammar of one text."""

    def __init__(self, tokens: list[int]) -> None:
        self._left, self.ended = list(tokens), False

    def restrict(self, logits: torch.Tensor) -> torch.Tensor:
        """All but the next token."""
        assert logits.ndim == 1 and logits.dtype == torch.float32
        return torch.full_like(logits, -torch.inf).index_fill(0, torch.tensor(self._left[0]), 0.0)

    def take(self, token: int) -> None:
        """It must be that one."""
        assert token == self._left.pop(0)
        self.ended = not self._left


@needs_native
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_a_grammar_is_followed_to_its_end_to_the_last_token_or_an_end(
    decoders: Any, engine: Any, temperature: float
) -> None:
    generator, text = Generator(decoders.dense("llama"), engine), [9, 4, 9, 7]
    for most, stop, expected in ((20, (), text), (3, (), text[:3]), (20, (4,), text[:2])):
        walk: Any = Only(text)
        (found,) = generator.generate([[5, 6]], Sampling(most, temperature), stop, walk=walk)
        assert found.tokens == expected and walk.ended == (expected == text)
    with pytest.raises(InputError, match="2 prompts cannot follow one grammar"):
        generator.generate([[5], [6]], Sampling(4), walk=walk)


@needs_native
def test_streamer_sees_prompt_and_tokens_in_order(decoders: Any) -> None:
    class Seen:
        def __init__(self) -> None:
            self.values: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.values += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    model = decoders.dense("llama")
    for engine in ("native", "transformers"):
        seen = Seen()
        (found,) = Generator(model, engine).generate([[5, 6]], Sampling(4), streamer=seen)
        assert seen.values == [5, 6, *found.tokens]
        assert seen.ended
    with pytest.raises(InputError, match="streamed"):
        Generator(model).generate([[5], [6]], Sampling(4), streamer=seen)


@needs_native
@pytest.mark.parametrize("packed", [True, False])
def test_a_conversation_reads_what_is_new(decoders: Any, packed: bool) -> None:
    model = decoders.packed("llama", 4) if packed else decoders.dense("llama")
    talk, fresh = Generator(model, conversation=True), Generator(model)
    prompt = list(range(3, 43))
    for turn in range(3):
        (found,), (alone,) = talk.generate([prompt], Sampling(9)), fresh.generate([prompt], Sampling(9))
        assert found.tokens == alone.tokens
        # all of the last turn but its last token, which nothing was computed for
        assert (found.reused, alone.reused) == (0 if turn == 0 else len(prompt) - 5, 0)
        prompt = [*prompt, *found.tokens, 4, 5, 6, 7]
    # another conversation begins, and one that ends within the last prompt
    assert talk.generate([[9, *prompt]], Sampling(2))[0].reused == 0
    assert talk.generate([[9, *prompt[:30]]], Sampling(2))[0].reused == 30
    with pytest.raises(ZeroDivisionError):
        talk.generate([[9, *prompt]], Sampling(4), streamer=Broken())
    assert talk.generate([[9, *prompt]], Sampling(2))[0].reused == 0


@pytest.mark.skipif(mamba2.unavailable() is not None, reason=f"no native kernels: {mamba2.unavailable()}")
def test_a_conversation_of_states_goes_on_from_a_snapshot(tiny: Any) -> None:
    model = tiny.model("falcon_mamba", state_size=16, time_step_rank=16)
    attach(model, layout_from_config(model.config.to_dict()), {"bits": 4, "codec": "dsq"})
    talk, fresh = Generator(model, conversation=True), Generator(model)
    prompt, reused = list(range(3, 63)) * 2, []
    for _ in range(3):
        (found,), (alone,) = talk.generate([prompt], Sampling(9)), fresh.generate([prompt], Sampling(9))
        assert found.tokens == alone.tokens
        reused.append(found.reused)
        prompt = [*prompt, *found.tokens, *range(4, 64)]
    assert reused == [0, 64, 128]
    with pytest.raises(ZeroDivisionError):
        talk.generate([prompt], Sampling(4), streamer=Broken())
    assert talk.generate([prompt], Sampling(9))[0].tokens == fresh.generate([prompt], Sampling(9))[0].tokens


class Broken:
    """A streamer that fails when the first token comes."""

    def __init__(self) -> None:
        self.seen = 0

    def put(self, value: torch.Tensor) -> None:
        self.seen += 1
        _ = 1 / (2 - self.seen)


def test_falls_back_with_a_reason(decoders: Any) -> None:
    model = decoders.dense("llama", hidden_act="relu6")
    generator = Generator(model)
    assert generator.engine == "transformers"
    assert "relu6" in str(generator.reason)
    assert len(generator.generate([[5, 6]], Sampling(3))[0].tokens) == 3
    with pytest.raises(InputError, match="relu6"):
        Generator(model, "native")
    with pytest.raises(InputError, match="no tokens"):
        generator.generate([[]], Sampling(3))


@needs_native
def test_sequences_longer_than_a_window(decoders: Any) -> None:
    model = decoders.dense("mistral", sliding_window=16)
    both = [Generator(model, name).generate([[5, 6]], Sampling(30))[0].tokens for name in ("auto", "transformers")]
    assert both[0] == both[1]


@pytest.mark.parametrize("how", [
    Sampling(1, 0.7), Sampling(1, 1.3, top_p=0.6), Sampling(1, 1.0, top_k=5), Sampling(1, 1.0, top_p=0.8, top_k=7),
    Sampling(1, 1.0, top_p=1e-9), Sampling(1, 1.2, min_p=0.2), Sampling(1, 1.0, min_p=1.0),
    Sampling(1, 1.5, top_p=0.9, top_k=12, min_p=0.1),
])  # fmt: skip
def test_choice_follows_the_filtered_distribution(how: Sampling) -> None:
    """Frequencies against transformers' own warpers."""
    from transformers.generation.logits_process import (
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, 40, generator=torch.Generator().manual_seed(3)) * 2
    warped = TemperatureLogitsWarper(how.temperature)(torch.empty(0), logits.clone())
    if how.top_k:
        warped = TopKLogitsWarper(how.top_k)(torch.empty(0), warped)
    if how.top_p < 1:
        warped = TopPLogitsWarper(how.top_p)(torch.empty(0), warped)
    if how.min_p:
        warped = MinPLogitsWarper(how.min_p)(torch.empty(0), warped)
    expected = warped.softmax(-1)[0]
    draws = choose(logits.expand(20000, -1), how, torch.Generator().manual_seed(0))
    found = torch.bincount(draws, minlength=40) / 20000
    assert found[expected == 0].sum() == 0
    assert (found - expected).abs().max() < 0.015


@pytest.mark.parametrize("temperature", [1e-6, 1e-30, 1e-40, 5e-324])
@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_the_smallest_temperatures_are_greedy(temperature: float, top_p: float) -> None:
    logits = 40 * torch.randn(9, 500, generator=torch.Generator().manual_seed(0))
    how = Sampling(1, temperature, top_p)
    assert torch.equal(choose(logits, how, torch.Generator().manual_seed(1)), logits.argmax(-1))


def test_nucleus_beyond_the_first_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.inference.generate.NUCLEUS", 4)
    even = torch.zeros(5000, 32)
    draws = choose(even, Sampling(1, 1.0, min_p=0.5), torch.Generator().manual_seed(0))
    assert len(draws.unique()) == 32
    draws = choose(even, Sampling(1, 1.0, top_p=0.95), torch.Generator().manual_seed(0))
    assert len(draws.unique()) == 31
