"""Greedy continuations written natively are those of transformers, or are declined with a reason."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from llmcompress_kernels import decode

from llmcompress.inference import greedy
from llmcompress.inference.engine import Engine
from llmcompress.inference.greedy import GreedyWriter, continue_greedily, disagrees, end_tokens, unusual_settings

pytestmark = pytest.mark.skipif(decode.unavailable() is not None, reason="no native decode step")

NEW = 20


def by_transformers(model, prompt, ends=(2,)):
    """One prompt at a time, without a cache: the slowest way."""
    ids = list(prompt)
    with torch.inference_mode():
        while len(ids) < len(prompt) + NEW:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] in ends:
                break
    return ids[len(prompt) :]


@pytest.fixture(scope="module")
def prompts(ids):
    """More than a step takes, one of them read through transformers' modules."""
    lengths = [1, 3, 40, 2, 9, 5, 4, 7, 6, 8]
    return [ids[11 * i : 11 * i + n].tolist() for i, n in enumerate(lengths)]


@pytest.mark.parametrize(("family", "bits"), [("llama", None), ("llama", 4), ("mixtral", None), ("mixtral", 3)])
def test_tokens_are_those_of_the_slow_way(decoders, prompts, family, bits):
    model = decoders.dense(family) if bits is None else decoders.packed(family, bits)
    model.get_output_embeddings().weight.data[2] *= 3  # the end token is met now and then
    writer = GreedyWriter(model)
    expected = [by_transformers(model, prompt) for prompt in prompts]
    assert writer.write(prompts, NEW, {2}) == expected
    assert writer.engine == "native" and writer.reason is None
    assert writer.tokens == sum(map(len, expected))
    assert len({len(tokens) for tokens in expected}) > 1, "the case is not worth its name"
    assert writer.write(prompts[3:5], NEW, {2}, together=1) == expected[3:5]


def test_a_caller_may_end_a_continuation(decoders, prompts):
    model = decoders.dense("llama")
    writer = GreedyWriter(model)
    whole = writer.write(prompts[:3], NEW, set())
    stopped = writer.write(prompts[:3], NEW, set(), lambda tokens: len(tokens) > 4 and tokens[-1] == tokens[-2])
    for one, other in zip(whole, stopped):
        end = next((i + 1 for i in range(4, NEW) if one[i] == one[i - 1]), NEW)
        assert other == one[:end]
    assert writer.write([], NEW, set()) == []


def test_an_engine_that_writes_something_else_is_not_trusted(decoders, prompts, monkeypatch):
    model, other = decoders.dense("llama"), decoders.dense("llama", num_hidden_layers=1)
    reason = disagrees(Engine(other), model, prompts[:2], {2})
    assert reason is not None and "differs from transformers'" in reason
    monkeypatch.setattr(greedy, "open_engine", lambda *_, **__: Engine(other))
    writer = GreedyWriter(model)
    assert writer.write(prompts, NEW, {2}) is None
    assert writer.reason == reason.replace("prompt 2", "prompt 1") or "of the trial differs" in writer.reason
    assert writer.engine == "transformers"
    assert writer.write(prompts, NEW, {2}) is None, "one verdict for all that follows"


def test_logits_closer_than_rounding_may_go_either_way(decoders, prompts):
    model = decoders.dense("llama", tie_word_embeddings=False)
    engine = Engine(model, screen=False)
    # the engine shares the weights that it was made of
    head = model.get_output_embeddings().weight.data = model.get_output_embeddings().weight.data.clone()
    (written,) = continue_greedily(engine, [prompts[0]], 1, set())
    twin = 5 if written[0] != 5 else 6
    head[twin] = head[written[0]] * (1 + 1e-7)
    assert disagrees(engine, model, prompts[:1], set()) is None
    head[twin] = head[written[0]] * 1.01
    assert disagrees(engine, model, prompts[:1], set()) is not None


def test_reasons_of_what_is_declined(decoders, prompts, monkeypatch):
    longrope = {**decoders.longrope, "original_max_position_embeddings": 30, "long_mscale": 1.3}
    writer = GreedyWriter(decoders.dense("phimoe", rope_parameters=longrope))
    assert writer.write(prompts[:2], NEW, {2}) is not None
    assert writer.write(prompts, NEW, {2}) is None
    assert writer.reason == f"{40 + NEW} tokens exceed the 30 whose rotary tables the engine has"
    monkeypatch.setenv("LLMCOMPRESS_KERNELS", "reference")
    writer = GreedyWriter(decoders.dense("llama"))
    assert writer.write(prompts, NEW, {2}) is None
    assert writer.reason == "LLMCOMPRESS_KERNELS=reference" and writer.engine == "transformers"


def test_settings_of_the_checkpoint(decoders):
    model = decoders.dense("llama")
    assert unusual_settings(model) is None and end_tokens(model) == {2}
    model.generation_config.eos_token_id = [2, 7]
    model.generation_config.do_sample, model.generation_config.top_p = True, 0.8
    assert unusual_settings(model) is None and end_tokens(model) == {2, 7}
    model.generation_config.repetition_penalty = 1.05
    assert unusual_settings(model) == "the checkpoint's generation settings change repetition_penalty"
    assert end_tokens(model, SimpleNamespace(eos_token_id=9)) == {2, 7, 9}
    assert end_tokens(SimpleNamespace(generation_config=None)) == set()
    assert end_tokens(SimpleNamespace(), SimpleNamespace(eos_token_id=None)) == set()
